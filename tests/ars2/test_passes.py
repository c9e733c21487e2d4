"""A loop over passes() makes the steps of the separate calls."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ars2 import ARS2Neo, param_groups
from tests.ars2.training import MODES, SHEAR_MODES, assert_identical, copies, parameters_of, same, setup, snapshot
from tests.ars2.training import step_by_parts as by_parts
from tests.helpers.launching import alone


@pytest.mark.parametrize("mode", MODES)
def test_the_loop_equals_the_separate_calls_to_the_bit(mode: str) -> None:
    (model, optimizer), (other, other_optimizer) = setup(mode), setup(mode)
    for step in range(8):
        optimizer.zero_grad()
        numbers = []
        for number in optimizer.passes(model):
            numbers.append(number)
            model.loss(step).backward()
        optimizer.step()
        assert numbers == ([1, 2] if by_parts(other, other_optimizer, step) else [1])
    assert_identical(snapshot(optimizer), snapshot(other_optimizer))
    assert optimizer.diagnostics() == other_optimizer.diagnostics()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))


def test_the_second_pass_repeats_dropout_and_leaves_statistics_alone() -> None:
    model = network()
    optimizer = ARS2Neo(param_groups(model), lr=0.0, mode="sync", rho=0.0)
    inputs, losses = torch.randn(16, 6), []
    optimizer.zero_grad()
    for _ in optimizer.passes(model):
        losses.append(model(inputs).square().mean())
        losses[-1].backward()
    assert torch.equal(*losses)
    following, statistics = torch.rand(()), model[1].running_mean.clone()
    model = network()
    inputs = torch.randn(16, 6)
    model(inputs)
    assert torch.equal(torch.rand(()), following)
    assert torch.equal(model[1].running_mean, statistics)


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(()).item()])
def test_the_second_pass_repeats_draws_of_every_generator(draw: Callable[[], float]) -> None:
    model, optimizer = setup("sync")
    drawn = []
    optimizer.zero_grad()
    for _ in optimizer.passes(model):
        drawn.append(draw())
        model.loss(0).backward()
    assert drawn[0] == drawn[1] != draw()


def test_draws_after_an_abandoned_second_pass_are_those_without_it() -> None:
    drawn = []
    for abandoned in (False, True):
        model, optimizer = setup("sync" if abandoned else "base")
        torch.manual_seed(3)
        for number in optimizer.passes(model):
            if number == 2:
                break
            torch.rand(5)
            model.loss(0).backward()
        drawn.append(torch.rand(()))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("leave", ["break", "error", "interrupt"])
def test_the_parameters_are_restored_however_the_loop_ends(leave: str) -> None:
    model, optimizer = setup("sync")
    before = copies(parameters_of(optimizer))

    def loop() -> None:
        for number in optimizer.passes(model):
            model.loss(0).backward()
            if number == 2:
                assert not same(before, parameters_of(optimizer))
                if leave == "break":
                    break
                raise {"error": ValueError, "interrupt": KeyboardInterrupt}[leave]

    try:
        loop()
    except (ValueError, KeyboardInterrupt):
        assert leave != "break"
    assert same(before, parameters_of(optimizer))
    by_parts(model, optimizer, 0)  # the next step is made as usual


@pytest.mark.parametrize("mode", ["sync", *SHEAR_MODES])
def test_gradients_of_before_the_loop_are_refused(mode: str) -> None:
    model, optimizer = setup(mode)
    model.loss(0).backward()
    with pytest.raises(RuntimeError, match=r"call optimizer.zero_grad\(\) before the loop"):
        for _ in optimizer.passes(model):
            model.loss(1).backward()


def test_one_pass_adds_to_gradients_of_before_the_loop() -> None:
    (model, optimizer), (other, other_optimizer) = setup("base"), setup("base")
    for target in (model, other):
        target.loss(0).backward()
    for _ in optimizer.passes(model):
        model.loss(1).backward()
    other.loss(1).backward()
    optimizer.step()
    other_optimizer.step()
    assert_identical(snapshot(optimizer), snapshot(other_optimizer))


def test_the_passes_accumulate_the_same_micro_batches() -> None:
    (model, optimizer), (other, other_optimizer) = setup("sync"), setup("sync")
    for _ in range(3):
        optimizer.zero_grad()
        for _ in optimizer.passes(model):
            for micro_batch in range(3):
                (model.loss(micro_batch) / 3).backward()
        optimizer.step()

        def closure() -> Tensor:
            other_optimizer.zero_grad()
            loss = sum((other.loss(micro_batch) / 3 for micro_batch in range(3)), torch.zeros(()))
            loss.backward()
            return loss

        other_optimizer.step(closure)
    for a, b in zip(parameters_of(optimizer), parameters_of(other_optimizer), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)  # sums in another order


@pytest.mark.parametrize("mode", ["base", "sync", "aga"])
def test_processes_that_could_decide_differently_are_refused(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with alone():
        model, optimizer = setup(mode)
        if mode == "aga":
            with monkeypatch.context() as patched:
                patched.setattr(torch.distributed, "get_world_size", lambda *_: 2)
                with pytest.raises(RuntimeError, match=r"call optimizer.distribute\(group\) once before the loop"):
                    next(optimizer.passes(model))
            optimizer.distribute(torch.distributed.group.WORLD)
        for _ in optimizer.passes(model):
            model.loss(0).backward()
        optimizer.step()
        assert optimizer.diagnostics()["steps"] == 1


def test_a_loop_without_a_backward_pass_makes_no_step() -> None:
    model, optimizer = setup("sync")
    before = copies(parameters_of(optimizer))
    for _ in optimizer.passes(model):
        pass
    optimizer.step()
    assert same(before, parameters_of(optimizer)) and optimizer.diagnostics()["steps"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_closure_may_make_the_passes(mode: str) -> None:
    (model, optimizer), (other, other_optimizer) = setup(mode), setup(mode)
    for step in range(8):
        calls = []

        def closure(step: int = step, calls: list[int] = calls) -> float:
            calls.append(1)
            optimizer.zero_grad()
            for _ in optimizer.passes(model):
                loss = model.loss(step)
                loss.backward()
            return loss.item()

        assert optimizer.step(closure) and len(calls) == 1
        by_parts(other, other_optimizer, step)
    assert_identical(snapshot(optimizer), snapshot(other_optimizer))


def test_a_scaler_that_finds_an_overflow_skips_the_step_and_nothing_else() -> None:
    model = network()
    optimizer = ARS2Neo(param_groups(model), mode="aga", k=2, rho=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    inputs = torch.randn(16, 6)
    for step in range(4):
        before = copies(parameters_of(optimizer))
        optimizer.zero_grad()
        for number in optimizer.passes(model):
            loss = functional.mse_loss(model(inputs), inputs[:, :1])
            scaler.scale(loss * (torch.inf if (step, number) == (2, 1) else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert same(before, parameters_of(optimizer)) == (step == 2)
    assert optimizer.diagnostics()["steps"] == 3
    state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
    assert all(t.isfinite().all() for t in (*state, *parameters_of(optimizer)))
