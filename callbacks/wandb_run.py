"""Draw a finished run, and send its pictures and files to Weights & Biases."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import yaml
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from callbacks.direction import higher_is_better
from callbacks.lookup import folder_of
from callbacks.module_protocol import trained

# Files for the artifact, as far as the other callbacks have written them.
FILES = ("config.yaml", "protocol.yaml", "parameters.txt", "metrics.csv", "summary.json", "samples.txt")
AXES = ("epoch", "cost/optimizer_steps", "cost/gradient_evaluations", "cost/training_seconds", "cost/flops")
# The horizontal axis of each group of columns.
STEP_AXES = {"train/*": "epoch", "milestone/*": "epoch", "optimizer/*": AXES[1], "flatness/*": AXES[1]}


class WandbRun(L.Callback):
    """Draw the run when fitting ends, and send W&B what it needs beside the rows.

    W&B draws validation metrics over the epoch. Their summary has the last value and the best one: the lowest of a loss
    or perplexity, the highest of any other metric (``val/loss.last``, ``val/loss.min``). Every ``.png`` in the run
    folder's ``pictures`` is logged as ``pictures/<name>``. The run's files become an artifact of type ``run``. Trials
    of a search are not drawn. The package wandb is imported only if one of the loggers is a ``WandbLogger``.

    Args:
        draw: writes pictures into ``pictures`` of the run folder that it is given; ``None`` draws nothing.
    """

    changes_training = False

    def __init__(self, draw: Callable[[Path], None] | None = None) -> None:
        self.draw = draw

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        module = trained(trainer, pl_module)
        for logger in _wandb_loggers(trainer):
            try:
                _define(logger.experiment, module.val_metrics)
            except Exception as error:
                print(f"W&B draws this run over steps only ({type(error).__name__}: {error})")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = folder_of(trainer)
        if folder is None or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.save()  # Lightning writes the last rows only after this hook.
        # Training is done and its results are on disk. A failed picture must not fail the run.
        try:
            if self.draw is not None and _should_draw(folder):
                self.draw(folder)
        except Exception as error:
            print(f"the pictures of this run could not be drawn ({type(error).__name__}: {error})")
        try:
            for logger in _wandb_loggers(trainer):
                _send(logger.experiment, folder)
        except Exception as error:
            print(f"the pictures and files could not be sent to W&B ({type(error).__name__}: {error})")


def _should_draw(folder: Path) -> bool:
    """Return whether the run has a config and a log, and is not a trial of a search.

    Drawing takes longer than some trials.
    """
    if not (folder / "metrics.csv").is_file() or not (folder / "config.yaml").is_file():
        return False
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return (config.get("sweep") or {}).get("trial") is None


def _wandb_loggers(trainer: L.Trainer) -> list[WandbLogger]:
    if not trainer.is_global_zero:
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def _define(run: Any, metrics: Mapping[str, Any]) -> None:
    for axis in ("trainer/global_step", *AXES):
        run.define_metric(axis)
    for pattern, axis in STEP_AXES.items():
        run.define_metric(pattern, step_metric=axis)
    for name in metrics:
        best = "min" if higher_is_better(f"val/{name}", metrics) is False else "max"
        run.define_metric(f"val/{name}", step_metric="epoch", summary=f"{best},last")


def _send(run: Any, folder: Path) -> None:
    import wandb

    pictures = sorted((folder / "pictures").glob("*.png"))
    if pictures:
        run.log({f"pictures/{path.stem}": wandb.Image(str(path)) for path in pictures})
    # An artifact's name has fewer characters to choose from than a run's.
    artifact = wandb.Artifact(re.sub(r"[^\w.-]+", "-", f"{run.name}-{run.id}"), type="run")
    for name in FILES:
        if (folder / name).is_file():
            artifact.add_file(str(folder / name))
    for path in pictures:
        artifact.add_file(str(path), name=f"pictures/{path.name}")
    run.log_artifact(artifact)
