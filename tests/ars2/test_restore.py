"""Restoring from the adversarial point is exact to the bit.

It happens on every way out, and the next step is the one of a run without the failure.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ars2 import ARS2Neo, flatness
from tests.ars2.problems import SmallProblem
from tests.ars2.training import (
    assert_identical,
    closure_of,
    copies,
    parameters_of,
    same,
    setup,
    snapshot,
    split_into_chunks,
    train,
)


@pytest.fixture(autouse=True, params=[None, 7], ids=["full tensors", "chunks"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Set the entries of the chunks that tensors are split into.

    Every test runs without and with them.
    """
    numel: int | None = request.param
    if numel is not None:
        split_into_chunks(monkeypatch, numel)
    return numel


class Failing(SmallProblem):
    """Raise in the forward pass, the given number of passes from now."""

    passes_left = -1
    error: BaseException = RuntimeError("in forward")

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        self.passes_left -= 1
        if self.passes_left == 0:
            raise self.error
        return super().forward(images, tokens)


def fail_in_forward(model: Failing, optimizer: ARS2Neo, step: int, error: BaseException) -> Callable[[], Tensor]:
    model.passes_left, model.error = 2, error
    return closure_of(model, optimizer, step)


def fail_after_backward(model: Failing, optimizer: ARS2Neo, step: int, error: BaseException) -> Callable[[], Tensor]:
    calls: list[int] = []
    closure_without_error = closure_of(model, optimizer, step)

    def closure() -> Tensor:
        loss = closure_without_error()
        calls.append(1)
        if len(calls) == 2:
            raise error
        return loss

    return closure


def fail_within_backward(model: Failing, optimizer: ARS2Neo, step: int, error: BaseException) -> Callable[[], Tensor]:
    """Fail where the later layers have a second gradient, the earlier ones do not."""
    calls: list[int] = []

    def hook(_: Tensor) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise error

    handle = model.tall.weight.register_hook(hook)
    closure_without_error = closure_of(model, optimizer, step)

    def closure() -> Tensor:
        try:
            return closure_without_error()
        finally:
            if len(calls) == 2:
                handle.remove()

    return closure


def failing(mode: str) -> tuple[Failing, ARS2Neo]:
    like, optimizer = setup(mode)
    model = Failing()
    # The same optimizer class and options over the parameters of the failing model.
    groups = [{**group, "params": []} for group in optimizer.param_groups]
    names = {p: name for name, p in like.named_parameters()}
    parameters = dict(model.named_parameters())
    for group, source in zip(groups, optimizer.param_groups, strict=True):
        group["params"] = [parameters[names[p]] for p in source["params"]]
    return model, ARS2Neo(groups, **{name: optimizer.defaults[name] for name in ("mode", "k", "ns_dtype")})


# All of these modes make a second pass in the first step.
@pytest.mark.parametrize(
    ("mode", "way_out", "error"),
    [
        ("sync", fail_in_forward, ValueError("x")),
        ("sync", fail_within_backward, KeyboardInterrupt()),
        ("sync", fail_after_backward, SystemExit(3)),
        ("aga", fail_in_forward, KeyboardInterrupt()),
        ("aga", fail_within_backward, ValueError("x")),
        ("periodic", fail_after_backward, GeneratorExit()),
    ],
)
def test_an_error_in_the_second_pass_leaves_everything_as_after_the_first(
    mode: str, way_out: Callable[..., Any], error: BaseException
) -> None:
    model, optimizer = failing(mode)
    undisturbed, undisturbed_optimizer = failing(mode)
    first_gradients: list[Tensor] = []
    # The first evaluation gives the expected gradients.
    undisturbed.loss(0).backward()
    first_gradients = [p.grad.clone() for p in parameters_of(undisturbed_optimizer) if p.grad is not None]
    undisturbed_optimizer.zero_grad()
    before = snapshot(optimizer)

    with pytest.raises(type(error)):
        optimizer.step(way_out(model, optimizer, 0, error))

    after = snapshot(optimizer)
    assert same(after.pop("grads"), first_gradients)
    before.pop("grads")
    assert_identical(before, after)
    assert not optimizer.first_gradients
    # The same batch again, and on: as a run that never failed.
    train(model, optimizer, range(4))
    train(undisturbed, undisturbed_optimizer, range(4))
    assert_identical(snapshot(undisturbed_optimizer), snapshot(optimizer))


def test_a_gradient_that_only_the_failed_second_pass_computed_is_removed() -> None:
    used, unused = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    optimizer = ARS2Neo([used, unused], mode="sync")
    calls: list[int] = []

    def closure() -> None:
        optimizer.zero_grad()
        calls.append(1)
        (used.square().sum() + (unused.square().sum() if len(calls) == 2 else 0)).backward()
        if len(calls) == 2:
            raise ValueError

    with pytest.raises(ValueError):
        optimizer.step(closure)
    assert torch.equal(used.grad, torch.full((3, 3), 2.0)) and unused.grad is None


