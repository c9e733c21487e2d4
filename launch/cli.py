"""The command line: Lightning's, with a folder for every run, overlays that cannot mix optimizers, and short errors."""

import contextlib
import importlib
import inspect
import linecache
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import time
import traceback
import warnings
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from launch.lean_imports import without_heavy_packages

with without_heavy_packages():
    import lightning.pytorch as L
    import yaml
    from jsonargparse import Namespace
    from lightning.fabric.plugins import CheckpointIO
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from analysis.run_pictures import draw
    from callbacks.best_checkpoint import BestCheckpoint
    from callbacks.cost_counters import CostCounters
    from callbacks.last_checkpoint import LastCheckpoint, Stopped, StopSignals
    from callbacks.optimizer_internals import OptimizerInternals
    from callbacks.progress_bar import ProgressBar
    from callbacks.run_summary import RunSummary
    from callbacks.save_config import SaveConfig
    from callbacks.training_state import LogPosition, RandomStates
    from callbacks.wandb_run import WandbRun
    from experiment.checkpoints import AtomicCheckpointIO, best_checkpoint, check_checkpoint, last_checkpoint
    from experiment.distributed import from_first, is_first
    from experiment.folders import FOLDER, hold, let_go, run_folder, runs_of, unfinished_run
    from experiment.identity import Sweep
    from experiment.loggers import make_loggers
    from launch.config_guard import check_overlays, check_values
    from launch.errors import explain, one_line, worker_traceback
    from modules.two_pass import TwoPassModule

NOISE = (
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*in manual optimization.*",
    "Using ModelCheckpoint with manual optimization",
    ".*does not have many workers.*",
    "LightningCLI's args parameter.*",
    ".*number of training batches .* is smaller than the logging interval.*",
    "The dirpath has changed from",
    "Be aware that when using `ckpt_path`",
    "Checkpoint directory .* exists and is not empty",
    "Encountered `nan` values in tensor",
    "Detected pickle protocol .* in the checkpoint",
    "You passed `Trainer\\(accelerator='cpu', precision='16-mixed'\\)`",  # which is refused
)
CHATTER = (
    *("💡", "TPU available", "GPU available", "`Trainer.fit` stopped", "Seed set to"),
    *("Restoring states", "Restored all states", "Loaded model weights"),
)
# What Lightning's short names for them mean.
PRECISIONS = {
    **{"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"},
    **{name: name for name in ("16-mixed", "16-true", "bf16-mixed", "bf16-true", "32-true", "64-true")},
}
# Packages that are no user's: what is loaded by now, and what tasks load later. Users add to the tasks' own.
_OWN = {name.partition(".")[0] for name in sys.modules} | {"analysis", "datamodules", "studies"}
_TASKS = ("modules", "datamodules")
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
RESULTS = ("summary.json", "metrics.csv", "checkpoints", "wandb")


class Parser(LightningArgumentParser):
    """A parser whose errors are one line with the nearest valid name, and which completes no abbreviated option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Print what is wrong and leave with exit code 2."""
        place = "" if ex is None else _in_users_file(ex)
        print(f"error: {explain(message, self)}{place}", file=sys.stderr)
        raise SystemExit(2)


