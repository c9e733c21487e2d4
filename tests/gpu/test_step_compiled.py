"""The compiled step on a GPU equals the eager one.

The compiler takes longer than the other tests together, so this file is the last one by name.
"""

import pytest
import torch

from ars2 import ARS2Neo
from tests.ars2.problems import SmallProblem, problem_groups
from tests.ars2.training import copies, train, worst_difference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_a_compiled_step_equals_the_eager_one_up_to_rounding() -> None:
    results = []
    for compiled in (False, True):
        model = SmallProblem().cuda()
        optimizer = ARS2Neo(problem_groups(model), mode="base", ns_dtype="float32", compile=compiled)
        train(model, optimizer, range(4))
        results.append(copies(model.parameters()))
    assert worst_difference(*results) < 1e-4