@pytest.mark.parametrize("where", ["perturb", "restore"])
def test_an_interrupt_within_the_moves_themselves_restores(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ctrl-C may arrive at any line. Both moves end with this call, so it represents a late interrupt.
    model, optimizer = setup("sync")
    train(model, optimizer, range(2))
    before = copies(model.parameters())
    calls: list[int] = []

    def interrupted() -> None:
        calls.append(1)
        if len(calls) == (1 if where == "perturb" else 2):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "clear_autocast_cache", interrupted)
        optimizer.step(closure_of(model, optimizer, 2))
    assert same(before, model.parameters())
    assert all(p.grad is not None for p in model.parameters())
    train(model, optimizer, range(2, 4))
    undisturbed, undisturbed_optimizer = setup("sync")
    train(undisturbed, undisturbed_optimizer, range(4))
    assert_identical(snapshot(undisturbed_optimizer), snapshot(optimizer))


def test_an_interrupt_in_the_middle_of_copying_back_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = setup("sync")
    before = copies(model.parameters())
    real = torch._foreach_copy_
    calls: list[int] = []

    def interrupted(targets: list[Tensor], sources: list[Tensor]) -> None:
        calls.append(1)
        if len(calls) == 2:  # the first group is back, the second is not
            raise KeyboardInterrupt
        real(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure_of(model, optimizer, 0))
    assert same(before, model.parameters())


def test_a_perturbation_that_fails_halfway_is_undone() -> None:
    first, second = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    table = nn.Embedding(4, 3, sparse=True)
    optimizer = ARS2Neo([{"params": [first]}, {"params": [second, table.weight]}], mode="sync")
    (first.sum() + second.sum() + table(torch.tensor([1])).sum()).backward()
    gradients = [first.grad, second.grad]
    with pytest.raises(RuntimeError, match="sparse"):
        if optimizer.wants_second_pass():
            optimizer.perturb()
    assert torch.equal(first, torch.ones(3, 3)) and first.grad is gradients[0] and second.grad is gradients[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_restoring_is_exact_to_the_bit_whatever_the_values(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-6, 4, 64, dtype=torch.float64)
    values = (torch.randn(64, 64, dtype=torch.float64, generator=generator) * scales).to(dtype)
    values[0, 0], values[1, 1] = -0.0, torch.finfo(dtype).tiny
    param = nn.Parameter(values.clone())
    optimizer = ARS2Neo([param], rho=1e6, mode="sync")
    param.grad = torch.randn(64, 64, dtype=torch.float64, generator=generator).to(dtype)
    optimizer.wants_second_pass()
    optimizer.perturb()
    assert not torch.equal(param, values)
    optimizer.restore()
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(param.detach().view(bits), values.view(bits))


def test_restore_depends_on_what_was_moved_and_not_on_gradients() -> None:
    # A gradient that comes or goes between the passes must not decide what is moved back.
    first, second, third = (nn.Parameter(torch.full((3, 3), v)) for v in (1.0, 2.0, 3.0))
    optimizer = ARS2Neo([first, second, third], mode="sync")
    (first.square().sum() + second.square().sum()).backward()
    optimizer.wants_second_pass()
    optimizer.perturb()
    assert not torch.equal(first, torch.ones(3, 3)) and not torch.equal(second, torch.full((3, 3), 2.0))
    assert torch.equal(third, torch.full((3, 3), 3.0))
    (second.square().sum() + third.square().sum()).backward()
    optimizer.restore()
    assert [p[0, 0].item() for p in (first, second, third)] == [1.0, 2.0, 3.0]
    optimizer.step()
    assert first[0, 0].item() == 1.0 and second[0, 0].item() < 2.0 and third[0, 0].item() < 3.0


def test_parameter_values_set_in_the_second_pass_are_discarded() -> None:
    model, optimizer = setup("sync")
    before = copies(model.parameters())
    model.loss(0).backward()
    optimizer.wants_second_pass()
    optimizer.perturb()
    with torch.no_grad():
        model.tall.weight.zero_()
    optimizer.restore()
    assert same(before, model.parameters())


def test_storage_replaced_in_the_second_pass_is_discarded() -> None:
    param = nn.Parameter(torch.arange(1.0, 26.0).view(5, 5))
    before = param.detach().clone()
    optimizer = ARS2Neo([param], mode="sync")
    param.grad = torch.ones(5, 5)
    optimizer.wants_second_pass()
    optimizer.perturb()
    param.data = torch.zeros(5, 5)
    optimizer.restore()
    assert torch.equal(param, before)


@pytest.mark.parametrize("moves", [1, 2])
def test_an_interrupt_between_two_chunks_leaves_none_of_them_moved(
    moves: int, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    param = nn.Parameter(torch.arange(1.0, 26.0).view(5, 5))
    before = param.detach().clone()
    optimizer = ARS2Neo([param], mode="sync")
    param.grad = torch.ones(5, 5)
    real = flatness.move_along_
    moved: list[int] = []

    def interrupted(params: list[Tensor], offsets: list[Tensor], *rest: Any) -> None:
        real(params, offsets, *rest)
        moved.append(params[0].numel())
        if len(moved) == moves or chunk is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(flatness, "move_along_", interrupted)
    optimizer.wants_second_pass()
    with pytest.raises(KeyboardInterrupt):
        optimizer.perturb()
    assert moved == ([25] if chunk is None else [chunk] * moves)
    assert torch.equal(param, before)
