"""The second pass replays the random numbers of the first one on a GPU too."""

import pytest
import torch
from torch.nn import functional

from ars2.replay import random_state

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_dropout_is_replayed_to_the_bit() -> None:
    x = torch.ones(10_000, device="cuda")
    replay = random_state(x.device)
    first, noise = functional.dropout(x, 0.5), torch.randn(5)
    after = random_state(x.device)
    other = functional.dropout(x, 0.5)
    replay()
    assert torch.equal(functional.dropout(x, 0.5), first)
    assert torch.equal(torch.randn(5), noise)
    assert not torch.equal(other, first)
    after()
    assert torch.equal(functional.dropout(x, 0.5), other)