class CommandLine(LightningCLI):
    """LightningCLI whose runs each have a folder: ``<runs>/<experiment>/<time>-seed<seed>``."""

    resumes = False  # whether the run goes on in a folder that has its checkpoints and rows

    def __init__(self, *, args: Sequence[str], **options: Any) -> None:
        self.asked = args[0] if args else ""
        super().__init__(args=list(args), **options)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the asked subcommand alone, if it comes first: the options of each take a tenth of a second."""
        every = LightningCLI.subcommands()
        return {self.asked: every[self.asked]} if self.asked in every else every

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--experiment", type=str, default="run", help="Name of the experiment: a folder and group.")
        parser.add_argument("--runs", type=str, default="runs", help="Folder that holds the folders of all runs.")
        parser.add_argument(
            "--wandb",
            type=bool | None,
            default=None,
            help="Log to Weights & Biases: true, false, or null for only where a key is configured.",
        )
        parser.add_argument(
            "--task",
            type=str | None,
            default=None,
            help="Name of the task in reports; null for the one that the class of the data or the model gives (task).",
        )
        parser.add_argument("--sweep", type=Sweep | None, default=None, help="The search that the run is part of.")
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        # The best holds weights alone: it is for looking at, and an epoch can be too short to write more each time.
        best = {"filename": "best", "save_weights_only": True, "save_on_train_epoch_end": True}
        parser.set_defaults({f"checkpoint.{key}": value for key, value in best.items()})
        parser.set_defaults({"checkpoint.enable_version_counter": False})
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.add_lightning_class_args(OptimizerInternals, "internals")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        check_values(self.config[self.config.subcommand].as_dict())
        for callback in _listed(self.config[self.config.subcommand].trainer.callbacks):
            # Lightning's Timer has a default that no YAML can hold.
            for name, value in vars(callback.get("init_args") or Namespace()).items():
                if isinstance(value, Enum) and isinstance(value, str):
                    callback.init_args[name] = value.value
        take_over(self.config[self.config.subcommand])

    def _parse_ckpt_path(self) -> None:
        # Lightning would take hyperparameters out of the file here; ours come from configs, and the file is checked.
        subcommand = self.config.subcommand
        config = self.config[subcommand]
        if config.get("ckpt_path") == "last" and subcommand == "fit":
            config.ckpt_path = self._go_on(config)
        elif config.get("ckpt_path") in ("last", "best") and subcommand != "fit":
            config.ckpt_path = from_first("checkpoint", lambda: self._newest(config))
        path = config.get("ckpt_path")
        if path is not None:
            strategy = getattr(config.trainer.strategy, "class_path", "")
            check_checkpoint(Path(path), resume=subcommand == "fit", sharded="ModelParallel" in strategy)
        elif subcommand != "fit":
            raise ValueError(
                f"{subcommand} needs a trained network: add --ckpt_path last, or best, or <run>/checkpoints/last.ckpt"
            )
        config.weights_only = True

    def _newest(self, config: Any) -> str:
        """Return the last or best checkpoint, as it is asked for, of the newest run of this config that has one."""
        find = last_checkpoint if config.ckpt_path == "last" else best_checkpoint
        parent = Path(config.runs) / config.experiment
        saved = yaml.safe_load(self._parser(self.config.subcommand).dump(config, skip_unset=False))
        for path in map(find, runs_of(parent, saved)):
            if path is not None:
                # What predict prints is answers alone.
                print(f"checkpoint: {path}", file=sys.stderr if self.config.subcommand == "predict" else sys.stdout)
                return str(path)
        raise ValueError(
            f"{parent} has no run with a {config.ckpt_path} checkpoint and the model, optimizer and seed of this"
            " command: name its file, or give the options that it was trained with"
        )

    def _go_on(self, config: Any) -> str | None:
        """Find the run that this command began, and take its folder; returns its last checkpoint, if it has one."""

        def find() -> dict[str, str | None]:
            if FOLDER in os.environ:  # a process that Lightning has started is told the folder by the first
                folder: Path | None = Path(os.environ[FOLDER])
            else:
                saved = yaml.safe_load(self._parser(self.config.subcommand).dump(config, skip_unset=False))
                folder = unfinished_run(Path(config.runs) / config.experiment, saved)
            checkpoint = None if folder is None else last_checkpoint(folder)
            return {
                "folder": None if folder is None else str(folder),
                "checkpoint": None if checkpoint is None else str(checkpoint),
            }

        folder, checkpoint = from_first("unfinished run", find).values()
        said = "no unfinished run of these options: a new one begins"
        if folder is not None:
            os.environ[FOLDER] = folder
            self.resumes = checkpoint is not None
            said = f"going on with {folder}" + ("" if checkpoint else " from its beginning, for it has no checkpoint")
        if is_first():
            print(said)
        return checkpoint

    def before_instantiate_classes(self) -> None:
        """Refuse a module that trains itself, before anything is made."""
        path = str(getattr(self.config[self.subcommand].model, "class_path", ""))
        module, _, name = path.rpartition(".")
        found = getattr(importlib.import_module(module), name) if module else None
        if isinstance(found, type) and not issubclass(found, TwoPassModule):
            raise ValueError(
                f"{path} is a LightningModule that makes its own training step, and train.py counts and makes the steps"
                " of modules.two_pass.TwoPassModule: derive the class from that, set self.network, call"
                " self.set_metrics({...}) and implement compute_loss(batch, metrics) in the place of training_step()"
                " and configure_optimizers()"
            )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self.config[self.subcommand]
        if self.subcommand == "predict":
            self.save_config_callback = None
            # Every process answers every question, for a sharded network needs them all, and the first one says it.
            return super().instantiate_trainer(**kwargs, logger=False, use_distributed_sampler=False)
        if config.task is None:
            # Of the classes: an object's task is often that of its metric.
            names = [getattr(type(part), "task", None) for part in (self.datamodule, self.model)]
            config.task = next((name for name in names if isinstance(name, str)), None)
        stem = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-seed{config.seed_everything}"
        folder = Path(from_first("folder", lambda: str(run_folder(Path(config.runs) / config.experiment, stem))))
        os.environ[FOLDER] = str(folder)
        if is_first():
            hold(folder)
        if self.resumes:
            # The same options are there already, and a process that dies while it writes them again loses the run.
            self.save_config_callback = None
        if config.trainer.logger in (None, True):
            saved = yaml.safe_load(self._parser(self.subcommand).dump(config, skip_unset=False))
            kwargs["logger"] = make_loggers(folder, saved, config.wandb, self.resumes)
        plugins = _listed(self.config_init[self.subcommand].trainer.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        unwanted: tuple[type, ...] = ()
        given = _listed(self.config_init[self.subcommand].trainer.callbacks)
        if config.trainer.enable_progress_bar is False or any(
            isinstance(one, L.callbacks.ProgressBar) for one in given
        ):
            unwanted += (ProgressBar,)
        if config.trainer.enable_checkpointing is False:
            unwanted += (StopSignals,)  # which waits for a checkpoint
            self._parser(self.subcommand).callback_keys = ["internals"]
        callbacks = self.trainer_defaults["callbacks"]
        self.trainer_defaults["callbacks"] = [one for one in callbacks if not isinstance(one, unwanted)]
        return super().instantiate_trainer(**kwargs, default_root_dir=str(folder))

    def after_instantiate_classes(self) -> None:
        """Refuse a precision that Lightning has changed for the accelerator."""
        asked = str(self.config[self.subcommand].trainer.precision)
        asked = PRECISIONS.get(asked, asked)
        if asked in PRECISIONS.values() and self.trainer.precision != asked:
            device = type(self.trainer.accelerator).__name__.removesuffix("Accelerator")
            raise ValueError(
                f"trainer.precision {asked} is not to be had on a {device}, where Lightning would take"
                f" {self.trainer.precision}: say --trainer.precision {self.trainer.precision}, or 32-true"
            )

    def before_fit(self) -> None:
        """Refuse a checkpoint that Lightning would never write."""
        for callback in self.trainer.checkpoint_callbacks:
            timed = getattr(callback, "_train_time_interval", None) is not None
            if timed and not isinstance(callback, BestCheckpoint) and not self.model.automatic_optimization:
                raise ValueError(
                    f"{type(callback).__name__} ignores train_time_interval, for {type(self.model).__name__} makes its"
                    " own optimizer steps: say --checkpoint.train_time_interval"
                )

    def after_validate(self) -> None:
        """Say where the numbers are."""
        if is_first():
            print(f"run folder: {os.environ[FOLDER]}")

    after_test = after_validate

    def after_predict(self) -> None:
        """Print the lines that the module's ``predict_step`` returned."""
        for batch in self.trainer.predict_loop.predictions if self.trainer.is_global_zero else ():
            for line in batch:
                print(line)


