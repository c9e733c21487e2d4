"""Cautious weight decay, and a weight decay that changes between steps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ars2 import ARS2Neo, Muon
from tests.ars2.training import worst_difference

LR, DECAY = 0.1, 0.5
KINDS = [(ARS2Neo, "matrix"), (ARS2Neo, "vector"), (Muon, "matrix"), (Muon, "vector")]


def one_step(cls: Any, track: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Tensor, Tensor]:
    """Return a parameter before and after its first step."""
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(5, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    param = nn.Parameter(start.clone())
    param.grad = gradient
    cls([{"params": [param], "track": track}], lr=LR, ns_dtype="float64", **options).step()
    return start.double(), param.detach().double()


@pytest.mark.parametrize(("cls", "track"), KINDS)
def test_only_entries_that_move_towards_zero_decay(cls: Any, track: str) -> None:
    start, undecayed = one_step(cls, track, weight_decay=0.0, cautious=True)
    _, cautious = one_step(cls, track, weight_decay=DECAY, cautious=True)
    _, plain = one_step(cls, track, weight_decay=DECAY)
    towards_zero = (undecayed - start) * start < 0
    assert towards_zero.any() and not towards_zero.all()
    torch.testing.assert_close(cautious, torch.where(towards_zero, plain, undecayed), rtol=0, atol=1e-15)
    assert (plain - undecayed).abs().min() > 0


@pytest.mark.parametrize(("cls", "track"), KINDS)
def test_entries_that_the_update_does_not_move_decay(cls: Any, track: str) -> None:
    param = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
    param.grad = torch.zeros(3, 4, dtype=torch.float64)
    cls([{"params": [param], "track": track}], lr=LR, weight_decay=DECAY, cautious=True).step()
    torch.testing.assert_close(param, torch.full_like(param, 1 - LR * DECAY), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("cls", "track"), KINDS)
def test_without_weight_decay_caution_changes_nothing(cls: Any, track: str) -> None:
    moved = [one_step(cls, track, weight_decay=0.0, cautious=cautious)[1] for cautious in (True, False)]
    assert worst_difference(moved[:1], moved[1:]) <= 1e-15


@pytest.mark.parametrize(("cls", "track"), KINDS)
def test_in_half_precision_the_rounded_result_is_that_of_float32(cls: Any, track: str) -> None:
    options = {"weight_decay": DECAY, "cautious": True}
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(5, 8, generator=generator).bfloat16() for _ in range(2))
    ends = []
    for dtype in (torch.bfloat16, torch.float32):
        param = nn.Parameter(start.clone().to(dtype))
        optimizer = cls([{"params": [param], "track": track}], lr=LR, ns_dtype="float32", **options)
        for _ in range(4):
            param.grad = gradient.to(dtype)
            optimizer.step()
        ends.append(param.detach().to(torch.bfloat16))
    assert torch.equal(*ends)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [ARS2Neo, Muon])
def test_a_compiled_cautious_step_equals_the_eager_one(cls: Any) -> None:
    options = {"weight_decay": DECAY, "cautious": True}
    for track in ("matrix", "vector"):
        compiled, eager = (one_step(cls, track, torch.float32, compile=c, **options)[1] for c in (True, False))
        assert worst_difference([compiled], [eager]) < 1e-6


@pytest.mark.parametrize(("cls", "track"), KINDS)
def test_a_weight_decay_that_follows_the_learning_rate_takes_effect(cls: Any, track: str) -> None:
    param = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
    optimizer = cls([{"params": [param], "track": track}], lr=LR, weight_decay=DECAY)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    expected = 1.0
    for step in range(3):
        for group in optimizer.param_groups:
            group["weight_decay"] = DECAY * group["lr"] / group["initial_lr"]
        param.grad = torch.zeros_like(param)
        optimizer.step()
        scheduler.step()
        expected *= 1 - LR * 0.5**step * DECAY * 0.5**step
        torch.testing.assert_close(param.detach(), torch.full_like(param, expected), rtol=1e-14, atol=0)
