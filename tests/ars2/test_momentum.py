"""Mode "momentum" takes the one gradient of a step at a point moved along the momentum."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ars2 import ARS2Neo, flatness
from ars2.schedule import Mode
from tests.ars2.problems import SmallProblem, gradients, problem_groups
from tests.ars2.reference import ReferenceARS2
from tests.ars2.training import (
    assert_identical,
    closure_of,
    copies,
    parameters_of,
    same,
    snapshot,
    split_into_chunks,
    step_by_parts,
    through_a_file,
    worst_difference,
)


def setup(
    rho: float = 0.2, mode: Mode = "momentum", dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[SmallProblem, ARS2Neo]:
    model = SmallProblem(dtype)
    groups = problem_groups(model, {"rho": rho}, {"rho": rho / 2})
    return model, ARS2Neo(groups, mode=mode, ns_dtype=str(dtype).removeprefix("torch."), **options)


@pytest.mark.parametrize(("rho", "options"), [(0.2, {}), (-0.3, {}), (-0.3, {"energy": False, "geometry": False})])
def test_float64_follows_the_reference(rho: float, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for relative in (False, True):
        model, optimizer = setup(rho, dtype=torch.float64, relative_rho=relative, **options)
        other = SmallProblem(torch.float64)
        groups = problem_groups(
            other, {"rho": rho, "relative_rho": relative}, {"rho": rho / 2, "relative_rho": relative}
        )
        reference = ReferenceARS2(groups, mode="momentum", **options)
        for step in range(10):
            assert not step_by_parts(model, optimizer, step)
            reference.step(partial(gradients, other, groups, step))
        assert worst_difference(model.parameters(), other.parameters()) <= 6e-15  # measured: 1e-15
        split_into_chunks(monkeypatch)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_move_is_uphill_or_ahead_along_the_descent_by_rho(sign: int) -> None:
    param = nn.Parameter(torch.tensor([[1.0, -2.0], [3.0, 4.0]], dtype=torch.float64))
    optimizer = ARS2Neo([param], lr=0.0, mode="momentum", rho=sign * 0.25, eps=1.0, betas=(0.5, 0.75))
    grads = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double(), torch.tensor([[-2.0, 1.0], [0.0, 5.0]]).double()]
    for grad in grads:
        for _ in optimizer.passes(nn.Module()):
            param.grad = grad.clone()
        optimizer.step()
    m = (0.5 * grads[0] + grads[1]) / 2 / (1 - 0.5**2)
    v = (0.75 * grads[0] ** 2 + grads[1] ** 2) / 4 / (1 - 0.75**2)
    n = m / (v.sqrt() + 1.0) * param.detach().abs()
    expected = param.detach() + sign * 0.25 * n / n.norm()
    optimizer.move_along_momentum()
    torch.testing.assert_close(param.detach(), expected, rtol=1e-14, atol=0)
    optimizer.restore()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_moves_from_the_second_step_on_and_is_restored_to_the_bit(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(dtype))
    optimizer = ARS2Neo([param], mode="momentum", rho=-3.0)
    for step in range(3):
        before = param.detach().clone()
        for _ in optimizer.passes(nn.Module()):
            assert torch.equal(param, before) == (step == 0)
            param.square().sum().backward()
        assert torch.equal(param, before)
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(param, before)
    assert optimizer.diagnostics()["gradient_evaluations"] == 3


def test_without_a_move_it_equals_base() -> None:
    (model, optimizer), (other, base) = setup(0.0), setup(0.0, "base")
    for step in range(4):
        step_by_parts(model, optimizer, step)
        step_by_parts(other, base, step)
    assert_identical(copies(model.parameters()), copies(other.parameters()))


def test_micro_batches_are_at_one_point_and_a_frozen_parameter_stays() -> None:
    ends = []
    for each in (False, True):
        model, optimizer = setup()
        for step in range(3):
            model.embedding.weight.requires_grad_(step < 2)
            before = copies(parameters_of(optimizer))
            optimizer.zero_grad()
            for batches in ((0,), (1,)) if each else ((0, 1),):
                for _ in optimizer.passes(model):
                    moved = [not torch.equal(a, b) for a, b in zip(before, parameters_of(optimizer), strict=True)]
                    assert sum(moved) == (0, 8, 7)[step]
                    for batch in batches:
                        model.loss(batch).backward()
            optimizer.step()
        ends.append(snapshot(optimizer))
    assert_identical(*ends)


def test_a_saved_state_resumes_to_the_bit() -> None:
    model, optimizer = setup()
    other, resumed = setup()
    for step in range(8):
        step_by_parts(model, optimizer, step)
        if step == 3:
            other.load_state_dict(through_a_file(model.state_dict()))
            resumed.load_state_dict(through_a_file(optimizer.state_dict()))
        if step > 3:
            step_by_parts(other, resumed, step)
    assert_identical(snapshot(optimizer), snapshot(resumed))


@pytest.mark.parametrize("leave", [ValueError, KeyboardInterrupt])
def test_a_failed_pass_leaves_the_step_to_be_made_again(leave: type[BaseException]) -> None:
    (model, optimizer), (other, undisturbed) = setup(), setup()
    step_by_parts(model, optimizer, 0)
    before = copies(model.parameters())
    with pytest.raises(leave):
        for _ in optimizer.passes(model):
            raise leave
    assert same(before, model.parameters())
    step_by_parts(model, optimizer, 1)
    for step in range(2):
        step_by_parts(other, undisturbed, step)
    assert_identical(snapshot(optimizer), snapshot(undisturbed))


def test_an_interrupted_move_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = setup()
    step_by_parts(model, optimizer, 0)
    before, real, moved = snapshot(optimizer), flatness.move_along_, []

    def interrupted(*arguments: Any) -> None:
        real(*arguments)
        moved.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(flatness, "move_along_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.move_along_momentum()
    assert moved
    assert_identical(before, snapshot(optimizer))
    optimizer.wants_second_pass()  # nothing is left moved


@pytest.mark.parametrize("kind", ["step", "closure", "wants", "perturb"])
def test_a_gradient_at_the_parameters_themselves_is_refused(kind: str) -> None:
    model, optimizer = setup()
    step_by_parts(model, optimizer, 0)

    def plain_step() -> None:
        if kind == "closure":
            optimizer.step(closure_of(model, optimizer, 1))
        closure_of(model, optimizer, 1)()
        assert kind == "step" or not optimizer.wants_second_pass()
        if kind == "perturb":
            optimizer.perturb()
            model.loss(1).backward()
            optimizer.restore()
        optimizer.step()

    before = copies(model.parameters())
    with pytest.raises(RuntimeError, match=r'mode "momentum" needs the gradient at moved parameters.*passes\(model\)'):
        plain_step()
    assert same(before, model.parameters())


def test_calls_out_of_order_are_refused() -> None:
    _, optimizer = setup()
    with pytest.raises(RuntimeError, match="needs mode \"momentum\", got 'base'"):
        setup(mode="base")[1].move_along_momentum()
    optimizer.move_along_momentum()
    calls: list[Callable[[], Any]] = [optimizer.move_along_momentum, optimizer.step, optimizer.wants_second_pass]
    for call in calls:
        with pytest.raises(RuntimeError, match="while the parameters are moved: call restore"):
            call()
    optimizer.restore()


def test_only_this_mode_takes_a_negative_rho() -> None:
    param: Tensor = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"rho must be a number in \[0, inf\), got -0.1"):
        ARS2Neo([param], mode="sync", rho=-0.1)
    with pytest.raises(ValueError, match=r"rho must be a number in \(-inf, inf\), got nan"):
        ARS2Neo([param], mode="momentum", rho=float("nan"))
