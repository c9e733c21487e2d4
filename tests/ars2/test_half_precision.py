"""Half-precision parameters are updated as in float32, and rounded once."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ars2 import ARS2Neo, Muon
from tests.ars2.problems import SmallProblem, problem_groups
from tests.ars2.training import CORE_MODES, MODES, assert_identical, closure_of, snapshot, train

HALF = [torch.bfloat16, torch.float16]
CASES: list[tuple[type[Any], dict[str, Any], torch.dtype]] = [
    (ARS2Neo, {"mode": "base"}, torch.float16),
    (ARS2Neo, {"mode": "sync"}, torch.bfloat16),
    (ARS2Neo, {"mode": "base", "energy": False, "geometry": False}, torch.bfloat16),
    (Muon, {}, torch.bfloat16),
]


def values(dtype: torch.dtype, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))


@pytest.mark.parametrize(("optimizer_class", "options", "dtype"), CASES)
def test_small_weight_decay_adds_up(optimizer_class: type[Any], options: dict[str, Any], dtype: torch.dtype) -> None:
    params = [values(dtype, 6, 5), values(dtype, 7)]
    start = [param.detach().float() for param in params]
    groups = [{"params": [p], "track": track} for p, track in zip(params, ("matrix", "vector"), strict=True)]
    optimizer = optimizer_class(groups, lr=1e-3, weight_decay=0.1, **options)

    def closure() -> None:
        for param in params:
            param.grad = torch.zeros_like(param)

    for _ in range(200):
        optimizer.step(closure)
    for param, before in zip(params, start, strict=True):
        assert param.dtype == dtype
        # Half a unit in the last place, and the rounding of 200 steps in float32.
        unit = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(param.float(), before * (1 - 1e-4) ** 200, rtol=unit * 1.01, atol=3e-8)


@pytest.mark.parametrize(("optimizer_class", "options", "dtype"), CASES)
def test_small_updates_add_up_as_in_float32(
    optimizer_class: type[Any], options: dict[str, Any], dtype: torch.dtype
) -> None:
    def run(dtype: torch.dtype) -> list[Tensor]:
        # A float32 parameter in the same group is updated in float32.
        matrices = [nn.Parameter(values(HALF[0], 6, 5).to(torch.float16).to(dtype)), values(torch.float32, 4, 3)]
        vector = nn.Parameter(torch.ones(7, dtype=dtype))
        groups = [{"params": matrices, "track": "matrix"}, {"params": [vector], "track": "vector"}]
        optimizer = optimizer_class(groups, lr=1e-5, weight_decay=0.0, ns_dtype="float32", **options)

        def closure() -> None:
            for param in (*matrices, vector):
                param.grad = torch.ones_like(param)
                param.grad.view(-1)[0] = -2.0

        for _ in range(100):
            optimizer.step(closure)
        return [param.detach() for param in (*matrices, vector)]

    for found, expected in zip(run(dtype), run(torch.float32), strict=True):
        torch.testing.assert_close(found, expected.to(found.dtype), rtol=torch.finfo(found.dtype).eps, atol=1e-7)


@pytest.mark.parametrize("mode", CORE_MODES)
def test_a_saved_state_resumes_to_the_bit_in_half_precision(mode: str) -> None:
    def new() -> tuple[SmallProblem, ARS2Neo]:
        model = SmallProblem(torch.bfloat16)
        return model, ARS2Neo(problem_groups(model), **MODES[mode])

    (model, optimizer), (other, other_optimizer) = new(), new()
    train(model, optimizer, range(5))
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert any(state["remainder"].any() for state in optimizer.state.values())
    train(model, optimizer, range(5, 10))
    train(other, other_optimizer, range(5, 10))
    assert_identical(snapshot(optimizer), snapshot(other_optimizer))


def test_a_state_without_remainders_loads_and_one_with_them_loads_into_float32() -> None:
    model = SmallProblem(torch.bfloat16)
    optimizer = ARS2Neo(problem_groups(model), mode="sync")
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    wide = SmallProblem()
    wide_optimizer = ARS2Neo(problem_groups(wide), mode="sync")
    assert not any("remainder" in state for state in wide_optimizer.state.values())
    wide_optimizer.load_state_dict(saved)
    assert not any("remainder" in state for state in wide_optimizer.state.values())
    optimizer.load_state_dict(wide_optimizer.state_dict())
    assert not any(state["remainder"].any() for state in optimizer.state.values())
    train(model, optimizer, range(2))


def test_a_replaced_parameter_keeps_no_remainder_of_the_old_one() -> None:
    param = nn.Parameter(torch.full((8,), 1.0, dtype=torch.bfloat16))
    optimizer = ARS2Neo([{"params": [param], "track": "vector"}], lr=1e-3, mode="base", weight_decay=0.0)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state[param]["remainder"].any()
    with torch.no_grad():
        param.fill_(1e-5)
    replaced = param.detach().clone()
    param.grad = torch.zeros_like(param)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(param, replaced) and optimizer.state[param]["remainder"].count_nonzero() == 0


@pytest.mark.parametrize("dtype", HALF)
def test_perturb_and_restore_leave_no_trace(dtype: torch.dtype) -> None:
    model = SmallProblem(dtype)
    optimizer = ARS2Neo(problem_groups(model), mode="sync")
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    before = snapshot(optimizer)
    closure_of(model, optimizer, 2)()
    assert optimizer.wants_second_pass()
    optimizer.perturb()
    optimizer.restore()
    assert_identical(before, snapshot(optimizer))