def _listed(value: Any) -> list[Any]:
    """Return an option that is one thing, a list of them or ``None`` as a list."""
    return value if isinstance(value, list) else [value] if value else []


def take_over(config: Any) -> None:
    """Give Lightning's options of the update to the module, if it is one that makes its updates itself.

    Lightning would only advise against them; a run is then the same by either name.

    Args:
        config: of a subcommand, parsed; changed in place.

    Raises:
        ValueError: the trainer and the module are given different values, or the trainer an unknown algorithm.
    """
    model, trainer = config.model, config.trainer
    module, _, name = model.class_path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    if not (inspect.isclass(kind) and issubclass(kind, TwoPassModule)):
        return
    for option, unsaid in (
        ("gradient_clip_val", None),
        ("gradient_clip_algorithm", None),
        ("accumulate_grad_batches", 1),
    ):
        given, own = trainer[option], model.init_args.get(option)
        if (
            option not in model.init_args or given == unsaid or (option == "gradient_clip_val" and given <= 0)
        ):  # which clips nothing
            continue
        if option == "gradient_clip_algorithm" and given not in ("norm", "value"):
            raise ValueError(f"trainer.{option} must be 'norm' or 'value', got {given!r}")
        given = float(given) if option == "gradient_clip_val" else given
        if own not in (given, inspect.signature(TwoPassModule).parameters[option].default):
            raise ValueError(
                f"trainer.{option} is {given} and model.{option} is {own}, which are two names of one option: give one"
            )
        model.init_args[option], trainer[option] = given, unsaid


