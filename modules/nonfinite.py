"""Losses and gradients that are not finite: one look a step at all of them, and a sentence that names the first."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ars2.replay import Buffers
from ars2.sharded import local
from experiment.library_internals import sparse_values

# Fifteen skipped steps below a scale of one: no scale makes these gradients finite.
SMALLEST_SCALE = 2.0**-15


def gradients_of(optimizer: Optimizer) -> dict[Tensor, Tensor]:
    """Return the gradients that the optimizer would update from, by parameter, as dense tensors of any strides.

    Of sharded ones it is what this process holds, of sparse ones their values; an empty one is left out.
    """
    params = (param for group in optimizer.param_groups for param in group["params"])
    found = {p: sparse_values(p.grad) if p.grad.is_sparse else local(p.grad) for p in params if p.grad is not None}
    return {param: gradient for param, gradient in found.items() if gradient.numel()}


def all_finite(losses: Sequence[Tensor], gradients: list[Tensor]) -> Tensor:
    """Return whether every loss and every gradient is finite, a tensor on their device, which is not read.

    The gradients are looked at through their norms, which costs a small part of the update and needs one fused kernel.
    A gradient whose square overflows counts as not finite: it would make a second moment infinite for good.

    Args:
        losses: scalars.
        gradients: of any shapes, on one device with the losses.
    """
    dtypes = (tensor.dtype for tensor in (*losses, *gradients))
    dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
    lengths = torch._foreach_norm(gradients, 2, dtype=dtype) if gradients else ()
    seen = torch.stack([*(loss.to(dtype) for loss in losses), *lengths])
    return seen.isfinite().all()


def describe(
    network: nn.Module, passes: Iterable[tuple[str, Sequence[Tensor], Mapping[Tensor, Tensor]]], where: str
) -> str:
    """Return the sentence on the first thing that is not finite.

    Args:
        network: whose parameters are named.
        passes: of each pass, in their order, its name, its losses and its gradients by parameter.
        where: the step and epoch.
    """
    for name, losses, gradients in passes:
        found = [f"the loss is {value}" for value in (loss.item() for loss in losses) if not math.isfinite(value)][:1]
        bad = [key for key, p in network.named_parameters() if p in gradients and not all_finite([], [gradients[p]])]
        if bad:
            found.append(f"the gradient of {bad[0]} is not finite{_also(len(bad) - 1)}")
        if found:
            return (
                f"{where}, {name} pass: {' and '.join(found)}; the step was not made: lower the learning rate, clip"
                " the gradient (gradient_clip_val), look at the data, or leave such steps out (nonfinite: skip)"
            )
    return f"{where}: a loss or gradient of another process is not finite; the step was not made"


def _also(others: int) -> str:
    return f" (nor are those of {others} more parameters)" if others else ""


def lower_scale(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> bool:
    """Let ``scaler`` see this step's gradients as they are known to be; say whether no scale makes them finite."""
    gradients = gradients_of(optimizer)
    if not gradients:
        return False
    # One of another process or of the first pass may be the one that is not finite.
    gradient = next(iter(gradients.values()))
    gradient[(0,) * gradient.ndim] = math.inf  # in place, whatever its strides
    # Not through the optimizer's step: nobody is to take this for one.
    scaler.unscale_(optimizer)
    scaler.update()
    return scaler.get_scale() < SMALLEST_SCALE


class StepRecord:
    """What tells of one optimizer step that it was not finite, and why; and what the step must give back then.

    Attributes:
        losses: of the first and of the second pass, one a batch, scalars.
    """

    losses: tuple[list[Tensor], list[Tensor]]

    def __init__(self) -> None:
        self._buffers: Buffers | None = None
        self._buffers_between: Buffers | None = None

    def begin(self, network: nn.Module) -> None:
        """Forget the last step; ``network`` is the same each time, on the device where it is trained."""
        self.losses = [], []
        self._buffers = self._buffers or Buffers(network)
        self._buffers.save()

    def frozen_statistics(self, network: nn.Module) -> AbstractContextManager[None]:
        """Leave the buffers of ``network``, such as running statistics, alone in a block: that of the second pass."""
        self._buffers_between = self._buffers_between or Buffers(network)
        return self._buffers_between.unchanged()

    def restore_batchnorm(self) -> None:
        """Make the buffers, such as running statistics, what they were when the step began."""
        if self._buffers is not None:
            self._buffers.restore()

    def is_finite(self, optimizer: Any) -> Tensor:
        """Look, once a step and before anything is updated, at the losses and gradients of both passes.

        Returns:
            A boolean scalar on the device.
        """
        gradients = [*self._first_gradients(optimizer).values(), *gradients_of(optimizer).values()]
        return all_finite([*self.losses[0], *self.losses[1]], gradients)

    def describe(self, network: nn.Module, optimizer: Any, where: str) -> str:
        """Return the sentence of :func:`describe` on this step."""
        gradients, first = gradients_of(optimizer), self._first_gradients(optimizer)
        passes = [("first", self.losses[0], first or gradients), ("second", self.losses[1], gradients)]
        return describe(network, passes[: 1 + bool(first)], where)

    def _first_gradients(self, optimizer: Any) -> dict[Tensor, Tensor]:
        # Without a second pass they may be those of an earlier step, which a scaler skipped.
        first: dict[Tensor, Tensor] = getattr(optimizer, "first_gradients", {}) if self.losses[1] else {}
        return {param: local(gradient) for param, gradient in first.items()}
