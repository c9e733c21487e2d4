"""Adjusted learning rates equal torch.optim.Muon's, or match the size of AdamW's steps."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from ars2 import ARS2Neo, Muon
from tests.ars2.reference import reference_newton_schulz
from tests.ars2.training import worst_difference

CONVENTIONS = ("original", "match_rms_adamw")
SHAPES = ((6, 20), (20, 6), (9, 9))  # wide, tall and square
LR = 0.03


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)


def difference_from_torch(dtype: torch.dtype, ns_dtype: str, **options: Any) -> float:
    ours, theirs = parameters(*SHAPES, dtype=dtype), parameters(*SHAPES, dtype=dtype)
    shared: dict[str, Any] = {"lr": LR, "momentum": 0.9, "weight_decay": 0.2, "ns_steps": 4, **options}
    optimizers = [Muon(ours, ns_dtype=ns_dtype, **shared), torch.optim.Muon(theirs, **shared)]
    for step in range(6):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(params, step)
            optimizer.step()
    return worst_difference(ours, theirs)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_muon_equals_that_of_torch(convention: Any, nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"adjust_lr_fn": convention, "nesterov": nesterov}
    # Products in bfloat16, which torch always has, round a step of about lr by a few percent; measured: 1.3e-3.
    assert difference_from_torch(torch.float32, "bfloat16", **options) <= 5e-3
    # With exact products instead, only the rounding of the parameters is left; measured: 6.7e-16.
    monkeypatch.setattr(
        torch.optim._muon, "_zeropower_via_newtonschulz", lambda g, abc, steps, eps: reference_newton_schulz(g, steps)
    )
    assert difference_from_torch(torch.float64, "float64", **options) <= 3e-15


@pytest.mark.parametrize(
    ("shape", "flatten"), [((6, 20), False), ((20, 6), False), ((3, 4, 7), False), ((3, 4, 7), True)]
)
def test_a_matched_step_is_as_long_as_that_of_adamw(shape: tuple[int, ...], flatten: bool) -> None:
    params = [parameters(shape)[0] for _ in range(3)]
    groups = [
        {"params": params[:1], "adjust_lr_fn": "match_rms_adamw", "flatten": flatten},
        {"params": params[1:2], "flatten": flatten},
    ]
    # Twenty exact steps take all singular values to 1.
    exact: dict[str, Any] = {"ns_dtype": "float64", "ns_coefficients": "polar_express", "ns_steps": 20}
    optimizer = ARS2Neo(groups, lr=LR, weight_decay=0.0, **exact)
    adamw = torch.optim.AdamW(params[2:], lr=LR, weight_decay=0.0)
    for step in range(3):
        before = [param.detach().clone() for param in params]
        for param in params:
            set_gradients([param], step)
        optimizer.step()
        adamw.step()
        matched, original, adam = ((p - b).norm().item() for p, b in zip(params, before, strict=True))
        assert matched == pytest.approx(adam, rel=1e-12)
        matrices, rows, cols = (1, shape[0], math.prod(shape[1:])) if len(shape) == 2 or flatten else shape
        assert original == pytest.approx(adam * math.sqrt(matrices * min(rows, cols)), rel=1e-12)


def test_each_group_may_have_another_convention() -> None:
    params = parameters((4, 9), (4, 9))
    params[1].data.copy_(params[0].data)
    before = params[0].detach().clone()
    groups = [{"params": [param], "adjust_lr_fn": name} for param, name in zip(params, CONVENTIONS, strict=True)]
    optimizer = ARS2Neo(groups, lr=LR, weight_decay=0.0, ns_dtype="float64")
    for param in params:
        set_gradients([param], 0)
    optimizer.step()
    moves = [param.detach() - before for param in params]
    torch.testing.assert_close(moves[0], 2 * moves[1], rtol=1e-12, atol=1e-15)
