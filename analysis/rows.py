"""Group runs into tables by task and protocol, and into rows by setting."""

import difflib
import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from analysis.runs import AXES, Problem, Run
from analysis.statistics import Mean, Median, Time, mean_interval, median_time
from experiment.identity import RunIdentity
from experiment.metric_names import with_slash
from experiment.target import Target

PUBLISHED = Path(__file__).with_name("published.yaml")


@dataclass
class Row:
    """Collect the runs of one setting, by seed.

    Attributes:
        label: its name in every table and picture.
        trials: how many settings were tried to find this one; ``None`` if it is not a search's.
        name: its label where the report gives it no other.
    """

    runs: dict[str, Run]
    label: str
    trials: int | None = None
    name: str = ""

    @property
    def names(self) -> set[str]:
        """The names by which it can be chosen as the baseline."""
        return {self.label, self.name, self.optimizer} - {""}

    @property
    def any(self) -> Run:
        """One of its runs, for what they have in common."""
        return next(iter(self.runs.values()))

    @property
    def optimizer(self) -> str:
        """Short name of its optimizer."""
        return self.any.identity.optimizer

    @property
    def search(self) -> tuple[str, str] | None:
        """The search that found its settings and its name there; ``None`` if it is not a search's."""
        sweep = self.any.identity.sweep
        return None if sweep is None else (sweep.name, sweep.optimizer)

    @property
    def diverged(self) -> int:
        """How many of its runs ended with a loss that was not finite."""
        return sum(run.diverged for run in self.runs.values())

    def best(self, metric: str, lower: bool) -> dict[str, float]:
        """Return the best value of a metric by seed."""
        return {seed: run.best(metric, lower) for seed, run in self.runs.items()}

    def last(self, metric: str) -> dict[str, float]:
        """Return the last value of a metric by seed, NaN for runs that diverged."""
        return {seed: run.last(metric) for seed, run in self.runs.items()}

    def times(self, target: Target, axis: str) -> dict[str, Time]:
        """Return when each seed reached ``target``, on an axis.

        Runs that did not log the axis, see :data:`analysis.runs.AXES`, are left out.
        """
        times = {}
        for seed, run in self.runs.items():
            end = np.inf if run.diverged else run.at_end(axis)
            if end is not None:
                times[seed] = Time(run.reached(target, axis), end)
        return times

    def median(self, target: Target, axis: str) -> Median | None:
        """Return the median time to ``target``; ``None`` where the axis was not logged."""
        times = list(self.times(target, axis).values())
        return median_time(times) if times else None

    def mean_at_end(self, axis: str) -> Mean:
        """Return the mean over seeds of how far the runs got on an axis."""
        return mean_interval([end for run in self.runs.values() if (end := run.at_end(axis)) is not None])


@dataclass
class Group:
    """Collect the rows of one table, of one task and protocol.

    Attributes:
        metric, lower: the metric that the runs' checkpoints monitor, and whether less of it is better.
        targets: levels to reach; rows are ranked by :attr:`goal`.
        borrowed: whether the targets are those of another protocol of the task.
        published: entry of ``published.yaml`` whose protocol this is, or empty.
        sweeps: trials of searches, by (name of the search, optimizer).
        failed: number of further trials that left no readable run, by the same keys.
        milestones: the metric of each milestone that the task has, by its name.
    """

    task: str
    digest: str
    rows: list[Row]
    metric: str
    lower: bool
    targets: list[Target]
    published: dict[str, Any] = field(default_factory=dict)
    borrowed: bool = False
    sweeps: dict[tuple[str, str], list[Run]] = field(default_factory=dict)
    failed: Counter[tuple[str, str]] = field(default_factory=Counter)
    milestones: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Heading of its part of the report."""
        return str(self.published.get("title") or self.task.replace("_", " ").capitalize())

    @property
    def protocol(self) -> dict[str, Any]:
        """The options and data that the digest is computed from."""
        run = self.rows[0].any if self.rows else next(iter(self.sweeps.values()))[0]
        return {key: value for key, value in run.identity.protocol.items() if value is not None}

    @property
    def axes(self) -> list[str]:
        """The axes that some run of these rows has a column for."""
        runs = [run for row in self.rows for run in row.runs.values()]
        return [axis for axis in AXES if any(run.has(axis) for run in runs)]

    @property
    def aims(self) -> list[Target]:
        """The targets; of borrowed ones only those that some run reached."""
        runs = [run for row in self.rows for run in row.runs.values()]
        return [t for t in self.targets if not self.borrowed or any(run.reached(t) is not None for run in runs)]

    @property
    def goal(self) -> Target | None:
        """The last of :attr:`aims`."""
        return self.aims[-1] if self.aims else None

    def stopped_on(self, row: Row, metric: str) -> bool:
        """Return whether a run of ``row`` was stopped at a level of ``metric``.

        Its best and last value are then those of that level for every optimizer.
        """
        names = {run.stopped_at for run in row.runs.values()} - {None}
        return any(self.milestones.get(str(name), metric) == metric for name in names)

    def order(self, row: Row) -> tuple[float, ...]:
        """Sort rows by gradient evaluations to the last target, then by best value."""
        axis = "cost/gradient_evaluations" if "cost/gradient_evaluations" in self.axes else "epoch"
        goal = self.goal
        median = row.median(goal, axis) if goal else None
        best = mean_interval(list(row.best(self.metric, self.lower).values())).mean
        time = np.inf if median is None or median.median is None else median.median
        return time, np.nan_to_num(best if self.lower else -best, nan=np.inf)


def check_names(groups: Sequence[Group], baseline: str | None, targets: Sequence[Target]) -> None:
    """Refuse an unknown baseline, and a target whose metric no run has logged.

    Raises:
        ValueError: such a name, with the nearest valid one.
    """
    rows = [row for entry in groups for row in entry.rows]
    names = {name for row in rows for name in row.names}
    if baseline is not None and baseline not in names:
        raise ValueError(f"no row or optimizer is named {baseline}, the --baseline{_nearest(baseline, names)}")
    metrics = {str(column) for row in rows for run in row.runs.values() for column in run.log}
    for target in targets:
        if target.metric not in metrics:
            raise ValueError(
                f"no run logged {target.metric}, the metric of a --target{_nearest(target.metric, metrics)}"
            )


def _nearest(name: str, names: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.0)
    return f"; did you mean {found[0]}?" if found else ""


def matches(options: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Return whether a run's options have all these settings.

    An option that is absent is ``None``.
    """
    return all(options.get(key) == value for key, value in settings.items())


