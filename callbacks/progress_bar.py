"""Show the progress of a run and the time it may still take."""

import time
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import RichProgressBar
from rich import get_console

_SECONDS_BETWEEN_LINES = 10.0


def clock(seconds: float) -> str:
    """Return a duration as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class ProgressBar(RichProgressBar):
    """Show a bar with the longest remaining time, or lines without a terminal."""

    changes_training = False

    def __init__(self) -> None:
        super().__init__()
        self._start = self._last_line = 0.0
        self._first_epoch = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not get_console().is_terminal:
            self.disable()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._start = self._last_line = time.monotonic()
        self._first_epoch = trainer.current_epoch

    def _seconds_left(self, trainer: L.Trainer, epochs_done: float) -> float | None:
        """Return the seconds to the last epoch's end at the rate so far, or ``None``."""
        here = epochs_done - self._first_epoch
        if here <= 0 or not trainer.max_epochs or trainer.max_epochs < 0:
            return None
        return (time.monotonic() - self._start) / here * (trainer.max_epochs - epochs_done)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Return the metrics shown by the bar: the time left, but no version number."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        total = trainer.num_training_batches
        done = trainer.current_epoch + (trainer.fit_loop.batch_idx + 1) / total if 0 < total < float("inf") else 0.0
        left = self._seconds_left(trainer, done)
        return metrics if left is None else {**metrics, "at most left": clock(left)}

    def _get_train_description(self, current_epoch: int) -> str:
        """Count epochs from 1, as the summary, milestones and plain lines do."""
        last = self.trainer.max_epochs
        description = f"Epoch {current_epoch + 1}" + (f"/{last}" if last and last > 0 else "")
        # Lightning pads it too, so that the lines do not flicker.
        return description.ljust(len(self.validation_description))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        now = time.monotonic()
        if get_console().is_terminal or not trainer.is_global_zero or now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        done = trainer.current_epoch + 1
        left = self._seconds_left(trainer, done)
        rate = (done - self._first_epoch) / (now - self._start)
        metrics = [
            f"{name} {value}" if isinstance(value, str) else f"{name} {value:.4g}"
            for name, value in trainer.progress_bar_metrics.items()
        ]
        parts = [f"epoch {done}", *metrics, f"{rate:.3g} epochs/s", *([f"at most {clock(left)} left"] if left else [])]
        print(", ".join(parts), flush=True)
