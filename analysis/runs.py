"""Read finished runs from ``config.yaml`` and ``metrics.csv`` in their folders.

Other files are optional.
"""

import csv
import functools
import io
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import yaml

from analysis.archive import Folder, find, former_folder
from experiment.identity import RunIdentity, contents_of, digest
from experiment.metric_names import with_slash
from experiment.quantities import count
from experiment.target import Target

# Axes over which curves can be drawn: column of the log, and label. The first one is shown unless another is chosen.
AXES = {
    "cost/gradient_evaluations": "gradient evaluations",
    "cost/optimizer_steps": "optimizer steps",
    "epoch": "epochs",
    "cost/flops": "FLOPs",
    "cost/training_seconds": "training seconds",
}


def curve_title(metric: str, axis: str) -> str:
    """Return the title of curves, the same in a report and on Weights & Biases."""
    return f"{metric} over {AXES[axis]}"


# Ten times as fast where PyYAML was built with libyaml.
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

MILESTONES = "callbacks.milestones.Milestones"
# The training step's message where the loss is not finite; the log may end before that.
_DIVERGED = "FloatingPointError: "

Log: TypeAlias = dict[str, np.ndarray]
# Raised for files that cannot be read, on disk or in an archive.
_DAMAGE = (ValueError, OSError, zipfile.BadZipFile, zlib.error)


