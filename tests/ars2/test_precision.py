"""Scaled losses and autocast do not change the result."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ars2 import ARS2Neo, Muon
from ars2.flatness import adversarial_offsets, move_along_, offset_sums
from tests.ars2.problems import SmallProblem, problem_groups
from tests.ars2.training import (
    CORE_MODES,
    MODES,
    assert_identical,
    closure_of,
    copies,
    same,
    setup,
    snapshot,
    step_by_parts,
    train,
)

SCALE = 2.0**16


def unscale(model: nn.Module, scale: float = SCALE) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad /= scale


@pytest.mark.parametrize(("mode", "eps"), [("base", 1e-8), ("sync", 1e-2), ("aga", 1e-8), ("aga", 1e-2)])
def test_a_scaled_loss_changes_no_bit(mode: str, eps: float) -> None:
    # A power of two, so that scaling itself rounds nothing.
    def new() -> tuple[SmallProblem, ARS2Neo]:
        model = SmallProblem()
        groups = problem_groups(model, {"eps": eps}, {"eps": eps})
        return model, ARS2Neo(groups, ns_dtype="float32", **MODES[mode])

    model, optimizer = new()
    scaled, scaled_optimizer = new()
    for step in range(12):
        again = step_by_parts(model, optimizer, step)
        assert again == step_by_parts(scaled, scaled_optimizer, step, between=lambda: unscale(scaled), loss_scale=SCALE)
    assert_identical(snapshot(optimizer), snapshot(scaled_optimizer))


def test_the_shear_of_tiny_gradients_does_not_depend_on_the_scale() -> None:
    def shear(scale: float) -> Tensor:
        first, second = torch.tensor([3e-7, 4e-7]), torch.tensor([5e-7, 1e-7])
        param = nn.Parameter(torch.ones(2))
        optimizer = ARS2Neo([{"params": [param], "track": "vector"}], mode="periodic", k=2)
        param.grad = first * scale
        optimizer.wants_second_pass(grad_scale=scale)
        optimizer.perturb()
        param.grad = second.clone()
        optimizer.restore()
        optimizer.step()
        return optimizer.state[param]["shear"]

    assert torch.equal(shear(1.0), shear(SCALE))


def test_the_move_of_a_tiny_gradient_does_not_depend_on_the_scale() -> None:
    def moved(scale: float) -> Tensor:
        param = torch.ones(2)
        offsets = adversarial_offsets([param], [torch.tensor([3e-12, 4e-12]) * scale], [torch.ones(2)])
        move_along_([param], offsets, offset_sums(offsets)[0], 0.5)
        return param

    assert torch.equal(moved(1.0), moved(SCALE)) and not torch.equal(moved(1.0), torch.ones(2))


@pytest.mark.parametrize(
    "options", [{}, {"energy": False}, {"geometry": False}, {"energy": False, "geometry": False}], ids=str
)
def test_parameters_whose_gradient_stays_zero_come_to_rest(options: dict[str, Any]) -> None:
    # The momentum becomes so small that float32 rounds its squares to zero, later the momentum itself.
    p = nn.Parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
    optimizer = ARS2Neo([{"params": [p], "track": "matrix"}], betas=(0.5, 0.999), weight_decay=0.0, **options)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad.zero_()
    for _ in range(200):
        before = p.detach().clone()
        optimizer.step()
        torch.testing.assert_close(p.detach(), before, rtol=0, atol=0.02)
    assert torch.equal(p, before)


def test_the_second_gradient_is_to_be_unscaled_before_the_update_only() -> None:
    # The first gradients, still scaled, stay readable until then.
    model, optimizer = setup("sync")
    (model.loss(0) * SCALE).backward()
    found = copies(p.grad for p in model.parameters() if p.grad is not None)
    optimizer.wants_second_pass(grad_scale=SCALE)
    optimizer.perturb()
    assert same(found, [optimizer.first_gradients[p] for p in model.parameters()])
    optimizer.restore()


@pytest.mark.parametrize("mode", CORE_MODES)
def test_torch_grad_scaler_drives_both_passes_and_skips_steps(mode: str) -> None:
    model, optimizer = setup(mode)
    plain, plain_optimizer = setup(mode)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=SCALE, growth_interval=10**6)
    for step in range(12):
        skipped = step in (0, 5)
        optimizer.zero_grad()
        before = snapshot(optimizer)
        scaler.scale(model.loss(step)).backward()
        if optimizer.wants_second_pass(grad_scale=scaler.get_scale()):
            optimizer.perturb()
            scaler.scale(model.loss(step)).backward()
            optimizer.restore()
        if skipped:
            model.tall.weight.grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if skipped:
            after = snapshot(optimizer)
            before.pop("grads"), after.pop("grads")
            assert_identical(before, after)
        else:
            step_by_parts(plain, plain_optimizer, step)
    assert optimizer.diagnostics()["steps"] == 10
    assert_identical(snapshot(plain_optimizer), snapshot(optimizer))


@pytest.mark.parametrize("mode", ["sync", "aga"])
def test_an_overflow_of_the_first_gradient_is_restored_and_skipped(mode: str) -> None:
    model, optimizer = setup(mode)
    train(model, optimizer, range(2))
    before = snapshot(optimizer)
    optimizer.zero_grad()
    model.loss(2).backward()
    model.tall.weight.grad.fill_(float("inf"))
    if optimizer.wants_second_pass(grad_scale=SCALE):
        optimizer.perturb()
        model.loss(2).backward()
        optimizer.restore()
    # A scaler would skip the update here.
    after = snapshot(optimizer)
    before.pop("grads"), after.pop("grads")
    assert_identical(before, after)
    other, other_optimizer = setup(mode)
    train(other, other_optimizer, range(2))
    assert step_by_parts(model, optimizer, 2) == step_by_parts(other, other_optimizer, 2)
    assert_identical(snapshot(other_optimizer), snapshot(optimizer))


@pytest.mark.parametrize("mode", ["aga", "periodic"])
def test_infinities_of_both_signs_are_an_overflow_like_any_other(mode: str) -> None:
    model, optimizer = setup(mode)
    train(model, optimizer, range(2))
    before = snapshot(optimizer)
    optimizer.zero_grad()
    model.loss(2).backward()
    for index, gradient in enumerate(p.grad for p in model.parameters() if p.grad is not None):
        gradient.view(-1)[0] = float("inf") * (-1) ** index
    if optimizer.wants_second_pass(grad_scale=SCALE):
        optimizer.perturb()
        optimizer.restore()
    after = snapshot(optimizer)
    before.pop("grads"), after.pop("grads")
    assert_identical(before, after)


# --- autocast ---


class Autocast(SmallProblem):
    def loss(self, step: int) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().loss(step)


@pytest.mark.parametrize(("mode", "dtype"), [("base", torch.float32), ("sync", torch.float64), ("aga", torch.float32)])
def test_autocast_around_the_parts_changes_no_bit(mode: str, dtype: torch.dtype) -> None:
    def run(active: bool) -> dict[str, Any]:
        model, optimizer = setup(mode, dtype, "float32" if dtype == torch.float32 else "float64")
        around = torch.autocast("cpu", dtype=torch.bfloat16) if active else nullcontext()
        for step in range(10):
            optimizer.zero_grad()
            model.loss(step).backward()
            with around:
                again = optimizer.wants_second_pass()
            if again:
                with around:
                    optimizer.perturb()
                model.loss(step).backward()
                with around:
                    optimizer.restore()
            with around:
                optimizer.step()
        return snapshot(optimizer)

    assert_identical(run(False), run(True))


def test_autocast_around_muon_changes_no_bit() -> None:
    def run(active: bool) -> dict[str, Any]:
        model = SmallProblem()
        optimizer = Muon(problem_groups(model), ns_dtype="float32")
        for step in range(5):
            optimizer.zero_grad()
            model.loss(step).backward()
            with torch.autocast("cpu", dtype=torch.bfloat16) if active else nullcontext():
                optimizer.step()
        return snapshot(optimizer)

    assert_identical(run(False), run(True))


@pytest.mark.parametrize(("mode", "by_parts"), [("sync", False), ("aga", True)])
def test_one_autocast_block_around_both_passes_does_not_reuse_stale_weights(mode: str, by_parts: bool) -> None:
    # Autocast keeps the bfloat16 copies of the weights until its outermost block ends.
    outer_model, outer_optimizer = setup(mode)
    model = Autocast()
    optimizer = ARS2Neo(problem_groups(model), ns_dtype="float32", **MODES[mode])
    for step in range(6):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if by_parts:
                step_by_parts(outer_model, outer_optimizer, step)
            else:
                outer_optimizer.step(closure_of(outer_model, outer_optimizer, step))
        train(model, optimizer, [step])  # autocast within each pass, with a separate cache
    assert_identical(snapshot(optimizer), snapshot(outer_optimizer))


def test_in_one_autocast_block_a_forward_pass_sees_where_the_parameters_are() -> None:
    model, optimizer = setup("sync")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = model.loss(0)
        first.backward()
        optimizer.wants_second_pass()
        optimizer.perturb()
        assert model.loss(0).item() != first.item()
        optimizer.restore()
        assert model.loss(0).item() == first.item()
