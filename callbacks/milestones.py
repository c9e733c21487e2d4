"""Record when a run first passed the thresholds by which grokking is compared."""

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
from torch import Tensor

from callbacks.module_protocol import trained


@dataclass(frozen=True)
class Threshold:
    """Define a milestone by the logged epoch mean that it reads and the value to pass.

    A ``metric`` that ends in ``loss`` must fall below ``value``. Any other must be at least ``value``.
    """

    name: str
    metric: str
    value: float

    def passed(self, measured: Tensor) -> bool:
        """Return whether ``measured`` passes, compared in its own dtype.

        In float32, 95 of 100 is slightly less than the double 0.95.
        """
        return bool(measured < self.value if self.metric.endswith("loss") else measured >= self.value)

    def __str__(self) -> str:
        return f"{self.metric} {'<' if self.metric.endswith('loss') else '>='} {self.value:g}"


THRESHOLDS = (
    Threshold("train_loss_0.5", "train/loss", 0.5),
    Threshold("train_loss_0.1", "train/loss", 0.1),
    Threshold("fit", "train/accuracy", 0.99),
    Threshold("val_10", "val/accuracy", 0.10),
    Threshold("val_50", "val/accuracy", 0.50),
    Threshold("val_80", "val/accuracy", 0.80),
    Threshold("grok", "val/accuracy", 0.90),
    Threshold("val_95", "val/accuracy", 0.95),
    Threshold("converge", "val/accuracy", 0.98),
    Threshold("full", "val/accuracy", 0.99),
)


class GrokkingMilestones(L.Callback):
    """Record the epoch, the steps and the gradient evaluations at each milestone.

    The epoch is the number of completed epochs, so the first one is 1. Thresholds are checked when an epoch ends. A
    milestone is logged once, as ``milestone/<name>`` with the epoch as its value, in the row of that epoch. The
    progress bar names the latest one. A milestone stays reached if the metric falls back later or the run is resumed.

    Args:
        stop_at: the milestone at which training stops; ``None`` does not stop.

    Raises:
        ValueError: ``stop_at`` is not a milestone.
    """

    changes_training = "stop_at"

    def __init__(self, stop_at: str | None = "full") -> None:
        names = [threshold.name for threshold in THRESHOLDS]
        if stop_at is not None and stop_at not in names:
            raise ValueError(f"stop_at must be null or one of {', '.join(names)}, got {stop_at!r}")
        self.stop_at = stop_at
        self.reached: dict[str, dict[str, int]] = {}

    @property
    def stopped(self) -> bool:
        """Return whether the milestone at which training stops was reached."""
        return self.stop_at in self.reached

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop at once if the resumed run had already reached its end."""
        self._finish(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        module = trained(trainer, pl_module)
        for threshold in THRESHOLDS:
            # In an epoch without a logged mean, the old value stays here and reaches no further milestone.
            measured = trainer.callback_metrics.get(threshold.metric)
            if threshold.name in self.reached or measured is None:
                continue
            if threshold.passed(measured):
                epoch = trainer.current_epoch + 1
                self.reached[threshold.name] = {
                    "epoch": epoch,
                    "optimizer_steps": trainer.global_step,
                    "gradient_evaluations": module.gradient_evaluations,
                }
                pl_module.log(f"milestone/{threshold.name}", float(epoch), sync_dist=trainer.world_size > 1)
        self._finish(trainer)

    def _finish(self, trainer: L.Trainer) -> None:
        if self.reached:
            # Lightning logs only numbers to the bar, and a number would not name the milestone.
            name, at = list(self.reached.items())[-1]
            shown: dict[str, Any] = trainer.progress_bar_metrics
            shown["milestone"] = f"{name}@{at['epoch']}"
        if self.stopped:
            trainer.should_stop = True

    def report(self, steps: int) -> dict[str, dict[str, Any]]:
        """Describe every milestone, whether it was reached or not.

        Args:
            steps: the optimizer steps made so far.

        Returns:
            For each name, in the order of the thresholds: ``threshold``, ``epoch``, ``optimizer_steps``,
            ``gradient_evaluations`` (``None`` where it was not reached) and ``text``, such as ``"epoch 12"`` or
            ``"not within 800 steps"``.
        """
        rows: dict[str, dict[str, Any]] = {}
        for threshold in THRESHOLDS:
            at = self.reached.get(threshold.name)
            row: dict[str, Any] = {"threshold": str(threshold)}
            row |= at or dict.fromkeys(("epoch", "optimizer_steps", "gradient_evaluations"))
            row["text"] = f"epoch {at['epoch']}" if at else f"not within {steps} steps"
            rows[threshold.name] = row
        return rows

    def state_dict(self) -> dict[str, Any]:
        return {"reached": {name: dict(at) for name, at in self.reached.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.reached = {name: dict(at) for name, at in state_dict["reached"].items()}
