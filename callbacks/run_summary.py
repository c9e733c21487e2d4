"""Summarise a run at its end, in a short table and in ``summary.json``."""

import contextlib
import json
import math
import os
import platform
import re
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from rich import get_console
from rich.table import Table

from ars2 import report
from callbacks.cost_counters import CostCounters
from callbacks.direction import lower_is_better
from callbacks.lookup import callbacks_of
from callbacks.milestones import Milestones
from callbacks.module_protocol import trained
from callbacks.ordinary_module import OrdinaryModule
from experiment.metric_names import with_slash
from experiment.quantities import count, duration, quantity

PLACES = {"best_checkpoint": "best checkpoint", "last_checkpoint": "last checkpoint", "run_folder": "run folder"}


def without_nonfinite(value: Any) -> Any:
    """Replace every NaN and infinity in ``value``, which JSON lacks, by ``None``."""
    if isinstance(value, dict):
        return {key: without_nonfinite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment() -> dict[str, str]:
    """Return the command, versions, processor and threads that numbers depend on."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        processor = models[0] if models else processor
    return {
        "command": " ".join(["python", *sys.argv]),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": L.__version__,
        "processor": f"{processor}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def description(trainer: L.Trainer) -> dict[str, Any]:
    """Return the data module's description of its splits and corpus, or nothing."""
    data: Any = getattr(trainer, "datamodule", None)
    return dict(data.description()) if hasattr(data, "description") else {}


class RunSummary(L.Callback):
    """Print a table when fitting ends or is interrupted, and write ``summary.json``.

    Both have the status (``finished``, ``stopped early``, ``stopped early (milestone)`` or ``interrupted``), the best
    and last value of each validation metric, and the wall seconds. The best value is the lowest of a loss or
    perplexity, the highest of any other metric. Epochs count from 1. Wall seconds run from the start of fitting,
    include evaluation, and are summed over resumed parts. The description of the data, milestones, costs and checkpoint
    paths are included if the data module and the callbacks that know them are in use.

    A test of the same process (option ``--test_best``) adds its metrics to the file, as ``test``.

    The run folder is that of the first logger. Without a logger no file is written. Numbers that are not finite are
    ``null`` in the file. At the start the size of the network and the description of the data are printed, and
    ``parameters.txt`` lists the track of every parameter and why.

    The last step is validated, so that the last values are those of the trained network. Lightning alone omits this
    where training ends between two validations, such as in an epoch that ``check_val_every_n_epoch`` leaves out.
    """

    changes_training = False

    def __init__(self) -> None:
        self.metrics: dict[str, dict[str, Any]] = {}
        self.wall_seconds = 0.0
        self._mark: float | None = None
        self._folder: str | None = None
        self._has_failed = self._is_complete = False
        self._check_val_every_n_epoch: int | None = None
        self._summary: dict[str, Any] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        module = trained(trainer, pl_module)
        self._mark, self._has_failed, self._is_complete = perf_counter(), False, False
        # log_dir is a collective, and an interrupted process may be alone.
        self._folder = trainer.log_dir if trainer.loggers else None
        if self._folder is not None and trainer.is_global_zero:
            Path(self._folder).mkdir(parents=True, exist_ok=True)
            if not isinstance(module, OrdinaryModule):  # which makes its own groups
                parameters = report(module.network, module.policy, splits=module.splits)
                (Path(self._folder) / "parameters.txt").write_text(parameters + "\n", encoding="utf-8")
                get_console().print(parameters.splitlines()[-1], highlight=False)
        if trainer.is_global_zero:
            size = quantity(sum(parameter.numel() for parameter in pl_module.parameters()), "").strip()
            get_console().print(f"network: {size} parameters", highlight=False)
            for name, value in description(trainer).items():
                if isinstance(value, str):
                    get_console().print(f"{name}: {value}", highlight=False, soft_wrap=True)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        complete = 0 <= trainer.max_steps <= trainer.global_step
        complete |= trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        if complete and not trainer.should_stop:
            # Lightning validates a step after which it is asked to stop.
            trainer.should_stop = self._is_complete = True
        if trainer.should_stop and trainer.check_val_every_n_epoch is not None:
            # But it does so only in an epoch that has a validation.
            self._check_val_every_n_epoch, trainer.check_val_every_n_epoch = trainer.check_val_every_n_epoch, 1

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_interval(trainer)

    def _restore_interval(self, trainer: L.Trainer) -> None:
        if self._check_val_every_n_epoch is not None:
            trainer.check_val_every_n_epoch, self._check_val_every_n_epoch = self._check_val_every_n_epoch, None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        epoch = trainer.current_epoch + 1
        for name, tensor in trainer.callback_metrics.items():
            if not with_slash(name).startswith("val/"):
                continue
            value = float(tensor)
            entry = self.metrics.setdefault(name, {"best": math.nan, "best_epoch": None})
            lower = lower_is_better(trainer, name, trained(trainer, pl_module).val_metrics)
            if math.isnan(entry["best"]) or (value < entry["best"] if lower else value > entry["best"]):
                entry |= {"best": value, "best_epoch": epoch, "lower_is_better": lower}
            entry["last"] = value

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        status = "finished"
        if any(milestones.stopped for milestones in callbacks_of(trainer, Milestones)):
            status = "stopped early (milestone)"
        elif trainer.should_stop and not self._is_complete:
            status = "stopped early"
        self._close(trainer, pl_module, status)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._summary:
            found = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self._summary["test"] = without_nonfinite(found)
            self._write()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._mark is not None:
            self._has_failed = isinstance(exception, Exception)
            self._close(trainer, pl_module, "interrupted")

    def _close(self, trainer: L.Trainer, pl_module: L.LightningModule, status: str) -> None:
        self._restore_interval(trainer)
        self._count()
        self._mark = None
        self._summary = self.summary(trainer, pl_module, status)
        self._report(trainer)

    def summary(self, trainer: L.Trainer, pl_module: Any, status: str) -> dict[str, Any]:
        """Return what is known of the run so far, as ``summary.json`` has it."""
        summary: dict[str, Any] = {
            "status": status,
            "epochs": trainer.current_epoch,
            "metrics": self.metrics,
            "wall_seconds": round(self.wall_seconds, 3),
            "run_folder": self._folder,
            "environment": environment(),
        }
        if data := description(trainer):
            summary["data"] = data
        for milestones in callbacks_of(trainer, Milestones):
            summary["milestones"] = summary.get("milestones", {}) | milestones.report(trainer.global_step)
        for counters in callbacks_of(trainer, CostCounters):
            costs = counters.costs(trainer, pl_module)
            seconds = costs.pop("cost/training_seconds")
            counts = {name.removeprefix("cost/"): int(count) for name, count in costs.items()}
            summary["costs"] = counts | {"training_seconds": round(seconds, 3)}
        for checkpoint in callbacks_of(trainer, ModelCheckpoint):
            if checkpoint.monitor is not None and checkpoint.best_model_path:
                summary["best_checkpoint"] = checkpoint.best_model_path
            # Without a monitored metric, Lightning calls the latest checkpoint the best.
            latest = checkpoint.best_model_path if checkpoint.monitor is None else ""
            if last := checkpoint.last_model_path or latest:
                summary["last_checkpoint"] = last
        cleaned: dict[str, Any] = without_nonfinite(summary)
        return cleaned

    @rank_zero_only
    def _write(self) -> None:
        if self._folder is None:
            return
        folder = Path(self._folder)
        temporary = folder / "summary.json.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            os.replace(temporary, folder / "summary.json")
        except OSError as error:
            # A full disk may also have interrupted the run, whose error this one must not hide.
            if self._summary["status"] != "interrupted":
                raise
            print(f"summary.json could not be written ({error.strerror})")
            with contextlib.suppress(OSError):
                temporary.unlink()

    @rank_zero_only
    def _report(self, trainer: L.Trainer) -> None:
        self._write()
        # A Rich bar stops before its teardown, so that the table comes after it.
        bar = getattr(trainer.progress_bar_callback, "progress", None)
        if bar is not None:
            bar.stop()
        # For the file both are runs that may be resumed.
        get_console().print(table({**self._summary, "status": "failed"} if self._has_failed else self._summary))
        print(*places(self._summary), sep="\n", flush=True)

    def _count(self) -> None:
        if self._mark is not None:
            now = perf_counter()
            self.wall_seconds += now - self._mark
            self._mark = now

    def state_dict(self) -> dict[str, Any]:
        self._count()
        return {
            "metrics": {name: dict(entry) for name, entry in self.metrics.items()},
            "wall_seconds": self.wall_seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.metrics = {name: dict(entry) for name, entry in state_dict["metrics"].items()}
        self.wall_seconds = state_dict["wall_seconds"]


def table(summary: dict[str, Any]) -> Table:
    """Return the result of :meth:`RunSummary.summary` as a table."""
    rows = Table(
        title=f"Run {summary['status']} after {count(summary['epochs'], 'epoch')}",
        show_header=False,
        title_justify="left",
    )
    rows.add_column(no_wrap=True)
    rows.add_column()
    for name, entry in summary["metrics"].items():
        best, last = ("not finite" if value is None else f"{value:.5g}" for value in (entry["best"], entry["last"]))
        rows.add_row(name, f"best {best} (epoch {entry['best_epoch']}), last {last}")
    if milestones := summary.get("milestones"):
        rows.add_section()
        for name, milestone in milestones.items():
            rows.add_row(f"{name}: {milestone['threshold']}", milestone["text"])
    rows.add_section()
    for name, cost in summary.get("costs", {}).items():
        if name == "flops":
            rows.add_row("compute", quantity(cost, "FLOP"))
        elif name == "training_seconds":
            rows.add_row("training time", duration(cost))
        else:
            rows.add_row(name.replace("_", " "), f"{cost:,}")
    rows.add_row("wall time", duration(summary["wall_seconds"]))
    return rows


def places(summary: dict[str, Any]) -> list[str]:
    """Return a line for each file or folder that the run left.

    They are not in the table, which would cut long paths.
    """
    lines = [f"{name}: {summary[key]}" for key, name in PLACES.items() if summary.get(key)]
    return lines if summary["run_folder"] else [*lines, "run folder: none, because there is no logger"]