def main(arguments: Sequence[str]) -> int:
    """Run one subcommand; returns the exit code, 0 only if all went well.

    Every error is one line on standard error; what Python has to say of it goes to a file that the line names.
    """
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_is_news)
    if is_first():
        os.environ.pop(FOLDER, None)
    try:
        check_overlays(arguments)
        CommandLine(
            model_class=L.LightningModule,
            datamodule_class=L.LightningDataModule,
            args=arguments,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_class=Parser,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=42,
            trainer_defaults={
                "enable_model_summary": False,
                "callbacks": [
                    *(ProgressBar(), CostCounters(), RunSummary(), WandbRun(draw)),
                    *(RandomStates(), LogPosition(), StopSignals()),
                ],
            },
        )
    except Stopped as leaving:
        print(f"stopped by {leaving.received.name}, saved in {leaving.saved}")
        _say_how_to_go_on(arguments)
        return 128 + leaving.received
    except SIGTERMException:
        _say_how_to_go_on(arguments)
        return 128 + signal.SIGTERM
    except SystemExit as leaving:
        # How Lightning leaves when Ctrl-C comes before or after training, or twice.
        if not isinstance(leaving.__context__, KeyboardInterrupt):
            raise
        _say_how_to_go_on(arguments)
        return 128 + signal.SIGINT
    except KeyboardInterrupt:
        # While Lightning was leaving, or between two of its steps.
        if FOLDER not in os.environ:
            raise
        _say_how_to_go_on(arguments)
        return 128 + signal.SIGINT
    except Exception as error:
        return _report(error)
    finally:
        let_go()
    return 0


def _say_how_to_go_on(arguments: Sequence[str]) -> None:
    """Print the command that goes on with the run of the command line ``arguments``, once for all its processes."""
    if not is_first():
        return
    kept = list(arguments)
    for index, argument in enumerate(arguments):
        if argument == "--ckpt_path":
            kept[index : index + 2] = ["", ""]
        elif argument.startswith("--ckpt_path="):
            kept[index] = ""
    parts = [*("python", "train.py"), *filter(None, kept), "--ckpt_path", "last"]
    print(f"go on with: {shlex.join(parts)}")


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(CHATTER)


def _in_users_file(error: BaseException) -> str:
    """Return the file and line of a user's own code that an exception came through last; empty if through none.

    A user's class may stand among the tasks of the suite, in modules/ or datamodules/. There a line that raises is one
    of its sentences, and an error of any other line a bug.
    """
    cause: BaseException | None = error
    while cause is not None:
        places = _places(cause)
        known = [(name, file, line) for name, file, line in places if not file.startswith(_LIBRARIES)]
        for name, file, line in reversed(known):
            package, mine = name.partition(".")[0], linecache.getline(file, line).strip()
            is_sentence = (name, file, line) == places[-1] and mine.startswith("raise ")
            is_value = isinstance(cause, (ValueError, OSError)) and (name, file, line) != places[-1]
            if package not in _OWN or (package in _TASKS and not is_sentence and not is_value):
                return f" ({file}, line {line})"
        cause = cause.__cause__ or cause.__context__
    return ""


def _places(error: BaseException) -> list[tuple[str, str, int]]:
    """Return module, file and line of every call that an exception came through, the outermost first."""
    names = {getattr(module, "__file__", None): name for name, module in list(sys.modules.items())}
    # Of a worker of a data loader there is only what it wrote.
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    frames += [(file, int(line)) for file, line in re.findall(r'File "(.+)", line (\d+)', worker_traceback(error))]
    return [(names.get(file) or Path(file).stem, file, line) for file, line in frames if Path(file).is_file()]


def _report(error: Exception) -> int:
    place = _in_users_file(error)
    where, said = "", one_line(error, os.environ.get(FOLDER)) + place
    folder = Path(os.environ[FOLDER]) if FOLDER in os.environ else None
    if folder is not None and is_first() and not any((folder / name).exists() for name in RESULTS):
        # Nothing came of this run: an option was refused once it was put to use.
        shutil.rmtree(folder, ignore_errors=True)
        folder = None
    if folder is not None or place or not isinstance(error, (ValueError, OSError)):
        from datamodules.token_cache import default_cache

        # Without a run folder, one place for the last such error: nobody would clear away one for each.
        details = (folder or default_cache()) / "error.txt"
        with contextlib.suppress(OSError):
            details.parent.mkdir(parents=True, exist_ok=True)
            details.write_text("".join(traceback.format_exception(error)))
            where = f" (details in {details})"
    print(f"error: {said}{where}", file=sys.stderr)
    return 1
