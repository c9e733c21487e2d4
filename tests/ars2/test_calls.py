"""Check the order of calls that make a step.

A valid order updates, an invalid one is an error, and no order silently trains nothing.
"""

from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from ars2 import ARS2Neo, Muon
from tests.ars2.problems import SmallProblem, problem_groups
from tests.ars2.training import (
    CORE_MODES,
    MODES,
    assert_identical,
    closure_of,
    copies,
    parameters_of,
    same,
    setup,
    snapshot,
    step_by_parts,
    train,
)

CALLS = ("backward", "wants_second_pass", "perturb", "restore", "step", "step(closure)", "step(no-op)")


def call(name: str, model: SmallProblem, optimizer: ARS2Neo) -> None:
    actions: dict[str, Callable[[], object]] = {
        "backward": lambda: model.loss(0).backward(),
        "wants_second_pass": optimizer.wants_second_pass,
        "perturb": optimizer.perturb,
        "restore": optimizer.restore,
        "step": optimizer.step,
        "step(closure)": lambda: optimizer.step(closure_of(model, optimizer, 0)),
        "step(no-op)": lambda: optimizer.step(lambda: None),
    }
    actions[name]()


def started(mode: str) -> tuple[SmallProblem, ARS2Neo]:
    """Return a model and its optimizer after a few steps and a backward pass."""
    model, optimizer = setup(mode)
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    model.loss(3).backward()
    return model, optimizer


@pytest.mark.parametrize(
    ("mode", "has_gradient"),
    [
        ("sync", True),
        ("base", False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("aga", True), ("periodic", True), ("sync", False))),
    ],
)
def test_any_order_of_calls_is_an_error_or_trains(mode: str, has_gradient: bool) -> None:
    model, optimizer = started(mode)
    start, at_start = deepcopy(optimizer.state_dict()), copies(model.parameters())
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    steps_done = errors = 0
    for order in product(CALLS, repeat=3):
        for p, value, g in zip(model.parameters(), at_start, gradients, strict=True):
            p.data.copy_(value)
            p.grad = g.clone() if has_gradient else None
        optimizer.load_state_dict(start)
        before = copies(model.parameters())
        for name in order:
            counted = optimizer.diagnostics()["steps"]
            try:
                call(name, model, optimizer)
            except RuntimeError:
                assert optimizer.diagnostics()["steps"] == counted
                errors += 1
                break
            if name.startswith("step") and optimizer.diagnostics()["steps"] == counted:
                # torch's rule: without any gradient a step does nothing.
                assert all(p.grad is None for p in model.parameters()) and same(before, model.parameters()), order
            elif name.startswith("step"):
                # A step that returns has moved every parameter and has counted itself.
                assert optimizer.diagnostics()["steps"] == counted + 1, order
                after = copies(model.parameters())
                assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), order
                before, steps_done = after, steps_done + 1
            elif name == "restore":
                assert same(before, model.parameters()), order
        with suppress(RuntimeError):  # where the parameters have not been moved
            optimizer.restore()
        assert same(before, model.parameters()), order
    assert steps_done > 50 and errors > 100


@pytest.mark.parametrize("mode", ["sync", "aga"])
def test_a_no_op_closure_is_an_error(mode: str) -> None:
    _, optimizer = started(mode)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="zero the gradients"):
        optimizer.step(lambda: None)
    assert_identical(before, snapshot(optimizer))


def optimizers(model: SmallProblem) -> dict[str, Callable[[], Optimizer]]:
    return {
        "muon": lambda: Muon(problem_groups(model)),
        **{mode: partial(ARS2Neo, problem_groups(model), **options) for mode, options in MODES.items()},
    }


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("muon", "step"),
        ("muon", "closure"),
        ("base", "step"),
        ("sync", "closure"),
        ("aga", "parts"),
        ("aga", "closure"),
    ],
)
def test_a_step_without_any_gradient_changes_and_counts_nothing(name: str, how: str) -> None:
    model = SmallProblem()
    optimizer = optimizers(model)[name]()
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    before = snapshot(optimizer)
    calls: list[int] = []
    if how == "parts" and isinstance(optimizer, ARS2Neo):
        assert not optimizer.wants_second_pass()
    if how == "closure":
        assert optimizer.step(lambda: calls.append(1) or "the loss") == "the loss"
        assert calls == [1]
    else:
        assert optimizer.step() is None
    assert_identical(before, snapshot(optimizer))
    scheduler.step()
    train(model, optimizer, range(2, 4))
    other = SmallProblem()
    undisturbed = optimizers(other)[name]()
    scheduler = torch.optim.lr_scheduler.ConstantLR(undisturbed)
    train(other, undisturbed, range(2))
    scheduler.step()
    train(other, undisturbed, range(2, 4))
    assert_identical(snapshot(undisturbed), snapshot(optimizer))


def test_wants_second_pass_before_any_gradient_starts_no_step() -> None:
    model, optimizer = setup("sync")
    assert not optimizer.wants_second_pass()
    model.loss(0).backward()
    for call in (optimizer.step, optimizer.perturb):
        with pytest.raises(RuntimeError, match=r"wants_second_pass\(\)"):
            call()


