"""Build the tables of values, times and costs by row."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from analysis.rows import AXIS, Group, Row, matches
from analysis.runs import AXES
from analysis.statistics import Mean, bounded_interval
from analysis.tables import Table, mean_text, median_text, number, percent_text, quartiles_text
from analysis.times import median_coverage
from experiment.quantities import count, quantity
from experiment.target import Target

# Times are known only to a validation.
GRAIN = "Times are multiples of the distance between validations."
# Rows that a sentence names; of more it gives the number.
_FEW = 4


def is_share(metric: str) -> bool:
    """Return whether a metric is a part of 1, to be shown in percent."""
    return metric.rpartition("/")[2] in ("accuracy", "acc")


def metric_text(metric: str, mean: Mean, digits: int = 4) -> str:
    """Return a mean of a metric with its interval, in percent where that is usual."""
    if not is_share(metric):
        return mean_text(mean, digits)
    return number(mean.mean) if np.isnan(mean.mean) else percent_text(mean, 2)


def metric_mean(metric: str, values: Mapping[str, float]) -> Mean:
    """Return the mean of a metric, with an interval that stays in its range."""
    return bounded_interval(list(values.values()), 1.0 if is_share(metric) else np.inf)


def _coverage(group: Group) -> str:
    counts = sorted({len(row.runs) for row in group.rows} - {1})
    covered = [f"{100 * median_coverage(n):.3g} % for {count(n, 'run')}" for n in counts]
    return f" The intervals of medians are meant to cover 95 %; they cover {', '.join(covered)}." if covered else ""


def published(group: Group) -> Table | None:
    """Return the published numbers with the measured ones below each.

    ``None`` is returned where either kind is missing.
    """
    if not group.published:
        return None
    shown: list[str] = group.published["shown"]
    targets = {target.name: target for target in group.targets}
    lines: list[list[str]] = []
    strong = set()
    for entry in group.published["rows"]:
        for report in entry["published"]:
            cells = [report.get(name, "-") for name in shown]
            lines.append([f"{entry['label']}: {report['source']}", "-", str(entry.get("epochs", "-")), *cells])
        measured = [row for row in group.rows if matches(row.any.identity.options, entry["settings"])]
        for row in measured:
            cells = [_measured(group, row, name, targets) for name in shown]
            strong.add(len(lines))
            lines.append([f"{entry['label']}: measured ({row.label})", str(len(row.runs)), _epochs(row), *cells])
        if not measured:
            lines.append([f"{entry['label']}: no run here", *["-"] * (len(shown) + 2)])
    if not strong:
        return None
    heads = [f"{name}: {targets[name]}" if name in targets else f"{name} {group.metric}" for name in shown]
    notes = [
        "Published: one run each, by the ARS2 project. Targets in epochs, median and interval over seeds; "
        f"best and last as mean and 95 % interval.{_coverage(group)}"
    ]
    notes += [group.published["note"]] if "note" in group.published else []
    return Table("Published against measured", ["row", "seeds", "epochs", *heads], lines, notes, strong)


def _measured(group: Group, row: Row, name: str, targets: dict[str, Target]) -> str:
    if name in targets:
        median = row.median(targets[name], "epoch")
        return "-" if median is None else median_text(median)
    values = row.best(group.metric, group.lower) if name == "best" else row.last(group.metric)
    return metric_text(group.metric, metric_mean(group.metric, values))


def _epochs(row: Row) -> str:
    options = row.any.identity.options
    limit = options.get("trainer.max_epochs") or -1
    return str(limit) if limit > 0 else count(options.get("trainer.max_steps") or 0, "step")


def results(group: Group) -> Table:
    """Return best and last values of every row, its seeds and its tuning."""
    metrics = list(dict.fromkeys((group.metric, "val/loss")))
    heads = [f"{which} {metric}" for metric in metrics for which in ("best", "last")]
    # Of the best checkpoint, if it was tested after training.
    names = (f"test/{metric.removeprefix('val/')}" for metric in metrics)
    tests = [name for name in names if any(run.has(name) for row in group.rows for run in row.runs.values())]
    lines = []
    for row in group.rows:
        cells = [metric_text(name, metric_mean(name, row.last(name))) for name in tests]
        for metric in metrics:
            lower = group.lower if metric == group.metric else True
            values = row.best(metric, lower), row.last(metric)
            cells += [metric_text(metric, metric_mean(metric, found)) for found in values]
        lines.append([row.label, *cells, row.seeds, row.tuning, row.any.budget])
    notes = [
        "Mean over seeds. Its 95 % t-interval is carried over to the logit scale for percentages and to the log scale "
        "for other positive values, by the delta method. The best value of a run is that of its best validation, so it "
        "is optimistic. Runs that diverged have no last value and miss every target."
    ]
    if tests:
        notes.append(f"Tested after training: the checkpoint with the best {group.metric}.")
    if unequal := _unequal_tuning(group):
        notes.append(unequal)
    stopped = [row.label for row in group.rows if group.stopped_on(row, group.metric)]
    if stopped:
        notes.append(
            f"Runs of {named(stopped, len(group.rows))} were stopped when a validation metric had reached a level. "
            "Their values are of that time, so they say nothing of how good the row would become, and are not tested."
        )
    if len(group.rows) > 1 and (missing := _missing_seeds(group)):
        notes.append(missing)
    effort = ["seeds", "tuning trials", "at most"]
    optional = {*(heads[2:] if not tests else heads), *effort[1:]}
    return Table("Results", ["row", *tests, *heads, *effort], lines, notes, optional=optional)


def named(labels: Sequence[str], of: int) -> str:
    """Return the names of rows, or their number out of ``of`` if they are many."""
    if len(labels) == of and of > 1:
        return "all rows"
    return ", ".join(labels) if len(labels) <= _FEW else f"{len(labels)} of {of} rows"


def _unequal_tuning(group: Group) -> str:
    by_trials: dict[str, list[str]] = {}
    for row in group.rows:
        if row.trials != 1:  # a control repeats the settings of another row
            by_trials.setdefault(row.tuning, []).append(row.label)
    if len(by_trials) < 2:
        return ""
    parts = [
        f"{named(labels, len(group.rows))} ({trials}{'' if trials == 'none' else ' trials'})"
        for trials, labels in by_trials.items()
    ]
    return f"The rows were not tuned with equal budgets: {'; '.join(parts)}."


def _missing_seeds(group: Group) -> str:
    every = {seed for row in group.rows for seed in row.runs}
    absent = {row.label: sorted(every - row.runs.keys()) for row in group.rows}
    lacking = [f"{label} lacks {', '.join(seeds)}" for label, seeds in absent.items() if seeds]
    return f"Not every row has every seed: {'; '.join(lacking)}." if lacking else ""


def milestones(group: Group) -> Table | None:
    """Return the median epoch of reaching each target; ``None`` without targets."""
    targets = group.aims
    if not targets:
        return None
    heads = [str(target) for target in targets]
    lines = []
    for row in group.rows:
        medians = [row.median(target, "epoch") for target in targets]
        lines.append([row.label, *("-" if median is None else median_text(median) for median in medians)])
    notes = [
        "Epochs: Kaplan-Meier median over seeds and its interval. A run that ended without reaching a target counts as "
        f"needing more than its whole length.{_coverage(group)}"
    ]
    return Table("Milestones", ["row", *heads], lines, notes)


def to_target(group: Group) -> Table | None:
    """Return the cost of reaching the goal on every axis; ``None`` without one."""
    target = group.goal
    if target is None or not group.axes:
        return None
    lines = []
    found = [row.median(target, "cost/flops") for row in group.rows if "cost/flops" in group.axes]
    unit, flop = _flops([part for m in found if m is not None for part in (m.median, m.low, m.high or m.horizon)])
    for row in group.rows:
        medians = [row.median(target, axis) for axis in group.axes]
        counts = next((f"{m.reached} of {m.n}" for m in medians if m is not None), "-")
        texts = [
            "-" if median is None else median_text(median, flop if axis == "cost/flops" else number)
            for axis, median in zip(group.axes, medians, strict=True)
        ]
        first = next((m for m in medians if m is not None), None)
        lower, upper = (None, None) if first is None else first.quartiles
        lines.append([row.label, counts, *texts[:1], _range(lower, upper), *texts[1:]])
    notes = [
        f"Median over seeds and its interval. {GRAIN} The quartiles are the times by which a quarter and three "
        "quarters of the seeds had reached the target, a dash where fewer did. Seconds are of training alone, and "
        f"compare only between runs on one machine that did nothing else.{_coverage(group)}"
    ]
    first_axis, *axes = (unit if axis == "cost/flops" else AXES[axis] for axis in group.axes)
    heads = ["row", "reached", first_axis, f"quartiles of {first_axis}", *axes]
    return Table(f"Cost of reaching {target}", heads, lines, notes, optional={*axes} - {"training seconds"})


def _range(lower: float | None, upper: float | None) -> str:
    return "-" if lower is None else f"{number(lower)} to {number(upper)}"


def _flops(column: Sequence[float | None]) -> tuple[str, Callable[[float | None], str]]:
    """Return the unit of a column of FLOPs and a function that writes its numbers."""
    largest = max((value for value in column if value is not None and value == value), default=0.0)
    *_, unit = quantity(largest, "FLOPs").split()
    return unit, lambda value: "-" if value is None else quantity(value, "FLOPs", largest).split()[0]


def step_cost(group: Group, reference: Row | None) -> Table | None:
    """Return the cost of a step; ``None`` where costs were not logged."""
    if "cost/training_seconds" not in group.axes or "cost/optimizer_steps" not in group.axes:
        return None

    def of(row: Row, above: str, below: str, factor: float = 1.0) -> list[float]:
        ends = [(run.at_end(above), run.at_end(below)) for run in row.runs.values()]
        return [factor * a / b for a, b in ends if a and b]

    def median(row: Row, above: str, below: str, factor: float = 1.0) -> float:
        found = of(row, above, below, factor)
        return float(np.median(found)) if found else np.nan

    seconds, steps, evaluations = "cost/training_seconds", "cost/optimizer_steps", AXIS
    base = np.nan if reference is None else median(reference, seconds, steps, 1000)
    flops = [median(row, "cost/flops", steps) for row in group.rows]
    unit, flop = _flops(flops)
    lines = [
        [
            row.label,
            quartiles_text(of(row, seconds, steps, 1000), 3),
            number(median(row, seconds, steps, 1000) / base, 3),
            number(median(row, evaluations, steps), 3),
            number(median(row, seconds, evaluations, 1000), 3),
            flop(flops_per_step),
            _machines(row),
        ]
        for row, flops_per_step in zip(group.rows, flops, strict=True)
    ]
    against = reference.label if reference else "baseline"
    heads = [
        "row",
        "ms a step",
        f"over {against}",
        "evaluations a step",
        "ms an evaluation",
        f"{unit} a step",
        "machine",
    ]
    notes = [
        "Median over seeds, and in brackets the quartiles. Training alone, without evaluation; times compare only "
        "within one machine that did nothing else."
    ]
    return Table("Step cost", heads, lines, notes, optional={"machine"})


def _machines(row: Row) -> str:
    found = set()
    for run in row.runs.values():
        environment = run.summary.get("environment") or {}
        accelerator = environment.get("accelerator", "none")
        where = environment.get("processor", "not recorded") if accelerator == "none" else accelerator
        found.add(
            f"{where}, {count(int(environment['threads']), 'thread')}" if "threads" in environment else str(where)
        )
    return "; ".join(sorted(found))
