"""Every optimizer that a run may use passes the same checks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer

from ars2 import ARS2Neo, Muon, param_groups
from tests.ars2.training import (
    CORE_MODES,
    MODES,
    assert_identical,
    copies,
    parameters_of,
    same,
    snapshot,
    through_a_file,
)

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    **{f"ARS2Neo, {name}": partial(ARS2Neo, **MODES[name]) for name in (*CORE_MODES, "periodic", "random")},
    "Muon": Muon,
    "AdamW": AdamW,
}


class Model(nn.Module):
    """Combine parameters of every role and kind.

    It has an embedding tied to the head, both convolutions, a norm, a frozen layer, and a layer that not every pass
    uses.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(9, 6)
        self.mix = nn.Conv1d(6, 6, 3, padding=1)
        self.image = nn.Conv2d(1, 6, (1, 6))
        self.norm = nn.LayerNorm(6)
        self.heads = nn.Parameter(torch.empty(2, 3, 6))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.sometimes = nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embedding.weight
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
        self.to(dtype)

    def loss(self, step: int) -> Tensor:
        tokens = (torch.arange(20).reshape(4, 5) * (step % 3 + 1) + step) % 9
        x = self.embedding(tokens)
        x = x + self.mix(x.mT).mT + self.image(x[:, None])[..., 0].mT
        if step % 2 == 0:
            x = x + torch.tanh(self.sometimes(x))
        x = x + torch.einsum("btc,hrc->bthr", self.frozen(self.norm(x)), self.heads).flatten(2)
        return functional.cross_entropy(self.head(x).flatten(0, 1), tokens.roll(1, 1).flatten())


def new(name: str, policy: Any = "hidden", dtype: torch.dtype = torch.float32) -> tuple[Model, Optimizer]:
    model = Model(dtype)
    groups = param_groups(model, policy, matrix={"lr": 0.01}, vector={"lr": 0.02, "weight_decay": 0.01})
    return model, OPTIMIZERS[name](groups)


def advance(model: Model, optimizer: Optimizer, steps: range) -> None:
    for step in steps:

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = model.loss(step)
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize(("name", "policy"), [*((name, "hidden") for name in OPTIMIZERS), ("ARS2Neo, aga", "all")])
def test_every_trainable_parameter_is_covered_once_and_trained(name: str, policy: str) -> None:
    model, optimizer = new(name, policy)
    covered, trainable = parameters_of(optimizer), [p for p in model.parameters() if p.requires_grad]
    assert len(covered) == len(trainable) and set(covered) == set(trainable)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    advance(model, optimizer, range(2))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(optimizer.state) == set(trainable)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_falls(name: str) -> None:
    model, optimizer = new(name)
    before = sum(model.loss(step).item() for step in range(6))
    advance(model, optimizer, range(40))
    assert sum(model.loss(step).item() for step in range(6)) < 0.7 * before


@pytest.mark.parametrize(
    ("name", "steps", "dtype"),
    [
        *((name, 6, torch.float32) for name in OPTIMIZERS),
        ("ARS2Neo, aga", 1, torch.bfloat16),
        ("ARS2Neo, sync", 6, torch.bfloat16),
        ("Muon", 6, torch.bfloat16),
    ],
)
def test_resume_from_a_file_is_no_interruption(name: str, steps: int, dtype: torch.dtype) -> None:
    model, optimizer = new(name, dtype=dtype)
    advance(model, optimizer, range(steps))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other, other_optimizer = new(name, dtype=dtype)
    other.load_state_dict(saved["model"])
    other_optimizer.load_state_dict(saved["optimizer"])
    advance(model, optimizer, range(steps, steps + 5))
    advance(other, other_optimizer, range(steps, steps + 5))
    assert_identical(snapshot(optimizer), snapshot(other_optimizer))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_runs_are_the_same_to_the_bit(name: str) -> None:
    (model, optimizer), (other, other_optimizer) = new(name), new(name)
    advance(model, optimizer, range(6))
    advance(other, other_optimizer, range(6))
    assert_identical(snapshot(optimizer), snapshot(other_optimizer))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_are_left_as_the_last_backward_made_them(name: str) -> None:
    model, optimizer = new(name)
    for step in range(4):
        found: list[tuple[Tensor, Tensor | None, Tensor | None]] = []

        def closure(step: int = step, found: list = found) -> None:
            optimizer.zero_grad()
            model.loss(step).backward()
            found[:] = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]

        optimizer.step(closure)
        assert all(p.grad is grad for p, grad, _ in found)
        assert all(grad is None or torch.equal(grad, values) for _, grad, values in found)
        assert any(grad is None for _, grad, _ in found) and any(grad is not None for _, grad, _ in found)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_without_a_gradient_stays_and_keeps_its_state(name: str) -> None:
    model, optimizer = new(name)
    advance(model, optimizer, range(1))
    idle = list(model.sometimes.parameters())
    before = copies([*idle, *(t for p in idle for t in optimizer.state[p].values())])
    advance(model, optimizer, range(1, 2))
    assert same(before, [*idle, *(t for p in idle for t in optimizer.state[p].values())])
    advance(model, optimizer, range(2, 3))
    assert not same(before[:2], idle)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_error_in_the_closure_changes_nothing(name: str) -> None:
    model, optimizer = new(name)
    advance(model, optimizer, range(3))
    before = snapshot(optimizer)
    before.pop("grads")
    for failing_call in (1, 2):
        calls: list[int] = []

        def closure(calls: list[int] = calls, failing_call: int = failing_call) -> None:
            calls.append(1)
            if len(calls) == failing_call:
                raise KeyboardInterrupt
            optimizer.zero_grad()
            model.loss(3).backward()
            if failing_call == 2 and not name.startswith("ARS2Neo"):
                raise KeyboardInterrupt  # there is no second evaluation to fail in

        try:
            optimizer.step(closure)
        except KeyboardInterrupt:
            after = snapshot(optimizer)
            after.pop("grads")
            assert_identical(before, after)
        else:
            assert len(calls) == 1 < failing_call, "an error was swallowed"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rate_zero_changes_no_parameter(name: str) -> None:
    model, optimizer = new(name)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copies(model.parameters())
    advance(model, optimizer, range(4))
    assert same(before, model.parameters())
