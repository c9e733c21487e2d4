"""The directions are the optimizer's, the schedules are near-optimal, and the statistics are right."""

import csv
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ars2 import ARS2Neo, orthogonalize
from ars2.newton_schulz import COEFFICIENTS, schedule
from studies import newton_schulz_steps as study
from studies.newton_schulz_steps import (
    candidates,
    compose,
    designed,
    direction,
    matrices,
    reached,
    relative_values,
    statistics,
)


def test_the_direction_is_the_step_without_geometry_and_decay() -> None:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(4, 3, 2, 2))
    optimizer = ARS2Neo([param], lr=1.0, weight_decay=0.0, mode="base", geometry=False, betas=(0.8, 0.9))
    for _ in range(3):
        before = param.detach().clone()
        param.grad = torch.randn_like(param)
        optimizer.step()
    (group,) = optimizer.param_groups
    found = direction(optimizer.state[param], group["betas"], group["eps"])
    torch.testing.assert_close(found, before - param.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 2), (4, 3, 2, 2)])
@pytest.mark.parametrize("flatten", [False, True])
def test_the_matrices_are_those_that_the_optimizer_orthogonalizes(shape: tuple[int, ...], flatten: bool) -> None:
    u = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    param = nn.Parameter(torch.zeros(shape))
    options: dict[str, Any] = {"ns_dtype": "float64", "weight_decay": 0.0, "lr": 1.0, "mode": "base", "energy": False}
    optimizer = ARS2Neo([{"params": [param], "track": "matrix", "flatten": flatten}], **options)
    param.grad = u.clone()
    optimizer.step()
    for moved, matrix in zip(matrices(param.detach(), flatten), matrices(u, flatten), strict=True):
        found = orthogonalize(matrix.double(), dtype=torch.float64).float()
        torch.testing.assert_close(-moved / moved.norm(), found / found.norm(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_composed_polynomials_are_what_newton_schulz_does(name: str) -> None:
    u = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = relative_values(u) / (1.01 if name == "polar_express" else 1.0)
    values = torch.linalg.svdvals(orthogonalize(u, 3, name, torch.float64)).numpy()
    np.testing.assert_allclose(np.sort(compose(schedule(name, 3), start)), np.sort(values), rtol=1e-10)


def test_a_designed_schedule_is_better_on_its_values_than_either_named_one_and_bounded() -> None:
    values = np.geomspace(0.01, 0.6, 200)
    weights = np.full(200, 1 / 200)
    made = designed(3, values, weights)
    deviations = [np.mean((compose(one, values) - 1) ** 2) for one in (made, *(schedule(n, 3) for n in COEFFICIENTS))]
    assert made.shape == (3, 3) and deviations[0] < 0.8 * min(deviations[1:])
    assert compose(made, np.linspace(0, 1, 501)).max() < 1.3


def test_the_deviation_is_the_distance_to_the_polar_factor() -> None:
    u = torch.diag(torch.tensor([3.0, 4.0]))
    values, deviation = reached(u, 1, [[2.0, 0.0, 0.0]])  # the singular values become 2 * 0.6 and 2 * 0.8
    np.testing.assert_allclose(values, [1.6, 1.2], rtol=0.01)
    assert deviation == pytest.approx(np.sqrt((0.6**2 + 0.2**2) / 2), rel=0.03)


def test_every_matrix_has_the_same_weight() -> None:
    found = statistics([(np.array([1.0]), 0.0), (np.array([2.0, 2.0, 2.0]), 1.0)])
    assert (found["share"], found["smallest"], found["largest"]) == (0.5, 1.0, 2.0)
    assert found["rms"] == pytest.approx(2.5**0.5, rel=1e-3) and found["deviation"] == pytest.approx(0.5**0.5, rel=1e-3)


def test_every_candidate_can_be_an_option() -> None:
    for steps, coefficients in candidates().values():
        ARS2Neo([nn.Parameter(torch.ones(2, 2))], ns_steps=steps, ns_coefficients=coefficients, mode="base")


def test_the_committed_table_is_that_of_the_committed_numbers() -> None:
    with open(study.FOLDER / "singular_values.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    rows = [{k: v if k in ("task", "mode", "candidate") else float(v) for k, v in row.items()} for row in found]
    assert study.table(rows) == (study.FOLDER / "singular_values.md").read_text(encoding="utf-8")
