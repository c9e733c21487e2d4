"""Show the progress of a run and the time it may still take."""

import textwrap
import time
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import MetricsTextColumn, ProcessingSpeedColumn
from rich import get_console
from rich.console import RenderableType
from rich.progress import BarColumn
from rich.text import Text

from experiment.quantities import duration

_SECONDS_BETWEEN_LINES = 10.0
# Columns of the terminal that the bar leaves to the epoch, the batches, the times and the speed.
_BESIDE_BAR, _SPEED = 60, 12


def folded(items: Iterable[str], width: int) -> list[str]:
    """Join items by commas, and break lines between items.

    Lines after the first are indented.
    """
    text = ", ".join(item.replace(" ", "\xa0") for item in items)
    lines = textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)
    return [line.replace("\xa0", " ") for line in lines]


class ProgressBar(RichProgressBar):
    """Show a bar with the longest remaining time, or lines without a terminal.

    The metrics are below the bar. Neither exceeds the width of the terminal.
    """

    changes_training = False

    def __init__(self) -> None:
        super().__init__()
        self._start = self._last_line = 0.0
        self._first_epoch = 0
        self._items: list[str] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not get_console().is_terminal:
            self.disable()

    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        """Shorten the bar, or leave out the speed, where the terminal is narrow."""
        room = get_console().width - _BESIDE_BAR
        columns = super().configure_columns(trainer)
        for column in columns:
            if isinstance(column, BarColumn):
                column.bar_width = max(5, min(40, room if room >= 5 else room + _SPEED))
        return [column for column in columns if room >= 5 or not isinstance(column, ProcessingSpeedColumn)]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._start = self._last_line = time.monotonic()
        self._first_epoch = trainer.current_epoch
        if self.progress is None:
            return
        # A column of metrics would leave no room for the others.
        self.progress.columns = tuple(c for c in self.progress.columns if not isinstance(c, MetricsTextColumn))
        bars = self.progress.get_renderables

        def with_metrics() -> Iterable[RenderableType]:
            yield from bars()
            if self._items:
                yield Text("\n".join(folded(self._items, get_console().width)), style=self.theme.metrics)

        self.progress.get_renderables = with_metrics  # type: ignore[method-assign]

    def _seconds_left(self, trainer: L.Trainer, epochs_done: float) -> float | None:
        """Return the seconds to the last epoch's end at the rate so far, or ``None``."""
        here = epochs_done - self._first_epoch
        if here <= 0 or not trainer.max_epochs or trainer.max_epochs < 0:
            return None
        return (time.monotonic() - self._start) / here * (trainer.max_epochs - epochs_done)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Return the metrics shown by the bar, with the time left but no version number."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        total = trainer.num_training_batches
        done = trainer.current_epoch + (trainer.fit_loop.batch_idx + 1) / total if 0 < total < float("inf") else 0.0
        left = self._seconds_left(trainer, done)
        # Another thread draws them.
        self._items = [*_texts(metrics), *([] if left is None else [f"at most {duration(left)} left"])]
        return metrics

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
        items = [f"epoch {done}", *_texts(trainer.progress_bar_metrics), f"{rate:.3g} epochs/s"]
        items += [f"at most {duration(left)} left"] if left else []
        print(*folded(items, get_console().width), sep="\n", flush=True)


def _texts(metrics: dict[str, Any]) -> list[str]:
    return [f"{name} {value}" if isinstance(value, str) else f"{name} {value:.4g}" for name, value in metrics.items()]
