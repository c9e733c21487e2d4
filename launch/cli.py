"""Run Lightning's CLI with run folders, checked configs and one-line errors."""

import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from launch.lean_imports import without_heavy_packages

with without_heavy_packages():
    import lightning.pytorch as L
    from jsonargparse import Namespace
    from lightning.fabric.plugins import CheckpointIO
    from lightning.pytorch.callbacks import WeightAveraging
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from analysis.run_pictures import draw
    from callbacks.best_checkpoint import BestCheckpoint
    from callbacks.cost_counters import CostCounters
    from callbacks.last_checkpoint import LastCheckpoint, Stopped, StopSignals
    from callbacks.loader_checks import LoaderChecks
    from callbacks.optimizer_internals import OptimizerInternals
    from callbacks.ordinary_module import OrdinaryModule
    from callbacks.progress_bar import ProgressBar
    from callbacks.run_summary import RunSummary
    from callbacks.save_config import SaveConfig
    from callbacks.training_state import LogPosition, RandomStates
    from callbacks.wandb_run import WandbRun
    from experiment.checkpoints import AtomicCheckpointIO, check_checkpoint
    from experiment.distributed import broadcast_from_rank_zero, is_rank_zero
    from experiment.folders import RunFolder, find_runs, find_unfinished, leave_current, lock, unlock_all
    from experiment.identity import Sweep, resolve_config
    from experiment.loggers import make_loggers
    from launch.config_guard import check_overlays, check_values
    from launch.console import silence_libraries
    from launch.error_report import report
    from launch.parser import DEBUG, Parser
    from launch.trainer_options import check_checkpoints, check_precision, issubclass_of, move_update_options
    from modules.two_pass import TwoPassModule


