"""Find losses and gradients that are not finite.

One reduction per step checks all of them. An error message names the first.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ars2.distributed import local
from ars2.replay import Buffers
from experiment.library_internals import sparse_values

# Each skipped step halves the scale. If 2^-15 is not enough, no scale makes the gradients finite.
SMALLEST_SCALE = 2.0**-15


def gradients_of(optimizer: Optimizer) -> dict[Tensor, Tensor]:
    """Return the gradients of the update by parameter, as dense tensors.

    Sharded gradients are local rows, sparse ones their values. Empty gradients are left out.
    """
    params = (param for group in optimizer.param_groups for param in group["params"])
    found = {p: sparse_values(p.grad) if p.grad.is_sparse else local(p.grad) for p in params if p.grad is not None}
    return {param: gradient for param, gradient in found.items() if gradient.numel()}


def all_finite(losses: Sequence[Tensor], gradients: list[Tensor]) -> Tensor:
    """Return whether every loss and gradient is finite, as a tensor.

    Gradients are checked through their norms, which needs one fused kernel and a small part of the time of the update.
    A gradient whose square overflows counts as not finite, since it would make a second moment infinite permanently.

    Args:
        losses: scalars.
        gradients: of any shapes, on the device of the losses.

    Returns:
        A boolean scalar on that device, without synchronising.
    """
    dtypes = (tensor.dtype for tensor in (*losses, *gradients))
    dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
    lengths = torch._foreach_norm(gradients, 2, dtype=dtype) if gradients else ()
    seen = torch.stack([*(loss.to(dtype) for loss in losses), *lengths])
    return seen.isfinite().all()


def describe(
    network: nn.Module, passes: Iterable[tuple[str, Sequence[Tensor], Mapping[Tensor, Tensor]]], where: str
) -> str:
    """Return an error message on the first value that is not finite.

    Args:
        network: the network with the named parameters.
        passes: name, losses, and gradients by parameter of each pass, in order.
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
                " the gradient (gradient_clip_val), check the data, or skip such steps (nonfinite: skip)"
            )
    return f"{where}: a loss or gradient of another process is not finite; the step was not made: see its message"


def _also(others: int) -> str:
    return f" (nor are those of {others} more parameters)" if others else ""


def lower_scale(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> bool:
    """Update ``scaler`` as after an overflow.

    Returns:
        Whether no scale makes the gradients finite.
    """
    gradients = gradients_of(optimizer)
    if not gradients:
        return False
    # Only a gradient of another process or of the first pass may be infinite, so make one here infinite too.
    gradient = next(iter(gradients.values()))
    gradient[(0,) * gradient.ndim] = math.inf  # in place, whatever its strides
    # Without scaler.step(), so that no hook counts an optimizer step.
    scaler.unscale_(optimizer)
    scaler.update()
    return scaler.get_scale() < SMALLEST_SCALE


class StepRecord:
    """Record the losses and buffers of one optimizer step.

    They show whether and why a step is not finite, and undo its changes.

    Attributes:
        losses: scalars of the first and of the second pass, one for each batch.
    """

    losses: tuple[list[Tensor], list[Tensor]]

    def __init__(self) -> None:
        self._buffers: Buffers | None = None
        self._buffers_between: Buffers | None = None

    def begin(self, network: nn.Module) -> None:
        """Start a new step.

        ``network`` is the same each time, on the device where it is trained.
        """
        self.losses = [], []
        self._buffers = self._buffers or Buffers(network)
        self._buffers.save()

    def frozen_statistics(self, network: nn.Module) -> AbstractContextManager[None]:
        """Leave the buffers of ``network`` unchanged in a block.

        The block is the second pass; buffers include running statistics.
        """
        self._buffers_between = self._buffers_between or Buffers(network)
        return self._buffers_between.unchanged()

    def restore_batchnorm(self) -> None:
        """Restore all buffers, such as running statistics, to the start of the step."""
        if self._buffers is not None:
            self._buffers.restore()

    def is_finite(self, optimizer: Any) -> Tensor:
        """Check the losses and gradients of both passes, once before the update.

        Returns:
            A boolean scalar on the device.
        """
        gradients = [*self._first_gradients(optimizer).values(), *gradients_of(optimizer).values()]
        return all_finite([*self.losses[0], *self.losses[1]], gradients)

    def describe(self, network: nn.Module, optimizer: Any, where: str) -> str:
        """Return the message of :func:`describe` for this step."""
        gradients, first = gradients_of(optimizer), self._first_gradients(optimizer)
        passes = [("first", self.losses[0], first or gradients), ("second", self.losses[1], gradients)]
        return describe(network, passes[: 1 + bool(first)], where)

    def _first_gradients(self, optimizer: Any) -> dict[Tensor, Tensor]:
        # Without a second pass these may be left from an earlier step that a scaler skipped.
        first: dict[Tensor, Tensor] = getattr(optimizer, "first_gradients", {}) if self.losses[1] else {}
        return {param: local(gradient) for param, gradient in first.items()}
