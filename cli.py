"""The command line: Lightning's, with a folder for every run, overlays that cannot mix optimizers, and short errors."""

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lean_imports import without_heavy_packages

with without_heavy_packages():
    import lightning.pytorch as L
    import torch
    import yaml
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from callbacks.cost_counters import CostCounters
    from callbacks.last_checkpoint import LastCheckpoint
    from callbacks.optimizer_internals import OptimizerInternals
    from callbacks.progress_bar import ProgressBar
    from callbacks.run_summary import RunSummary
    from callbacks.save_config import SaveConfig
    from callbacks.wandb_run import WandbRun
    from messages import explain, one_line
    from overlays import check_overlays
    from run_identity import Sweep
    from run_loggers import make_loggers

NOISE = (
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*in manual optimization.*",
    ".*does not have many workers.*",
    "LightningCLI's args parameter.*",
    ".*number of training batches .* is smaller than the logging interval.*",
    "The dirpath has changed from",
    "Be aware that when using `ckpt_path`",
    "Experiment logs directory .* exists and is not empty",
    "Encountered `nan` values in tensor",
    "Detected pickle protocol .* in the checkpoint",
)
CHATTER = (
    *("💡", "TPU available", "GPU available", "`Trainer.fit` stopped", "Seed set to"),
    *("Restoring states", "Restored all states", "Loaded model weights"),
)
FOLDER = "ARS2_RUN_FOLDER"
RESULTS = ("summary.json", "metrics.csv", "checkpoints", "wandb")


class Parser(LightningArgumentParser):
    """A parser whose errors are one line with the nearest valid name, and which completes no abbreviated option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Print what is wrong and leave with exit code 2."""
        print(f"error: {explain(message, self)}", file=sys.stderr)
        raise SystemExit(2)


class CommandLine(LightningCLI):
    """LightningCLI whose runs each have a folder: ``<runs>/<experiment>/<time>-seed<seed>``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--experiment", type=str, default="run", help="Name of the experiment: a folder and group.")
        parser.add_argument("--runs", type=str, default="runs", help="Folder that holds the folders of all runs.")
        parser.add_argument(
            "--wandb",
            type=bool | None,
            default=None,
            help="Log to Weights & Biases: true, false, or null for only where a key is configured.",
        )
        parser.add_argument("--sweep", type=Sweep | None, default=None, help="The search that the run is part of.")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        # The best holds weights alone: it is for looking at, and an epoch can be too short to write more each time.
        best = {"filename": "best", "save_weights_only": True, "save_on_train_epoch_end": True}
        parser.set_defaults({f"checkpoint.{key}": value for key, value in best.items()})
        parser.set_defaults({"checkpoint.enable_version_counter": False})
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.add_lightning_class_args(OptimizerInternals, "internals")

    def _parse_ckpt_path(self) -> None:
        # Lightning would take hyperparameters out of the file here; ours come from configs, and the file is checked.
        # Its words for a path ("last", "best") cannot mean anything either where every run has a folder of its own.
        subcommand = self.config.subcommand
        path = self.config[subcommand].get("ckpt_path")
        if path is not None:
            check_checkpoint(Path(path), resume=subcommand == "fit")
        elif subcommand != "fit":
            raise ValueError(f"{subcommand} needs a trained network: add --ckpt_path <run>/checkpoints/last.ckpt")
        self.config[subcommand].weights_only = True

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self.config[self.subcommand]
        if self.subcommand == "predict":
            self.save_config_callback = None
            return super().instantiate_trainer(**kwargs, logger=False)
        stem = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-seed{config.seed_everything}"
        folder = run_folder(Path(config.runs) / config.experiment, stem)
        if config.trainer.logger in (None, True):
            saved = yaml.safe_load(self._parser(self.subcommand).dump(config, skip_unset=False))
            kwargs["logger"] = make_loggers(folder, saved, config.wandb)
        return super().instantiate_trainer(**kwargs, default_root_dir=str(folder))

    def after_predict(self) -> None:
        """Print the lines that the module's ``predict_step`` returned."""
        for batch in self.trainer.predict_loop.predictions:
            for line in batch:
                print(line)


def run_folder(parent: Path, stem: str) -> Path:
    """Make a folder of its own for this run, also where two start at once; its other processes are given the same."""
    if FOLDER in os.environ:
        return Path(os.environ[FOLDER])
    for number in range(1000):
        folder = parent / (stem if number == 0 else f"{stem}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            os.environ[FOLDER] = str(folder)
            return folder
    raise FileExistsError(f"{parent} is full of runs named {stem}: name another --runs folder")


def check_checkpoint(path: Path, resume: bool) -> None:
    """Check that ``path`` is a checkpoint that can be loaded without running any code in it.

    Args:
        path: of the file.
        resume: whether training goes on from it, which needs more than the weights.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: damaged, not a checkpoint of Lightning, or without what resuming needs.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: it is damaged, or another program's") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= set(checkpoint):
        raise ValueError(f"{path} holds no training run: give a .ckpt file from a run's checkpoints folder")
    if resume and not checkpoint.get("optimizer_states"):
        raise ValueError(f"{path} holds weights alone, no state to resume from: give the last.ckpt of a run")


def main(arguments: Sequence[str]) -> int:
    """Run one subcommand; returns the exit code, 0 only if all went well.

    Every error is one line on standard error; what Python has to say of it goes to a file that the line names.
    """
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_is_news)
    if "LOCAL_RANK" not in os.environ:
        os.environ.pop(FOLDER, None)
    try:
        check_overlays(arguments)
        CommandLine(
            L.LightningModule,
            L.LightningDataModule,
            args=list(arguments),
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_class=Parser,
            save_config_callback=SaveConfig,
            seed_everything_default=42,
            trainer_defaults={
                "enable_model_summary": False,
                "callbacks": [ProgressBar(), CostCounters(), RunSummary(), WandbRun()],
            },
        )
    except SIGTERMException:
        return 128 + signal.SIGTERM
    except Exception as error:
        return _report(error)
    return 0


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(CHATTER)


def _report(error: Exception) -> int:
    where = ""
    folder = Path(os.environ[FOLDER]) if FOLDER in os.environ else None
    if folder is not None and "LOCAL_RANK" not in os.environ and not any((folder / name).exists() for name in RESULTS):
        # Nothing came of this run: an option was refused once it was put to use.
        shutil.rmtree(folder, ignore_errors=True)
        folder = None
    if folder is not None or not isinstance(error, (ValueError, OSError)):
        details = (folder or Path(tempfile.mkdtemp(prefix="ars2-"))) / "error.txt"
        with contextlib.suppress(OSError):
            details.write_text("".join(traceback.format_exception(error)))
            where = f" (details in {details})"
    print(f"error: {one_line(error)}{where}", file=sys.stderr)
    return 1