@pytest.mark.parametrize("mode", ["sync", "aga"])
def test_a_closure_that_computes_nothing_at_the_adversarial_point_is_an_error(mode: str) -> None:
    model, optimizer = setup(mode)
    calls: list[Tensor | None] = []

    def closure() -> None:
        calls.append(None)
        if len(calls) == 1:
            model.loss(0).backward()

    before = copies(model.parameters())
    with pytest.raises(RuntimeError, match="adversarial point"):
        optimizer.step(closure)
    assert len(calls) == 2 and same(before, model.parameters())
    assert optimizer.diagnostics()["steps"] == 0


def test_base_steps_with_existing_gradients_after_a_no_op_closure() -> None:
    model, optimizer = started("base")
    other, other_optimizer = started("base")
    optimizer.step(lambda: None)
    other_optimizer.step()
    assert same(model.parameters(), other.parameters())


@pytest.mark.parametrize("mode", CORE_MODES)
def test_after_the_parts_a_closure_is_evaluated_once_and_only_the_update_applied(mode: str) -> None:
    model, optimizer = setup(mode)
    other, other_optimizer = setup(mode)
    for step in range(4):
        step_by_parts(model, optimizer, step)
        calls: list[int] = []

        def evaluate(calls: list[int] = calls) -> str:
            calls.append(1)
            return "the hook's value"

        other_optimizer.zero_grad()
        other.loss(step).backward()
        if other_optimizer.wants_second_pass():
            other_optimizer.perturb()
            other.loss(step).backward()
            other_optimizer.restore()
        assert other_optimizer.step(evaluate) == "the hook's value"
        assert calls == [1]
    assert_identical(snapshot(optimizer), snapshot(other_optimizer))


@pytest.mark.parametrize("mode", ["sync", "aga"])
def test_step_without_closure_or_second_pass_names_the_missing_calls(mode: str) -> None:
    _, optimizer = started(mode)
    with pytest.raises(RuntimeError, match=r"passes\(model\).*wants_second_pass\(\).*step\(closure\)"):
        optimizer.step()


def test_a_wanted_second_pass_must_be_made() -> None:
    model, optimizer = started("sync")
    assert optimizer.wants_second_pass()
    before = snapshot(optimizer)
    for closure in (None, lambda: None):
        with pytest.raises(RuntimeError, match="the second pass is missing"):
            optimizer.step(closure)
    assert_identical(before, snapshot(optimizer))
    # Nothing is lost: it can still be made.
    optimizer.perturb()
    model.loss(3).backward()
    optimizer.restore()
    optimizer.step()
    assert optimizer.diagnostics()["sync_steps"] == 4


def test_no_second_gradient_is_an_error() -> None:
    _, optimizer = started("sync")
    optimizer.wants_second_pass()
    optimizer.perturb()
    optimizer.restore()
    with pytest.raises(RuntimeError, match="the second pass left no gradient"):
        optimizer.step()
    assert optimizer.diagnostics()["steps"] == 3


@pytest.mark.parametrize(
    ("name", "forbidden"),
    [
        ("perturb", lambda optimizer: optimizer.perturb()),
        ("step", lambda optimizer: optimizer.step()),
        ("step", lambda optimizer: optimizer.step(lambda: None)),
        ("wants_second_pass", lambda optimizer: optimizer.wants_second_pass()),
        ("load_state_dict", lambda optimizer: optimizer.load_state_dict(optimizer.state_dict())),
        ("add_param_group", lambda optimizer: optimizer.add_param_group({"params": [torch.ones(2, 2)]})),
        ("copying", lambda optimizer: deepcopy(optimizer)),
    ],
)
def test_while_moved_only_restore_is_allowed(name: str, forbidden: Callable[[ARS2Neo], object]) -> None:
    model, optimizer = started("sync")
    before = copies(model.parameters())
    optimizer.wants_second_pass()
    optimizer.perturb()
    moved = copies(model.parameters())
    with pytest.raises(RuntimeError, match=name):
        forbidden(optimizer)
    assert same(moved, model.parameters()) and len(optimizer.param_groups) == 2
    optimizer.restore()
    assert same(before, model.parameters())


@pytest.mark.parametrize(("mode", "name"), [("base", "perturb"), ("sync", "perturb"), ("aga", "restore")])
def test_perturb_and_restore_in_the_wrong_order_are_errors(mode: str, name: str) -> None:
    _, optimizer = started(mode)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=rf"{name}\(\)"):
        getattr(optimizer, name)()
    assert_identical(before, snapshot(optimizer))


def test_restoring_twice_is_an_error() -> None:
    _, optimizer = started("sync")
    optimizer.wants_second_pass()
    optimizer.perturb()
    optimizer.restore()
    with pytest.raises(RuntimeError, match="the parameters have not moved"):
        optimizer.restore()


def test_an_unwanted_second_pass_may_be_made() -> None:
    # Another rank may want it.
    model, optimizer = setup("periodic")
    train(model, optimizer, range(1))
    optimizer.zero_grad()
    model.loss(1).backward()
    assert not optimizer.wants_second_pass()
    optimizer.perturb()
    model.loss(1).backward()
    optimizer.restore()
    optimizer.step()
    assert optimizer.diagnostics()["sync_steps"] == 2
    assert optimizer.param_groups[0]["last_sync"] == 2
    assert len(parameters_of(optimizer)) == 8