class CommandLine(LightningCLI):
    """Give every run a folder ``<runs>/<experiment>/<time>-seed<seed>``."""

    resumes = False  # whether the run resumes in a folder that has its checkpoints and rows

    def __init__(self, *, args: Sequence[str], **options: Any) -> None:
        self.requested = args[0] if args else ""
        super().__init__(args=list(args), **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CommandLine":
        """Return itself, for callbacks that copy the module.

        The function that makes the module's optimizer refers to this object.
        """
        return self

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return only the requested subcommand, because building each takes 0.1 s."""
        subcommands = LightningCLI.subcommands()
        return {self.requested: subcommands[self.requested]} if self.requested in subcommands else subcommands

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--experiment", type=str, default="run", help="Name of the experiment and its folder.")
        parser.add_argument("--runs", type=str, default="runs", help="Folder for the folders of all runs.")
        parser.add_argument(
            "--wandb",
            type=bool | None,
            default=None,
            help="Log to Weights & Biases: true, false, or null logs only if a key is configured.",
        )
        parser.add_argument(
            "--task",
            type=str | None,
            default=None,
            help="Name of the task in reports; null takes the class attribute task of the data or model.",
        )
        parser.add_argument(
            "--test_best", type=bool, default=False, help="After fit, test the checkpoint of the best validation."
        )
        parser.add_argument("--sweep", type=Sweep | None, default=None, help="The search that the run is part of.")
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        # Weights only: the best checkpoint is for evaluation, and short epochs leave no time to write more.
        best = {"filename": "best", "save_weights_only": True, "save_on_train_epoch_end": True}
        parser.set_defaults({f"checkpoint.{key}": value for key, value in best.items()})
        parser.set_defaults({"checkpoint.enable_version_counter": False})
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.add_lightning_class_args(OptimizerInternals, "internals")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        check_values(self.config[self.config.subcommand].as_dict())
        trainer = self.config[self.config.subcommand].trainer
        if trainer.callbacks:
            # The parser hides the exception of a single callback, because it tries a list first.
            trainer.callbacks = _listed(trainer.callbacks)
        for callback in _listed(trainer.callbacks):
            # Lightning's Timer has an enum as a default, which YAML cannot represent.
            for name, value in vars(callback.get("init_args") or Namespace()).items():
                if isinstance(value, Enum) and isinstance(value, str):
                    callback.init_args[name] = value.value
        move_update_options(self.config[self.config.subcommand])

    def _resolved(self, config: Any) -> dict[str, Any]:
        return resolve_config(self._parser(self.config.subcommand), config)

    def _parse_ckpt_path(self) -> None:
        # Lightning would read hyperparameters from the file here. They come from configs, and the file is checked.
        subcommand = self.config.subcommand
        config = self.config[subcommand]
        if config.get("ckpt_path") == "last" and subcommand == "fit":
            config.ckpt_path = self._resume(config)
        elif config.get("ckpt_path") in ("last", "best") and subcommand != "fit":
            config.ckpt_path = broadcast_from_rank_zero("checkpoint", lambda: self._newest(config))
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
        """Return the last or best checkpoint of the newest run that has one."""
        parent = Path(config.runs) / config.experiment
        for folder in find_runs(parent, self._resolved(config)):
            path = folder.last_checkpoint() if config.ckpt_path == "last" else folder.best_checkpoint()
            if path is not None:
                # In predict, standard output contains only the answers.
                print(f"checkpoint: {path}", file=sys.stderr if self.config.subcommand == "predict" else sys.stdout)
                return str(path)
        raise ValueError(
            f"{parent} has no run with a {config.ckpt_path} checkpoint and the model, optimizer and seed of this"
            " command: name its file, give the options that it was trained with, or --runs if the runs were moved"
        )

    def _resume(self, config: Any) -> str | None:
        """Take over the unfinished run of this command, and return its checkpoint."""

        def find() -> dict[str, str | None]:
            # A process that Lightning has started inherits the folder.
            folder = RunFolder.current() or find_unfinished(
                Path(config.runs) / config.experiment, self._resolved(config)
            )
            checkpoint = None if folder is None else folder.last_checkpoint()
            return {
                "folder": None if folder is None else str(folder),
                "checkpoint": None if checkpoint is None else str(checkpoint),
            }

        folder, checkpoint = broadcast_from_rank_zero("unfinished run", find).values()
        message = "no unfinished run with these options: starting a new one"
        if folder is not None:
            RunFolder(Path(folder)).make_current()
            self.resumes = checkpoint is not None
            message = f"resuming {folder}" + ("" if checkpoint else " from the beginning, because it has no checkpoint")
        if is_rank_zero():
            print(message)
        return checkpoint

    def _run_folder(self, config: Any) -> RunFolder:
        """Return this run's folder, which rank zero locks and, if new, creates."""

        def create() -> str:
            stem = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-seed{config.seed_everything}"
            return str(RunFolder.current() or RunFolder.create(Path(config.runs) / config.experiment, stem))

        folder = RunFolder(Path(broadcast_from_rank_zero("folder", create)))
        folder.make_current()
        if is_rank_zero():
            lock(folder.path)
        return folder

    def before_instantiate_classes(self) -> None:
        """Add the callback that an ordinary LightningModule needs."""
        path = str(getattr(self.config[self.subcommand].model, "class_path", ""))
        if path and not issubclass_of(path, TwoPassModule):
            # First, because other callbacks read what it logs.
            self.trainer_defaults["callbacks"] = [OrdinaryModule(), *self.trainer_defaults["callbacks"]]

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self.config[self.subcommand]
        if config.trainer.barebones:
            raise ValueError(
                "trainer.barebones switches off the log and the checkpoints of the run folder: use it in Python, with"
                " L.Trainer(barebones=True)"
            )
        if self.subcommand == "predict":
            self.save_config_callback = None
            # Every process answers every question, because a sharded network needs all processes; rank zero prints.
            return super().instantiate_trainer(**kwargs, logger=False, use_distributed_sampler=False)
        if config.task is None:
            # Read from the classes: an object's attribute is often the task of its metric.
            names = [getattr(type(part), "task", None) for part in (self.datamodule, self.model)]
            config.task = next((name for name in names if isinstance(name, str)), None)
        folder = self._run_folder(config)
        if self.resumes:
            # config.yaml exists already. A process killed while rewriting it would lose the run.
            self.save_config_callback = None
        if config.trainer.logger is not False:
            # The files of the run folder come from its CSV logger, whichever others there are.
            given = self.config_init[self.subcommand].trainer.logger
            given = [] if given in (None, True) else _listed(given)
            wandb = bool(config.wandb) if given else config.wandb
            kwargs["logger"] = [*make_loggers(folder.path, self._resolved(config), wandb, self.resumes), *given]
        plugins = _listed(self.config_init[self.subcommand].trainer.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        self._drop_default_callbacks(config)
        return super().instantiate_trainer(**kwargs, default_root_dir=str(folder))

    def _drop_default_callbacks(self, config: Any) -> None:
        """Remove the default callbacks that the trainer's options replace or switch off."""
        dropped: tuple[type, ...] = ()
        given = _listed(self.config_init[self.subcommand].trainer.callbacks)
        has_bar = any(isinstance(callback, L.callbacks.ProgressBar) for callback in given)
        if config.trainer.enable_progress_bar is False or has_bar:
            dropped += (ProgressBar,)
        if config.trainer.enable_checkpointing is False:
            dropped += (StopSignals,)  # it waits for a checkpoint
            self._parser(self.subcommand).callback_keys = ["internals"]
        callbacks = self.trainer_defaults["callbacks"]
        self.trainer_defaults["callbacks"] = [callback for callback in callbacks if not isinstance(callback, dropped)]

    def after_instantiate_classes(self) -> None:
        """Refuse a precision that Lightning has replaced for the accelerator."""
        check_precision(str(self.config[self.subcommand].trainer.precision), self.trainer)

    def before_fit(self) -> None:
        """Refuse checkpoint callbacks that would lose something without a message."""
        check_checkpoints(self.trainer, self.model)
        if self.config[self.subcommand].test_best and self._monitoring() is None:
            raise ValueError("test_best needs a best checkpoint: set checkpoint.monitor, such as val/loss")

    def after_fit(self) -> None:
        """Test the best checkpoint, if requested."""
        if self.config[self.subcommand].test_best:
            best: Any = self._monitoring()
            if not best.best_model_path:
                raise ValueError(
                    f"test_best found no best checkpoint: {best.monitor} was never logged, so validate sooner"
                )
            # After training, these callbacks replace a loaded average by the checkpoint's weights without average.
            trainer: Any = self.trainer
            trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, WeightAveraging)]
            self.trainer.test(self.model, self.datamodule, ckpt_path=best.best_model_path, weights_only=True)

    def _monitoring(self) -> Any:
        callbacks: Any = self.trainer.checkpoint_callbacks
        return next((one for one in callbacks if getattr(one, "monitor", None) is not None), None)

    def after_validate(self) -> None:
        """Print the run folder."""
        if is_rank_zero():
            print(f"run folder: {RunFolder.current()}")

    after_test = after_validate

    def after_predict(self) -> None:
        """Print the lines that the module's ``predict_step`` returned."""
        for answers in self.trainer.predict_loop.predictions if self.trainer.is_global_zero else ():
            for line in [answers] if isinstance(answers, str) else () if answers is None else answers:
                print(line)


