"""The pictures of a run, and what Weights & Biases has beside its rows: best values, axes, pictures, and files."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import yaml
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from callbacks.lookup import folder_of
from callbacks.run_summary import LOWER_IS_BETTER

# Written by other callbacks; what of it is there goes into the artifact.
FILES = ("config.yaml", "protocol.yaml", "parameters.txt", "metrics.csv", "summary.json", "samples.txt")
AXES = ("epoch", "cost/optimizer_steps", "cost/gradient_evaluations", "cost/training_seconds", "cost/flops")
# By how many of them a table starts, or a step is.
STEP_AXES = {"train/*": "epoch", "milestone/*": "epoch", "optimizer/*": AXES[1], "flatness/*": AXES[1]}


class WandbRun(L.Callback):
    """Draws the run when fitting ends; tells W&B which values are best and what to draw them over, and sends it all.

    Validation metrics are drawn over the epoch, their summary is the lowest value of a loss or perplexity and the
    highest of any other, beside the last one (``val/loss.min``, ``val/loss.last``). The pictures are the run's curves,
    AGA's looks if it made any, and every ``.png`` in the run folder's ``pictures``, under ``pictures/<name>``; the
    files become an artifact of type ``run``. Trials of a search are not drawn. wandb is imported only where it is among
    the loggers.
    """

    changes_training = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics: Any = getattr(pl_module, "val_metrics", {})
        for logger in _wandb_loggers(trainer):
            try:
                _define(logger.experiment, metrics)
            except Exception as error:
                print(f"W&B draws this run over its steps ({type(error).__name__}: {error})")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = folder_of(trainer)
        if folder is None or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.save()  # the last rows; Lightning writes them after this
        # The training is done and its results are on disk: that must not be lost for want of a picture.
        try:
            if _is_to_be_drawn(folder):
                draw(folder)
        except Exception as error:
            print(f"there are no pictures of this run ({type(error).__name__}: {error})")
        try:
            for logger in _wandb_loggers(trainer):
                _send(logger.experiment, folder)
        except Exception as error:
            print(f"W&B has no pictures and files of this run ({type(error).__name__}: {error})")


def _is_to_be_drawn(folder: Path) -> bool:
    """Say whether there is a log, of a run that is no trial: drawing would take longer than some of those."""
    if not (folder / "metrics.csv").is_file() or not (folder / "config.yaml").is_file():
        return False
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return (config.get("sweep") or {}).get("trial") is None


def _wandb_loggers(trainer: L.Trainer) -> list[WandbLogger]:
    if not trainer.is_global_zero:
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def _define(run: Any, metrics: Iterable[str]) -> None:
    for axis in ("trainer/global_step", *AXES):
        run.define_metric(axis)
    for pattern, axis in STEP_AXES.items():
        run.define_metric(pattern, step_metric=axis)
    for name in metrics:
        best = "min" if name in LOWER_IS_BETTER else "max"
        run.define_metric(f"val/{name}", step_metric="epoch", summary=f"{best},last")


def draw(folder: Path) -> None:
    """Write ``pictures/curves.png`` and, for AGA, ``pictures/looks.png`` into a run folder, from its own log."""
    from analysis import plots
    from analysis.rows import group
    from analysis.runs import Run

    (compared,) = group([Run(folder)])
    if not compared.rows:
        return
    figures = {
        "curves": plots.curves(compared, compared.metric, "epoch"),
        "looks": plots.looks(compared.rows[0]),
    }
    if figures["curves"] is not None:
        plots.add_legend(figures["curves"])
    (folder / "pictures").mkdir(exist_ok=True)
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / "pictures" / f"{name}.png", dpi=120, facecolor="white")


def _send(run: Any, folder: Path) -> None:
    import wandb

    pictures = sorted((folder / "pictures").glob("*.png"))
    if pictures:
        run.log({f"pictures/{path.stem}": wandb.Image(str(path)) for path in pictures})
    artifact = wandb.Artifact(f"{run.name}-{run.id}", type="run")
    for name in FILES:
        if (folder / name).is_file():
            artifact.add_file(str(folder / name))
    for path in pictures:
        artifact.add_file(str(path), name=f"pictures/{path.name}")
    run.log_artifact(artifact)
