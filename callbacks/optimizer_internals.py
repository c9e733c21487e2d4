"""Measure norms of weights and updates, and the state of AGA."""

import math
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from ars2.distributed import Local, find_layout, local
from callbacks.cost_counters import CostCounters
from callbacks.lookup import callbacks_of

COUNTERS = ("steps", "sync_steps", "gradient_evaluations")


def norm(tensors: list[Tensor], layout: Local) -> Tensor:
    """Return the Euclidean norm over all elements of at least one tensor.

    Args:
        tensors: on one device, which the returned float64 scalar is on, too.
        layout: the processes that have the other rows of the tensors, if any.
    """
    square = torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)).double().square().sum()
    layout.reduce_(square)
    return square.sqrt()


def cosine(pairs: list[tuple[Tensor, Tensor]], layout: Local) -> Tensor:
    """Return the cosine between all first and all second tensors, each as one vector."""
    firsts, seconds = [first for first, _ in pairs], [second for _, second in pairs]
    product = torch.stack([(first.float() * second.float()).sum() for first, second in pairs]).double().sum()
    layout.reduce_(product)
    return product / (norm(firsts, layout) * norm(seconds, layout))


class OptimizerInternals(L.Callback):
    """Measure every n-th step of any optimizer, and write one row to the loggers.

    The row has the step number of Lightning's rows (the index of the batch), ``epoch``, the costs if
    :class:`callbacks.cost_counters.CostCounters` is in use, and:

    - ``optimizer/gradient_norm``: the norm of the gradient that updates, before clipping;
    - ``optimizer/update_rms_<track>``: the root mean square of the change of a track's weights (``matrix`` or
      ``vector``, or ``all`` of an optimizer without tracks), weight decay included;
    - ``optimizer/update_ratio_<track>``: that divided by the root mean square of the weights before the step;
    - ``flatness/gradient_cosine``: between first and second gradient over all parameters, in a two-pass step;
    - where the optimizer has ``diagnostics()``: its values as ``flatness/...`` (``effective_k`` after the first second
      pass), and ``flatness/trigger_rate``, the second passes per step since the row before.

    A measured step copies the weights and synchronises with the device once. Other steps, and runs without a logger,
    cost practically nothing.

    Args:
        every_n_steps: optimizer steps between rows.

    Raises:
        ValueError: ``every_n_steps`` below 1.
    """

    changes_training = False

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.steps, self.second_passes = 0.0, 0.0
        self._before: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        self._measured: dict[str, Tensor] = {}
        self._layout = Local()

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if (trainer.global_step + 1) % self.every_n_steps or not trainer.loggers:
            return
        params = [param for group in optimizer.param_groups for param in group["params"]]
        self._layout = find_layout((str(index), param) for index, param in enumerate(params))
        gradients = [local(param.grad) for param in params if param.grad is not None]
        self._measured = {"optimizer/gradient_norm": norm(gradients, self._layout)}
        firsts: dict[Tensor, Tensor] = getattr(optimizer, "first_gradients", {})
        if pairs := [(local(first), local(p.grad)) for p, first in firsts.items() if p.grad is not None]:
            self._measured["flatness/gradient_cosine"] = cosine(pairs, self._layout)
        by_track: dict[str, list[Tensor]] = {}
        for group in optimizer.param_groups:
            by_track.setdefault(group.get("track", "all"), []).extend(group["params"])
        self._before = {track: (ps, [local(p).clone() for p in ps]) for track, ps in by_track.items() if ps}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if not self._measured:
            return
        for track, (params, before) in self._before.items():
            update = norm(list(torch._foreach_sub([local(p) for p in params], before)), self._layout)
            self._measured[f"optimizer/update_rms_{track}"] = update / math.sqrt(sum(p.numel() for p in params))
            self._measured[f"optimizer/update_ratio_{track}"] = update / norm(before, self._layout)
        row: dict[str, float] = {"epoch": trainer.current_epoch}
        row |= dict(zip(self._measured, torch.stack(list(self._measured.values())).tolist(), strict=True))
        self._before, self._measured = {}, {}
        optimizer: Any = trainer.optimizers[0]
        if hasattr(optimizer, "diagnostics"):
            row |= self._flatness(optimizer.diagnostics())
        for counters in callbacks_of(trainer, CostCounters):
            row |= counters.costs(trainer, pl_module)
        for logger in trainer.loggers:
            logger.log_metrics(row, trainer.fit_loop.total_batch_idx)

    def _flatness(self, report: dict[str, float]) -> dict[str, float]:
        steps, second_passes = report["steps"] - self.steps, report["sync_steps"] - self.second_passes
        self.steps, self.second_passes = report["steps"], report["sync_steps"]
        row = {f"flatness/{name}": value for name, value in report.items() if name not in COUNTERS}
        if math.isinf(row["flatness/effective_k"]):
            # Infinite before the first second pass, and not every logger accepts infinities.
            del row["flatness/effective_k"]
        # A gradient scaler may have skipped the step.
        return row | ({"flatness/trigger_rate": second_passes / steps} if steps else {})

    def state_dict(self) -> dict[str, Any]:
        # The key "looks" is that of older checkpoints.
        return {"steps": self.steps, "looks": self.second_passes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.second_passes = state_dict["steps"], state_dict["looks"]