class Run:
    """Describe a training run.

    Args:
        folder: with ``config.yaml`` and ``metrics.csv``, on disk or in an archive.

    Attributes:
        shown: path of the folder; in an archive the archive's path and the name in it.
        identity: task, optimizer, seed, protocol and setting, from the config.
        log: the columns of its rows, epochs counted from 1; those of the run that it was resumed from come first.
        epochs: the number that it completed.
        diverged: whether it ended because its loss or gradient was not finite any more.
        finished: whether it ended by itself: all its epochs, a milestone, early stopping, or divergence.

    Raises:
        ValueError: it is damaged, or no training run; the message has the reason.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder, self.shown = folder, Path(str(folder))
        self._curves: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
        config = _mapping(folder / "config.yaml")
        self.summary = _summary(folder / "summary.json")
        self.identity = _identify(folder, config, self.summary)
        self.diverged = _DIVERGED in _text(folder / "error.txt")
        # Only validate and test have the option verbose.
        self.log = self._read(evaluates="verbose" in config)
        self.resumed_from = self._join(config.get("ckpt_path"))
        done = self.log["epoch"][~np.isnan(self.log["train/loss"])]
        self.epochs = int(done.max()) if len(done) else 0
        ended = self._came_to_an_end()
        self.diverged = self.diverged and not ended
        self.finished = ended or self.diverged

    def _read(self, evaluates: bool) -> Log:
        path = self.folder / "metrics.csv"
        if not path.exists():
            if self.diverged:  # before anything was logged
                return {"epoch": np.empty(0), "train/loss": np.empty(0)}
            raise ValueError("it has no metrics.csv, because it ended within its first epoch")
        cells = _cells(path.read_bytes())
        cells = {name if (name := with_slash(key)) not in cells else key: values for key, values in cells.items()}
        if "train/loss" not in cells and (evaluates or any(column.startswith("test/") for column in cells)):
            raise ValueError("it is an evaluation, not a training run")
        log = _numbers(cells)
        if self.diverged:  # maybe before anything of these was logged
            rows = len(next(iter(log.values())))
            log = {column: np.full(rows, np.nan) for column in ("epoch", "train/loss")} | log
        if not {"epoch", "train/loss"} <= set(log):
            raise ValueError("metrics.csv has no columns epoch and train/loss")
        placed, trained = (~np.isnan(log[column]) for column in ("epoch", "train/loss"))
        if (trained & ~placed).any():
            raise ValueError("metrics.csv has a training loss without its epoch")
        if not trained.any() and not self.diverged:
            raise ValueError("metrics.csv has no complete epoch")
        # Callbacks that log by themselves, as Lightning's LearningRateMonitor does, leave rows without an epoch.
        log = {column: values[placed] for column, values in log.items()}
        log["epoch"] += 1
        losses = [cell for cell in cells.get("val/loss", cells.get("train/loss", ())) if cell]
        self.diverged |= bool(losses) and not math.isfinite(float(losses[-1]))
        return log

    def _join(self, checkpoint: str | None) -> Folder | None:
        """Prepend the rows of the run that this one was resumed from, if any.

        The costs in them continue without a gap.
        """
        first = int(self.log["epoch"].min()) if len(self.log["epoch"]) else 1
        if checkpoint is None:
            if first > 1:
                raise ValueError(f"metrics.csv begins with epoch {first}")
            return None
        folder = former_folder(checkpoint, self.folder)
        if not (folder / "metrics.csv").exists():
            raise ValueError(f"it was resumed from {checkpoint}, and the log of that run no longer exists")
        before = Run(folder)
        _complete_contents([before.identity, self.identity])
        if before.identity.protocol_digest != self.identity.protocol_digest:
            raise ValueError(f"it was resumed from {checkpoint}, which is of another protocol")
        earlier = before.log["epoch"] < first
        absent = np.full(len(earlier), np.nan), np.full(len(self.log["epoch"]), np.nan)
        self.log = {
            column: np.concatenate([before.log.get(column, absent[0])[earlier], self.log.get(column, absent[1])])
            for column in dict.fromkeys((*before.log, *self.log))
        }
        return folder

    def _came_to_an_end(self) -> bool:
        if "status" in self.summary:
            return str(self.summary["status"]) != "interrupted"
        options = self.identity.options
        epochs, steps = options.get("trainer.max_epochs"), options.get("trainer.max_steps")
        done = self.at_end("cost/optimizer_steps")
        if (epochs and 0 < epochs <= self.epochs) or (steps and 0 < steps <= (done or 0)):
            return True
        return self.stopped_at is not None

    @property
    def stopped_at(self) -> str | None:
        """The milestone that ended it, if one did."""
        callbacks = self.identity.options.get("trainer.callbacks") or []
        stops = (callback.get("init_args", {}).get("stop_at") for callback in callbacks)
        return next((str(stop) for stop in stops if stop and self.has(f"milestone/{stop}")), None)

    @property
    def milestones(self) -> list[Target]:
        """The thresholds of :class:`callbacks.milestones.Milestones` in its config."""
        callbacks = self.identity.options.get("trainer.callbacks") or []
        given = [one["init_args"]["thresholds"] for one in callbacks if one["class_path"] == MILESTONES]
        return [Target.parse(text, name) for thresholds in given for name, text in thresholds.items()]

    @property
    def so_far(self) -> str:
        """How much of it there is, in words; empty for a run that came to an end."""
        return "" if self.finished else f"{self.epochs} of {self.limit}"

    @property
    def budget(self) -> str:
        """What it was to spend at most, in words.

        These are gradient evaluations if it had such a budget, or else its length.
        """
        callbacks = self.identity.options.get("trainer.callbacks") or []
        budgets = [
            options["gradient_evaluations"]
            for callback in callbacks
            if str(callback.get("class_path", "")).endswith(".EvaluationBudget")
            and isinstance((options := callback.get("init_args") or {}).get("gradient_evaluations"), int)
        ]
        return count(min(budgets), "gradient evaluation") if budgets else self.limit

    @property
    def limit(self) -> str:
        """How far it was to go, in words."""
        options = self.identity.options
        if (options.get("trainer.max_epochs") or -1) > 0:
            return count(options["trainer.max_epochs"], "epoch")
        return count(options.get("trainer.max_steps") or 0, "step")

    def has(self, column: str) -> bool:
        """Return whether anything was logged under ``column``."""
        return column in self.log and not bool(np.isnan(self.log[column]).all())

    def curve(self, column: str, axis: str = "epoch") -> tuple[np.ndarray, np.ndarray]:
        """Return positions on ``axis``, a key of :data:`AXES`, and values.

        Both are empty where either was not logged.
        """
        if column not in self.log or axis not in self.log:
            return np.empty(0), np.empty(0)
        # Every table and picture asks for the same few.
        if (column, axis) not in self._curves:
            x, y = self.log[axis], self.log[column]
            both = ~(np.isnan(x) | np.isnan(y))
            self._curves[column, axis] = x[both], y[both]
        return self._curves[column, axis]

    def best(self, metric: str, lower: bool) -> float:
        """Return the best value of ``metric``, NaN if it has none that is finite."""
        _, values = self.curve(metric)
        values = values[np.isfinite(values)]
        return float(values.min() if lower else values.max()) if len(values) else np.nan

    def last(self, metric: str) -> float:
        """Return the last value of ``metric``; NaN for a run that diverged."""
        _, values = self.curve(metric)
        return float(values[-1]) if len(values) and not self.diverged else np.nan

    def at_end(self, axis: str) -> float | None:
        """Return how far the run got on ``axis``, if that was logged."""
        return float(np.nanmax(self.log[axis])) if self.has(axis) else None

    def reached(self, target: Target, axis: str = "epoch") -> float | None:
        """Return where on ``axis`` the run first met ``target``, ``None`` if it did not.

        Compared in single precision, in which metrics are computed: 95 of 100 is a little less than the double 0.95.
        """
        positions, values = self.curve(target.metric, axis)
        single, level = values.astype(np.float32), np.float32(target.level)
        met = np.flatnonzero(single < level if target.lower else single >= level)
        return float(positions[met[0]]) if len(met) else None


@dataclass(frozen=True)
class Problem:
    """Describe why a folder is in no table.

    Args:
        folder: its path.
        reason: why it is in no table.
        identity: of the run, if its config can be read.
    """

    folder: Path
    reason: str
    identity: RunIdentity | None = None


def read(
    paths: Iterable[Path],
    unfinished: bool = False,
    progress: Callable[[Sequence[Folder]], Iterable[Folder]] = iter,
) -> tuple[list[Run], list[Problem]]:
    """Read every run at or below ``paths``.

    Args:
        paths: run folders, folders that contain some, or archives.
        unfinished: whether to include runs that completed an epoch and did not come to their end.
        progress: yields the folders that it is given, and shows how many have been read.

    Returns:
        The runs that count, and every other folder with the reason why it does not. Of several runs of one setting and
        one seed the latest counts, because they are not independent. Unfinished trials of a sweep are among the runs:
        their cost was spent.
    """
    runs: list[Run] = []
    problems: list[Problem] = []
    folders = {str(folder): folder for folder in find(paths)}
    for name, folder in zip(folders, progress(list(folders.values())), strict=True):
        try:
            if not folder.is_dir():
                raise ValueError("there is no such folder")
            runs.append(Run(folder))
        except _DAMAGE as error:
            problems.append(Problem(Path(name), str(error), _identity(folder)))
    lost = [problem.identity for problem in problems if problem.identity is not None]
    _complete_contents([*(run.identity for run in runs), *lost])
    continued = {_resolved(run.resumed_from): run.shown for run in runs if run.resumed_from}
    kept: dict[tuple[Any, ...], Run] = {}
    for run in sorted(runs, key=lambda run: run.folder.name):
        sweep = run.identity.sweep
        counts = run.finished or (sweep is not None and sweep.trial is not None) or (unfinished and run.epochs > 0)
        if (place := _resolved(run.folder)) in continued:
            problems.append(Problem(run.shown, f"it was resumed in {continued[place]}, which has its rows"))
        elif not counts:
            problems.append(Problem(run.shown, f"half-finished: {count(run.epochs, 'epoch')} of {run.limit}"))
        else:
            key = (run.identity.setting_digest, run.identity.seed, sweep)
            if former := kept.get(key):
                problems.append(Problem(former.shown, f"repeated with the same setting and seed in {run.shown}"))
            kept[key] = run
    return list(kept.values()), problems


def _resolved(folder: Folder) -> Path:
    return Path(str(folder)).resolve()


def _identify(folder: Folder, config: dict[str, Any], summary: dict[str, Any]) -> RunIdentity:
    """Return the identity of a run, and refuse a config that was edited afterwards."""
    path = folder / "protocol.yaml"
    stored = _mapping(path) if path.exists() else {}
    identity = RunIdentity.recorded(config, stored)
    if "places" not in stored:
        # An older run: its data module's description is in the summary alone, sentences included.
        description = summary.get("data") or {}
        sentences = [key for key, value in description.items() if isinstance(value, str) and " " in value]
        identity.contents = contents_of(description, sentences)
    # By its options, and not by its digest: a protocol may have consisted of other options at that time.
    for key, value in identity.stated_protocol.items() if stored else ():
        if stored.get(key) != value:
            raise ValueError(f"config.yaml says {key} {value}, but it ran under {stored.get(key)}: it was edited")
    return identity


def _complete_contents(identities: Iterable[RunIdentity]) -> None:
    """Complete what runs recorded of their data, where only one completion fits.

    Runs from before the data was recorded, and those that failed before it was, keep their table that way. Among runs
    whose protocols are otherwise equal, such a run takes the data that agrees with its record, unless several different
    data sets do.
    """
    by_options: dict[str, list[RunIdentity]] = {}
    for identity in identities:
        by_options.setdefault(digest(identity.stated_protocol), []).append(identity)
    for members in by_options.values():
        recorded = [dict(contents) for contents in {tuple(member.contents.items()) for member in members}]
        fullest = [c for c in recorded if not any(c.items() < other.items() for other in recorded)]
        for member in members:
            fitting = [contents for contents in fullest if member.contents.items() <= contents.items()]
            if len(fitting) == 1:
                member.contents = fitting[0]


def _identity(folder: Folder) -> RunIdentity | None:
    try:
        return _identify(folder, _mapping(folder / "config.yaml"), _summary(folder / "summary.json"))
    except _DAMAGE:
        return None


def _mapping(path: Folder) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"it has no {path.name}")
    try:
        content = _parsed(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is not valid YAML") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is empty")
    return content


# The runs of a search have the same protocol.
@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> Any:
    return yaml.load(text, _YAML_LOADER)


def _text(path: Folder) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _summary(path: Folder) -> dict[str, Any]:
    # A damaged summary may be ignored, because the log has the same values.
    try:
        content = json.loads(_text(path))
    except json.JSONDecodeError:
        return {}
    return content if isinstance(content, dict) else {}


def _cells(content: bytes) -> dict[str, Sequence[str]]:
    """Return the cells of a log by column.

    Raises:
        ValueError: it is not a table.
    """
    # A run that was killed may have left a part of a line.
    content = content[: content.rfind(b"\n") + 1]
    try:
        head, *rows = filter(None, csv.reader(io.StringIO(content.decode("utf-8"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"metrics.csv cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError("metrics.csv cannot be read: it is empty") from error
    if any(len(row) != len(head) for row in rows):
        raise ValueError("metrics.csv cannot be read: its rows are of different lengths")
    columns = zip(*rows, strict=True) if rows else [()] * len(head)
    return dict(zip(head, columns, strict=True))


def _numbers(cells: dict[str, Sequence[str]]) -> Log:
    """Return the columns as numbers, NaN for an empty cell."""
    try:
        return {name: np.array([float(cell) if cell else np.nan for cell in column]) for name, column in cells.items()}
    except ValueError as error:
        raise ValueError("metrics.csv has a cell that is not a number") from error
