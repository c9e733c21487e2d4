"""Record when a run first reached the thresholds of its task."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as L
from torch import Tensor

from callbacks.module_protocol import trained
from experiment.library_internals import has_validated
from experiment.quantities import count
from experiment.target import Target


def passed(target: Target, measured: Tensor) -> bool:
    """Return whether ``measured`` reaches ``target``, compared in its own dtype.

    In float32, 95 of 100 is slightly less than the double 0.95.
    """
    return bool(measured < target.level if target.lower else measured >= target.level)


THRESHOLDS = (
    Target("train_loss_0.5", "train/loss", 0.5, lower=True),
    Target("train_loss_0.1", "train/loss", 0.1, lower=True),
    Target("fit", "train/accuracy", 0.99),
    Target("val_10", "val/accuracy", 0.10),
    Target("val_50", "val/accuracy", 0.50),
    Target("val_80", "val/accuracy", 0.80),
    Target("grok", "val/accuracy", 0.90),
    Target("val_95", "val/accuracy", 0.95),
    Target("converge", "val/accuracy", 0.98),
    Target("full", "val/accuracy", 0.99),
)


class Milestones(L.Callback):
    """Record the epoch, the steps and the gradient evaluations at each milestone.

    In a config:

        class_path: callbacks.milestones.Milestones
        init_args:
          thresholds: {learned: val/accuracy >= 0.9, sure: val/loss < 0.1}
          stop_at: sure

    The epoch is the number of completed epochs, so the first one is 1. Thresholds are checked when an epoch ends. A
    milestone is logged once, as ``milestone/<name>`` with the epoch as its value, in the row of that epoch. The
    progress bar names the latest one. A milestone stays reached if the metric falls back later or the run is resumed.

    Args:
        thresholds: by the name of the milestone: a logged metric, ``>=`` or ``<``, and a number.
        stop_at: the milestone at which training stops; ``None`` does not stop.

    Raises:
        ValueError: a threshold is not of this form, or ``stop_at`` is not a milestone.
    """

    changes_training = "stop_at"

    def __init__(self, thresholds: dict[str, str], stop_at: str | None = None) -> None:
        self._set([Target.parse(text, name) for name, text in thresholds.items()], stop_at)

    def _set(self, thresholds: Sequence[Target], stop_at: str | None) -> None:
        names = [threshold.name for threshold in thresholds]
        if stop_at is not None and stop_at not in names:
            raise ValueError(f"stop_at must be null or one of {', '.join(names)}, got {stop_at!r}")
        self.thresholds, self.stop_at = thresholds, stop_at
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
        for threshold in self.thresholds:
            # In an epoch without a logged mean, the old value stays here and reaches no further milestone.
            measured = trainer.callback_metrics.get(threshold.metric)
            # An epoch that max_steps has ended is logged later.
            if measured is None and has_validated(trainer) and trainer.is_last_batch:
                raise ValueError(_not_logged(threshold, trainer.callback_metrics))
            if threshold.name in self.reached or measured is None:
                continue
            if passed(threshold, measured):
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
        for threshold in self.thresholds:
            at = self.reached.get(threshold.name)
            row: dict[str, Any] = {"threshold": str(threshold)}
            row |= at or dict.fromkeys(("epoch", "optimizer_steps", "gradient_evaluations"))
            row["text"] = f"epoch {at['epoch']}" if at else f"not within {count(steps, 'step')}"
            rows[threshold.name] = row
        return rows

    def state_dict(self) -> dict[str, Any]:
        return {"reached": {name: dict(at) for name, at in self.reached.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.reached = {name: dict(at) for name, at in state_dict["reached"].items()}


class GrokkingMilestones(Milestones):
    """Record the milestones by which grokking is compared.

    Args:
        stop_at: the milestone at which training stops; ``None`` does not stop.

    Raises:
        ValueError: ``stop_at`` is not a milestone.
    """

    changes_training = "stop_at"

    def __init__(self, stop_at: str | None = "full") -> None:
        self._set(THRESHOLDS, stop_at)


def _not_logged(threshold: Target, logged: Mapping[str, Tensor]) -> str:
    nearest = difflib.get_close_matches(threshold.metric, logged, n=1, cutoff=0.0)
    hint = "".join(f"; did you mean {name}?" for name in nearest)
    return f"the milestone {threshold.name} reads {threshold.metric}, which is not logged{hint}"