def group(
    runs: Iterable[Run],
    problems: Iterable[Problem] = (),
    targets: Sequence[Target] = (),
    labels: Mapping[str, str] | None = None,
) -> list[Group]:
    """Sort runs into groups and rows.

    Args:
        runs: of any tasks. Trials of a sweep do not become rows.
        problems: folders from which no run could be read. Trials among them count in the tuning budget.
        targets: in place of those of the task in ``published.yaml``, or else of the milestones in the runs' configs.
        labels: of rows, by their names.
    """
    by_protocol: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        by_protocol.setdefault((run.identity.task, run.identity.protocol_digest), []).append(run)
    published = published_entries()
    lost = [problem.identity for problem in problems if problem.identity and _is_trial(problem.identity)]
    groups = []
    for (task, digest), members in sorted(by_protocol.items()):
        options = members[0].identity.options
        entries = [entry for entry in published.values() if entry["task"] == task]
        entry: dict[str, Any] = next((entry for entry in entries if matches(options, entry["protocol"])), {})
        own = [] if entries else list(dict.fromkeys(target for run in members for target in run.milestones))
        levels = own or [Target(**target) for target in (entry or next(iter(entries), {})).get("targets", [])]
        found = Group(
            task,
            digest,
            rows=[],
            metric=with_slash(str(options.get("checkpoint.monitor") or "val/loss")),
            lower=options.get("checkpoint.mode", "min") == "min",
            targets=list(targets) or levels,
            published=entry,
            borrowed=not targets and not entry and not own,
            milestones={target.name: target.metric for target in levels},
        )
        for identity in lost:
            if identity.sweep and (identity.task, identity.protocol_digest) == (task, digest):
                found.failed[identity.sweep.name, identity.sweep.optimizer] += 1
        searches = {run.identity.sweep.name if run.identity.sweep else None for run in members}
        rows: dict[tuple[str, str, str], Row] = {}
        for run in members:
            sweep = run.identity.sweep
            if sweep is not None and _is_trial(run.identity):
                found.sweeps.setdefault((sweep.name, sweep.optimizer), []).append(run)
                continue
            name = run.identity.experiment if sweep is None else f"{sweep.optimizer} of {sweep.name}"
            of_search = "" if sweep is None else name
            if sweep is not None and len(searches) == 1:
                name = sweep.optimizer  # its name is unambiguous
            # Unfinished runs of different lengths are not repeats of each other.
            far = f", {run.so_far}" if run.so_far else ""
            label = (labels or {}).get(name, name)
            key = (run.identity.setting_digest, of_search, run.so_far)
            row = rows.setdefault(key, Row({}, label + far, name=name + far))
            row.runs[run.identity.seed] = run
        for row in rows.values():
            search = row.search
            if search is not None:
                # A trial that ran again on further seeds is one setting.
                settings = {run.identity.sweep.trial for run in found.sweeps.get(search, []) if run.identity.sweep}
                row.trials = len(settings) + found.failed[search]
        found.rows = list(rows.values())
        _tell_apart(found.rows)
        found.rows.sort(key=found.order)
        groups.append(found)
    return groups


@functools.cache
def published_entries() -> dict[str, dict[str, Any]]:
    """Return the entries of ``published.yaml`` by name."""
    entries: dict[str, dict[str, Any]] = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    return entries


def _is_trial(identity: RunIdentity) -> bool:
    return identity.sweep is not None and identity.sweep.trial is not None


def _tell_apart(rows: list[Row]) -> None:
    """Add to labels that several rows have the options in which these rows differ."""
    by_label: dict[str, list[Row]] = {}
    for row in rows:
        by_label.setdefault(row.label, []).append(row)
    for label, same in by_label.items():
        if len(same) == 1:
            continue
        settings = [row.any.identity.setting for row in same]
        if _differs("model.optimizer", settings):
            # Optimizers of different classes differ in most of their options, which would fill the label.
            for row, setting in zip(same, settings, strict=True):
                row.label = f"{label}, optimizer {setting.get('model.optimizer')}"
            _tell_apart(same)
            continue
        keys = [key for key in dict.fromkeys(key for s in settings for key in s) if _differs(key, settings)]
        for row, setting in zip(same, settings, strict=True):
            options = [f"{key.partition('.')[2]} {value_text(setting.get(key))}" for key in keys]
            row.label = ", ".join([label, *options])


def value_text(value: Any) -> str:
    """Return an option as text; a callback is its class's name and options."""
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return " and ".join(map(value_text, value))
    if not isinstance(value, dict) or "class_path" not in value:
        return str(value)
    stated = {key: option for key, option in (value.get("init_args") or {}).items() if option is not None}
    options = ", ".join(f"{key} {value_text(option)}" for key, option in stated.items())
    name = str(value["class_path"]).rpartition(".")[2]
    return f"{name} ({options})" if options else name


def _differs(key: str, settings: list[dict[str, Any]]) -> bool:
    return any(setting.get(key) != settings[0].get(key) for setting in settings)
