"""Late second passes, and a rho that grows with the interval between them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ars2 import ARS2Neo
from tests.ars2.training import MODES, assert_identical, copies, setup, snapshot, step_by_parts, through_a_file, train

TOTAL = 8


@pytest.mark.parametrize(("start", "one_pass"), [(0.0, 0), (0.5, 4), (0.55, 4), (1.0, 8)])
def test_late_makes_two_passes_in_the_last_part_of_the_steps(start: float, one_pass: int) -> None:
    model, optimizer = setup("late", late_start=start, total_steps=TOTAL)
    assert not optimizer.always_two_pass and not optimizer.never_two_pass and optimizer.decides_alike
    passes = [1 + step_by_parts(model, optimizer, step) for step in range(TOTAL)]
    assert passes == [1] * one_pass + [2] * (TOTAL - one_pass)
    report = optimizer.diagnostics()
    assert report["sync_steps"] == TOTAL - one_pass and report["gradient_evaluations"] == sum(passes)


def test_late_equals_base_and_then_sync() -> None:
    model, optimizer = setup("late", late_start=0.5, total_steps=TOTAL)
    other, base = setup("base")
    train(model, optimizer, range(4))
    train(other, base, range(4))
    assert_identical(copies(model.parameters()), copies(other.parameters()))
    sync = setup("sync")[1]
    saved = base.state_dict()
    for group in saved["param_groups"]:
        group["mode"] = "sync"
    sync.load_state_dict(saved)
    for ours, theirs in zip(sync.param_groups, base.param_groups, strict=True):
        ours["params"] = theirs["params"]
        sync.state.update(zip(ours["params"], [base.state[p] for p in ours["params"]], strict=True))
    train(model, optimizer, range(4, TOTAL))
    train(other, sync, range(4, TOTAL))
    assert_identical(copies(model.parameters()), copies(other.parameters()))


@pytest.mark.parametrize("options", [{}, {"total_steps": 0}])
def test_late_needs_the_number_of_steps(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match='mode "late" needs total_steps, the number of optimizer steps'):
        ARS2Neo([nn.Parameter(torch.ones(2, 2))], mode="late", **options)


@pytest.mark.parametrize("mode", ["periodic", "random", "aga"])
def test_rho_grows_with_the_steps_since_the_last_second_pass(mode: str) -> None:
    model, optimizer = setup(mode, rho_per_step=True)
    assert optimizer.diagnostics()["rho"] == 0.0
    last, intervals = 0, []
    for step in range(12):
        optimizer.zero_grad()
        model.loss(step).backward()
        before = copies(model.parameters())
        if optimizer.wants_second_pass():
            intervals.append(step + 1 - last)
            last = step + 1
            optimizer.perturb()
            moves = [(p.detach() - b).norm().item() for p, b in zip(model.parameters(), before, strict=True)]
            for group in optimizer.param_groups:
                expected = [group["rho"] * intervals[-1]] * len(group["params"])
                # A bias of zeros does not move.
                found = [
                    moves[[p is q for q in model.parameters()].index(True)] or expected[0] for p in group["params"]
                ]
                assert found == pytest.approx(expected, rel=1e-4)
            model.loss(step).backward()
            optimizer.restore()
        optimizer.step()
        assert optimizer.diagnostics()["rho"] == pytest.approx(0.1 * intervals[-1])
    assert intervals[0] == 1 and max(intervals) > 1


@pytest.mark.parametrize("mode", ["periodic", "aga"])
def test_a_growing_rho_resumes_between_two_second_passes(mode: str) -> None:
    model, optimizer = setup(mode, rho_per_step=True)
    train(model, optimizer, range(5))
    other, loaded = setup(mode, rho_per_step=True)
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    assert loaded.diagnostics() == optimizer.diagnostics()
    train(model, optimizer, range(5, 12))
    train(other, loaded, range(5, 12))
    assert_identical(snapshot(optimizer), snapshot(loaded))


@pytest.mark.parametrize("mode", ["base", "sync", "late"])
def test_a_growing_rho_needs_steps_with_one_pass_between(mode: str) -> None:
    with pytest.raises(ValueError, match=f"rho_per_step needs one of the modes aga, periodic, random, got '{mode}'"):
        ARS2Neo([nn.Parameter(torch.ones(2, 2))], rho_per_step=True, **MODES[mode])


def test_by_default_no_step_needs_a_closure_or_a_shear_force() -> None:
    param = nn.Parameter(torch.ones(3, 4))
    optimizer = ARS2Neo([param])
    before: Tensor = param.detach().clone()
    param.grad = torch.ones(3, 4)
    optimizer.step()
    assert (param < before).all() and set(optimizer.state[param]) == {"exp_avg", "exp_avg_sq", "step"}
    assert optimizer.never_two_pass and optimizer.diagnostics()["gradient_evaluations"] == 1.0
