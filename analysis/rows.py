"""Group runs into tables by task and protocol, and into rows by setting."""

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from analysis.labels import tell_apart
from analysis.palette import Style, styles
from analysis.runs import AXES, Problem, Run
from analysis.statistics import mean_interval
from analysis.times import Median, Time, median_time
from experiment.identity import RunIdentity
from experiment.metric_names import with_slash
from experiment.target import Target

PUBLISHED = Path(__file__).with_name("published.yaml")
# Headings of tasks whose protocol is not a published one.
TITLES = {"modular_addition": "Modular addition", "cifar": "CIFAR-10", "wikitext": "WikiText-2"}
# The axis of costs: a step with a second pass counts as two.
AXIS = "cost/gradient_evaluations"


@dataclass
class Row:
    """Collect the runs of one setting, by seed.

    Attributes:
        label: its name in every table and picture.
        trials: how many settings were tried to find this one; ``None`` if it is not a search's.
        name: its label where the report gives it no other.
        style: of its lines and marks in every picture.
    """

    runs: dict[str, Run]
    label: str
    trials: int | None = None
    name: str = ""
    style: Style = field(default_factory=Style)

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
    def tuning(self) -> str:
        """How many settings were tried to find this one, in words.

        A search of a single setting only states it.
        """
        return str(self.trials) if self.trials is not None and self.trials > 1 else "none"

    @property
    def diverged(self) -> int:
        """How many of its runs ended with a loss that was not finite."""
        return sum(run.diverged for run in self.runs.values())

    @property
    def seeds(self) -> str:
        """How many seeds it has, and how many of them diverged, in words."""
        return f"{len(self.runs)}, {self.diverged} diverged" if self.diverged else str(len(self.runs))

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


