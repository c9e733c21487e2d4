"""Schedule the learning rate by steps, with a warm-up and a decay."""

import math
from functools import partial
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupDecay(LambdaLR):
    """Increase the learning rate linearly, then lower it until ``total``.

    The learning rate is that of the optimizer times a factor. At step s, counted from 0, the factor is (s + 1) /
    (warmup + 1) for s < warmup. From s = warmup to s = total it falls from 1 to ``final``, and stays there. One step is
    one call of :meth:`step`: an epoch, an update or a gradient evaluation, by the module's ``scheduler_interval``.

    Args:
        optimizer: whose groups' learning rates are scheduled.
        total: number of steps until the factor is ``final``, at least 1.
        warmup: number of steps before the decay, below ``total``.
        decay: ``"linear"``, ``"cosine"`` (half a period, Loshchilov and Hutter 2017) or ``"none"``.
        final: factor at the end, from 0 to 1. Without decay it has no effect.

    Raises:
        ValueError: a number is out of its range, or another decay.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total: int,
        warmup: int = 0,
        decay: Literal["linear", "cosine", "none"] = "linear",
        final: float = 0.0,
    ) -> None:
        if not 0 <= warmup < total:
            raise ValueError(f"warmup must be at least 0 and below total, got warmup {warmup} and total {total}")
        if decay not in ("linear", "cosine", "none"):
            raise ValueError(f"decay must be linear, cosine or none, got {decay!r}")
        if not 0 <= final <= 1:
            raise ValueError(f"final must be from 0 to 1, got {final}")
        super().__init__(optimizer, partial(_factor, total, warmup, decay, final))


def _factor(total: int, warmup: int, decay: str, final: float, step: int) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if decay == "none":
        return 1.0
    done = min(1.0, (step - warmup) / (total - warmup))
    left = (1 + math.cos(math.pi * done)) / 2 if decay == "cosine" else 1 - done
    return final + (1 - final) * left
