"""Each parameter has a separate step count.

A parameter that is unfrozen later starts as if it were alone.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ars2 import ARS2Neo, Muon
from tests.ars2.training import copies

OPTIMIZERS: dict[str, tuple[type, dict[str, Any]]] = {
    "base": (ARS2Neo, {"mode": "base"}),
    "sync": (ARS2Neo, {"mode": "sync", "rho": 0.05}),
    "no geometry": (ARS2Neo, {"mode": "base", "geometry": False}),
    "capturable": (ARS2Neo, {"mode": "base", "capturable": True}),
    "muon": (Muon, {}),
}
LATE = 30  # steps before the second parameter has a gradient


def train(name: str, shape: tuple[int, ...], early: bool, compile: bool = False) -> tuple[Tensor, ARS2Neo | Muon]:
    """Return a parameter that has gradients in 10 steps.

    If ``early``, another parameter has gradients in ``LATE`` steps before.
    """
    cls, options = OPTIMIZERS[name]
    generator = torch.Generator().manual_seed(0)
    late, other = (nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(2))
    track = "matrix" if len(shape) > 1 else "vector"
    params = [other, late] if early else [late]
    optimizer: ARS2Neo | Muon = cls(
        [{"params": params, "track": track}], ns_dtype="float32", compile=compile, **options
    )

    def step(number: int, active: nn.Parameter) -> None:
        target = torch.randn(shape, generator=torch.Generator().manual_seed(number))

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (active - target).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    for number in range(LATE if early else 0):
        step(number, other)
    for number in range(LATE, LATE + 10):
        step(number, late)
    return late.detach(), optimizer


@pytest.mark.parametrize(("name", "shape"), [*((name, (5, 4)) for name in OPTIMIZERS), ("sync", (5,)), ("muon", (5,))])
def test_a_parameter_whose_gradients_begin_later_moves_as_if_alone(name: str, shape: tuple[int, ...]) -> None:
    late, optimizer = train(name, shape, early=True)
    alone, _ = train(name, shape, early=False)
    assert torch.allclose(late, alone, rtol=1e-6, atol=1e-7)
    if "step" in optimizer.state[optimizer.param_groups[0]["params"][0]]:
        assert [state["step"].item() for state in optimizer.state.values()] == [LATE, 10]
    assert optimizer.param_groups[0]["step"] == LATE + 10


@pytest.mark.parametrize("cls", [ARS2Neo, Muon])
def test_vectors_with_alternating_gradients_follow_adamw(cls: type) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(4)) for _ in range(3)]
    adamw_params = [nn.Parameter(p.detach().clone()) for p in params]
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    optimizer = cls([{"params": params, "track": "vector"}], **options, **({"mode": "base"} if cls is ARS2Neo else {}))
    adamw = torch.optim.AdamW(adamw_params, **options)
    for step in range(40):
        for index, (p, q) in enumerate(zip(params, adamw_params, strict=True)):
            p.grad = None if step % (index + 1) else torch.randn(4)
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        adamw.step()
    assert all(torch.allclose(p, q, rtol=1e-6, atol=1e-7) for p, q in zip(params, adamw_params, strict=True))
    for p, q in zip(params, adamw_params, strict=True):
        assert optimizer.state[p]["step"] == adamw.state[q]["step"]


def test_a_state_without_counts_takes_those_of_its_group() -> None:
    _, optimizer = train("base", (5, 4), early=False)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        del state["step"]
    _, other = train("base", (5, 4), early=False)
    other.load_state_dict(saved)
    assert [state["step"].item() for state in other.state.values()] == [10]
    assert copies([state["step"] for state in other.state.values()])[0].device.type == "cpu"