@dataclass(frozen=True)
class Measure:
    """What the rows of a table are ranked by: evaluations to a target, or a metric.

    Attributes:
        target: the level to reach, if it is a time.
        column: the axis of that time, or the metric.
        lower: whether less is better.
    """

    target: Target | None
    column: str
    lower: bool

    def __str__(self) -> str:
        return self.column if self.target is None else f"{AXES[self.column]} to {self.target}"

    @property
    def tested(self) -> bool:
        """Whether it is a metric of the test after training."""
        return self.column.startswith("test/")

    @property
    def title(self) -> str:
        """Its name as the head of a column; of a validation metric the best value counts."""
        return str(self) if self.target is not None or self.tested else f"best {self}"

    def values(self, row: Row) -> dict[str, float]:
        """Return the values of a metric by seed.

        Those of a validation metric are of the best epoch.
        A time has none, see :meth:`Row.times`.
        """
        return row.last(self.column) if self.tested else row.best(self.column, self.lower)

    def of_trial(self, run: Run) -> float | None:
        """Return the value of a trial, ``None`` if it has none.

        Trials are not tested, so a metric is that of validation.
        """
        if self.target is not None:
            return run.reached(self.target, self.column)
        value = run.best(self.column.replace("test/", "val/"), self.lower)
        return None if np.isnan(value) else value


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
        labels: of rows by their names, also of those that only have trials.
        families: names of a search's rows that belong together, by that of the family.
        baseline: what the study names as its baseline.
        heading: title of the study, where a report has several.
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
    labels: Mapping[str, str] = field(default_factory=dict)
    families: Mapping[str, Sequence[str]] = field(default_factory=dict)
    baseline: str | None = None
    heading: str = ""

    @property
    def title(self) -> str:
        """Heading of its part of the report."""
        return str(
            self.heading
            or self.published.get("title")
            or TITLES.get(self.task)
            or self.task.replace("_", " ").capitalize()
        )

    def trials_of(self, search: str, name: str) -> int:
        """Return how many settings a search tried for a row.

        One that ran again on further seeds counts once.
        """
        trials = {run.identity.sweep.trial for run in self.sweeps.get((search, name), []) if run.identity.sweep}
        return len(trials) + self.failed[search, name]

    def searched_for(self, row: Row) -> list[str]:
        """Return the names of a search's rows whose trials found a row.

        They are its own name, and of its family those without a row of their own.
        """
        assert row.search is not None
        search, winner = row.search
        won = {other.search[1] for other in self.rows if other.search is not None and other.search[0] == search}
        family = next((names for names in self.families.values() if winner in names), ())
        return [winner, *(name for name in family if name not in won and self.trials_of(search, name))]

    def label_of(self, search: str, name: str) -> str:
        """Return the label of a row of a search, which may have only trials."""
        return next((row.label for row in self.rows if row.search == (search, name)), self.labels.get(name, name))

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

    @property
    def measure(self) -> Measure:
        """What rows are ranked by.

        It is the test metric if every row was tested; else gradient evaluations to the last target, unless that is
        borrowed from another protocol or no run reached it; else the best value of the metric.
        """
        test = f"test/{self.metric.removeprefix('val/')}"
        if self.rows and all(any(run.has(test) for run in row.runs.values()) for row in self.rows):
            return Measure(None, test, self.lower)
        axis = AXIS if AXIS in self.axes else "epoch"
        goal, runs = self.goal, [run for row in self.rows for run in row.runs.values()]
        if goal is not None and not self.borrowed and any(run.reached(goal) is not None for run in runs):
            return Measure(goal, axis, True)
        return Measure(None, self.metric, self.lower)

    def stopped_on(self, row: Row, metric: str) -> bool:
        """Return whether a run of ``row`` was stopped at a level of a metric of this stage.

        The best and last value are then those of that level, or of the time at which the run reached it.
        """
        names = {run.stopped_at for run in row.runs.values()} - {None}
        stage = metric.partition("/")[0]
        return any(self.milestones.get(str(name), metric).partition("/")[0] == stage for name in names)

    def order(self, row: Row) -> tuple[float, ...]:
        """Sort rows by the measure.

        Rows without a median are sorted by how many runs missed the target, and then by the best value.
        """
        measure, time, missed = self.measure, 0.0, 0.0
        if measure.target is not None:
            median = row.median(measure.target, measure.column)
            time = np.inf if median is None or median.median is None else median.median
            missed = 1.0 if median is None else 1 - median.reached / median.n
        values = measure.values(row) if measure.target is None else row.best(self.metric, self.lower)
        best = mean_interval(list(values.values())).mean
        lower = measure.lower if measure.target is None else self.lower
        return time, missed if np.isinf(time) else 0.0, np.nan_to_num(best if lower else -best, nan=np.inf)


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
    families: Mapping[str, Sequence[str]] | None = None,
) -> list[Group]:
    """Sort runs into groups and rows.

    Args:
        runs: of any tasks. Trials of a sweep do not become rows.
        problems: folders from which no run could be read. Trials among them count in the tuning budget.
        targets: in place of those of the task in ``published.yaml``, or else of the milestones in the runs' configs.
        labels: of rows, by their names.
        families: names of a search's rows that belong together; they share a colour.
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
        stated = [] if entries else list(dict.fromkeys(target for run in members for target in run.milestones))
        levels = stated or [Target(**target) for target in (entry or next(iter(entries), {})).get("targets", [])]
        found = Group(
            task,
            digest,
            rows=[],
            metric=with_slash(str(options.get("checkpoint.monitor") or "val/loss")),
            lower=options.get("checkpoint.mode", "min") == "min",
            targets=list(targets) or levels,
            published=entry,
            borrowed=not targets and not entry and not stated,
            milestones={target.name: target.metric for target in levels},
            labels=labels or {},
            families=families or {},
        )
        for identity in lost:
            if identity.sweep and (identity.task, identity.protocol_digest) == (task, digest):
                found.failed[identity.sweep.name, identity.sweep.optimizer] += 1
        only_searches = all(run.identity.sweep is not None for run in members)
        named = {run.identity.sweep for run in members if run.identity.sweep is not None}
        searches = Counter(name for _, name in {(sweep.name, sweep.optimizer) for sweep in named})
        rows: dict[tuple[str, str, str], Row] = {}
        for run in members:
            sweep = run.identity.sweep
            if sweep is not None and _is_trial(run.identity):
                found.sweeps.setdefault((sweep.name, sweep.optimizer), []).append(run)
                continue
            name = run.identity.row
            of_search = "" if sweep is None else name
            if sweep is not None and only_searches and searches[sweep.optimizer] == 1:
                name = sweep.optimizer  # it is unambiguous
            # Unfinished runs of different lengths are not repeats of each other.
            far = f", {run.so_far}" if run.so_far else ""
            label = (labels or {}).get(name, name)
            key = (run.identity.setting_digest, of_search, run.so_far)
            row = rows.setdefault(key, Row({}, label + far, name=name + far))
            row.runs[run.identity.seed] = run
        found.rows = list(rows.values())
        for row in found.rows:
            if row.search is not None:
                row.trials = sum(found.trials_of(row.search[0], name) for name in found.searched_for(row))
        tell_apart(found.rows)
        # A list that is being sorted in place is empty to whoever reads it, as the measure does.
        found.rows = sorted(found.rows, key=found.order)
        for row, style in zip(found.rows, styles([_in_family(row) for row in found.rows], families), strict=True):
            row.style = style
        groups.append(found)
    return groups


@functools.cache
def published_entries() -> dict[str, dict[str, Any]]:
    """Return the entries of ``published.yaml`` by name."""
    entries: dict[str, dict[str, Any]] = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    return entries


def _in_family(row: Row) -> str:
    return row.name if row.search is None else row.search[1]


def _is_trial(identity: RunIdentity) -> bool:
    return identity.sweep is not None and identity.sweep.trial is not None
