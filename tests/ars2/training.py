"""Drive an optimizer in the tests.

The module has the modes with their options, closures, steps by separate calls, and comparisons.
"""

import io
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from ars2 import ARS2Neo, chunks
from ars2.replay import first_pass
from tests.ars2.problems import SmallProblem, problem_groups

# Every mode with options under which it does all that it can do within a few dozen steps of the small problem: AGA's
# decisions are then taken with a margin that float32 cannot close.
MODES: dict[str, dict[str, Any]] = {
    "base": {"mode": "base"},
    "sync": {"mode": "sync"},
    "aga": {"mode": "aga", "k": 6, "phi_lambda": 2.0},
    "periodic": {"mode": "periodic", "k": 3},
    "periodic, k=1": {"mode": "periodic", "k": 1},
    "random": {"mode": "random", "probability": 0.3, "seed": 5},
    "late": {"mode": "late", "late_start": 0.3, "total_steps": 10},
}
TWO_PASS_MODES = [name for name in MODES if name != "base"]
SHEAR_MODES = ["aga", "periodic", "random"]
# One mode of every kind, where only the kind matters: one pass, two, and two at some steps with a shear force between.
CORE_MODES = ["base", "sync", "aga"]


def setup(
    mode: str = "sync", dtype: torch.dtype = torch.float32, ns_dtype: str = "float32", **options: Any
) -> tuple[SmallProblem, ARS2Neo]:
    """Return the small problem and an ARS2Neo over its two tracks.

    The mode is one of the table above.
    """
    model = SmallProblem(dtype)
    return model, ARS2Neo(problem_groups(model), ns_dtype=ns_dtype, **{**MODES[mode], **options})


def split_into_chunks(monkeypatch: pytest.MonkeyPatch, numel: int = 7) -> None:
    """Split tensors with more than ``numel`` entries into flat chunks.

    The optimizer then works tensor by tensor.
    """
    monkeypatch.setattr(chunks, "_CHUNK_NUMEL", numel)


def closure_of(model: SmallProblem, optimizer: Optimizer, step: int) -> Callable[[], Tensor]:
    """Return the standard closure for the batch of `step` (from 0)."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(step)
        loss.backward()
        return loss

    return closure


def train(model: SmallProblem, optimizer: Optimizer, steps: Iterable[int]) -> None:
    """Make complete steps, by closure."""
    for step in steps:
        optimizer.step(closure_of(model, optimizer, step))


def step_by_parts(
    model: SmallProblem,
    optimizer: ARS2Neo,
    step: int,
    between: Callable[[], None] = lambda: None,
    loss_scale: float = 1.0,
) -> bool:
    """Make one step by separate calls; return whether there was a second pass.

    `between` runs before the update.
    """
    optimizer.zero_grad()
    with first_pass(optimizer, model):
        (model.loss(step) * loss_scale).backward()
    again = optimizer.wants_second_pass(grad_scale=loss_scale)
    if again:
        optimizer.perturb()
        try:
            (model.loss(step) * loss_scale).backward()
        finally:
            optimizer.restore()
    between()
    optimizer.step()
    return again


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def same(left: Iterable[Tensor], right: Iterable[Tensor]) -> bool:
    """Return whether tensors are equal to the bit, dtypes included."""
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(left, right, strict=True))


def snapshot(optimizer: Optimizer) -> dict[str, Any]:
    """Copy all that a step may change.

    That is parameters, gradients, state, and the groups' numbers.
    """
    params = parameters_of(optimizer)
    return {
        "params": copies(params),
        "grads": [None if p.grad is None else p.grad.clone() for p in params],
        **deepcopy(optimizer.state_dict()),
    }


def assert_identical(left: Any, right: Any, where: str = "") -> None:
    """Assert that two nested structures are equal to the bit.

    They may have tensors and plain values.
    """
    assert type(left) is type(right), f"{where}: {type(left)} against {type(right)}"
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_identical(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_identical(*pair, f"{where}[{index}]")
    else:
        assert left == right, f"{where}: {left} against {right}"


def through_a_file(saved: Any) -> Any:
    """Save, and read back by the loader that accepts tensors and plain values only."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def worst_difference(left: Iterable[Tensor], right: Iterable[Tensor]) -> float:
    """Return the largest absolute difference of any entry, computed in float64."""
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(left, right, strict=True))