def _listed(value: Any) -> list[Any]:
    """Return an option that is one object, a list of them or ``None`` as a list."""
    return value if isinstance(value, list) else [value] if value else []


def main(arguments: Sequence[str]) -> int:
    """Run one subcommand and return the exit code.

    It is 0 only if everything succeeded. Every error is one line on standard error, which names the file with the
    traceback, or prints it with ``--debug``.
    """
    debug = DEBUG in arguments
    arguments = [argument for argument in arguments if argument != DEBUG]
    silence_libraries()
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the user's modules; Python itself adds the folder of train.py
    if is_rank_zero():
        leave_current()
    try:
        return _run(arguments, debug)
    except KeyboardInterrupt:
        # During Lightning's exit, between two of its steps, or while another stop is reported.
        if RunFolder.current() is None:
            raise
        _print_resume_command(arguments)
        return 128 + signal.SIGINT


def _run(arguments: Sequence[str], debug: bool) -> int:
    """Run one subcommand, and report an error or a stop."""
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
                    LoaderChecks(),
                    ProgressBar(),
                    CostCounters(),
                    RunSummary(),
                    WandbRun(draw),
                    RandomStates(),
                    LogPosition(),
                    StopSignals(),
                ],
            },
        )
    except Stopped as stop:
        print(f"stopped by {stop.received.name}, saved in {stop.saved}")
        _print_resume_command(arguments)
        return 128 + stop.received
    except SIGTERMException:
        _print_resume_command(arguments)
        return 128 + signal.SIGTERM
    except SystemExit as stop:
        # Lightning exits like this when Ctrl-C comes before or after training, or twice.
        if not isinstance(stop.__context__, KeyboardInterrupt):
            if debug and stop.__context__ is not None:
                traceback.print_exception(stop.__context__)
            raise
        _print_resume_command(arguments)
        return 128 + signal.SIGINT
    except Exception as error:
        return report(error, debug)
    finally:
        unlock_all()
    return 0


def _print_resume_command(arguments: Sequence[str]) -> None:
    """Print, from rank zero alone, the command that resumes the run of ``arguments``."""
    if not is_rank_zero():
        return
    kept = list(arguments)
    for index, argument in enumerate(arguments):
        if argument == "--ckpt_path":
            kept[index : index + 2] = ["", ""]
        elif argument.startswith("--ckpt_path="):
            kept[index] = ""
    command = ["python", "train.py", *filter(None, kept), "--ckpt_path", "last"]
    print(f"resume with: {shlex.join(command)}")
