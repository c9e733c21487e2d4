"""Build the tables of one task."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from analysis.rows import Group, Row, matches
from analysis.runs import AXES
from analysis.statistics import Mean, bounded_interval, geometric_interval, holm, median_coverage, paired, race
from analysis.tables import Table, mean_text, median_text, number
from experiment.quantities import count, quantity
from experiment.target import Target


def is_share(metric: str) -> bool:
    """Return whether a metric is a part of 1, to be shown in percent."""
    return metric.rpartition("/")[2] in ("accuracy", "acc")


def metric_text(metric: str, mean: Mean, digits: int = 4) -> str:
    """Return a mean of a metric with its interval, in percent where that is usual."""
    if not is_share(metric):
        return mean_text(mean, digits)
    scaled = [None if value is None else 100 * value for value in (mean.mean, mean.low, mean.high)]
    if np.isnan(mean.mean):
        return number(mean.mean)
    shown = [None if value is None else f"{value:.2f}" for value in scaled]
    return f"{shown[0]} %" if shown[1] is None else f"{shown[0]} % [{shown[1]}, {shown[2]}]"


def _mean(metric: str, values: dict[str, float]) -> Mean:
    return bounded_interval(list(values.values()), 1.0 if is_share(metric) else np.inf)


def _coverage(group: Group) -> str:
    counts = sorted({len(row.runs) for row in group.rows} - {1})
    covered = [f"{100 * median_coverage(n):.3g} % for {count(n, 'run')}" for n in counts]
    return f" The intervals of medians are meant to cover 95 %; they cover {', '.join(covered)}." if covered else ""


def _row_name(row: Row) -> str:
    named = row.optimizer in row.label or row.label in row.optimizer or row.label != (row.name or row.label)
    return row.label if named else f"{row.label} ({row.optimizer})"


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
    return metric_text(group.metric, _mean(group.metric, values))


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
        cells = [metric_text(name, _mean(name, row.last(name))) for name in tests]
        for metric in metrics:
            lower = group.lower if metric == group.metric else True
            values = row.best(metric, lower), row.last(metric)
            cells += [metric_text(metric, _mean(metric, found)) for found in values]
        trials = "none" if row.trials is None else str(row.trials)
        diverged = f", {row.diverged} diverged" if row.diverged else ""
        lines.append([_row_name(row), f"{len(row.runs)}{diverged}", trials, _epochs(row), *cells])
    notes = [
        "Mean and 95 % t-interval over seeds, on the logit scale for percentages and on the log scale for other "
        "positive values. Runs that diverged have no last value and miss every target."
    ]
    counts = {row.trials for row in group.rows}
    if len(counts) > 1:
        notes.append("The rows were not tuned with equal budgets: the numbers of trials differ.")
    if len(group.rows) > 1 and (missing := _missing_seeds(group)):
        notes.append(missing)
    return Table("Results", ["row", "seeds", "tuning trials", "at most epochs", *tests, *heads], lines, notes)


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
        f"longer than it was watched.{_coverage(group)}"
    ]
    return Table("Milestones", ["row", *heads], lines, notes)


def to_target(group: Group) -> Table | None:
    """Return the cost of reaching the goal on every axis; ``None`` without one."""
    target = group.goal
    if target is None:
        return None
    lines = []
    found = [row.median(target, "cost/flops") for row in group.rows if "cost/flops" in group.axes]
    flop = _flop([part for m in found if m is not None for part in (m.median, m.low, m.high or m.horizon)])
    for row in group.rows:
        medians = [row.median(target, axis) for axis in group.axes]
        counts = next((f"{m.reached} of {m.n}" for m in medians if m is not None), "-")
        texts = [
            "-" if median is None else median_text(median, flop if axis == "cost/flops" else number)
            for axis, median in zip(group.axes, medians, strict=True)
        ]
        lines.append([row.label, counts, *texts])
    notes = [
        "Median over seeds and its interval. Seconds are of training alone, and compare only between runs on one "
        f"machine that did nothing else.{_coverage(group)}"
    ]
    return Table(f"Cost of reaching {target}", ["row", "reached", *(AXES[axis] for axis in group.axes)], lines, notes)


def _flop(column: Iterable[float | None]) -> Callable[[float | None], str]:
    """Return a function that writes the numbers of a column with one prefix."""
    largest = max((value for value in column if value is not None and value == value), default=0.0)
    return lambda value: "-" if value is None else quantity(value, "FLOP", largest)


def baseline(group: Group, wanted: str | None) -> Row | None:
    """Return the row that others are compared with.

    Without a wanted one it is the best AdamW, or else the best row. ``None`` is returned where the wanted one is not in
    this group, or where there is nothing to compare.
    """
    if len(group.rows) < 2:
        return None
    if wanted is not None:
        return next((row for row in group.rows if wanted in row.names), None)
    return next((row for row in group.rows if row.optimizer == "adamw"), group.rows[0])


def pairs(group: Group, reference: Row) -> Iterator[Table]:
    """Yield the comparisons with one row on common seeds.

    One is of best values, the other of the order in which rows reached the goal. Nothing is yielded where no row has
    two seeds in common with it.
    """
    others = [row for row in group.rows if row is not reference]
    stopped = group.stopped_on(reference, group.metric)
    if max((len(row.runs.keys() & reference.runs.keys()) for row in others), default=0) < 2:
        return
    scale, unit = (100, " (points)") if is_share(group.metric) else (1, "")
    values = reference.best(group.metric, group.lower)
    compared = [
        None if stopped or group.stopped_on(row, group.metric) else paired(row.best(group.metric, group.lower), values)
        for row in others
    ]
    adjusted = holm([np.nan if pair is None else pair.p for pair in compared])
    lines = []
    for row, pair, p in zip(others, compared, adjusted, strict=True):
        if pair is None:
            lines.append([row.label, str(len(row.runs.keys() & values.keys())), "-", "-", "-", "-"])
            continue
        d = pair.difference
        scaled = Mean(d.n, scale * d.mean, *(None if v is None else scale * v for v in (d.low, d.high)))
        cells = [mean_text(scaled, 3), number(pair.p, 2), number(p, 2), number(scale * pair.detectable, 3)]
        lines.append([row.label, str(d.n), *cells])
    heads = ["row", "common seeds", f"difference{unit}", "p", "p (Holm)", f"smallest detectable{unit}"]
    notes = [
        f"Best {group.metric} minus that of {reference.label}, paired by seed: mean, 95 % interval and paired t-test. "
        "p (Holm) is adjusted for the number of rows. The last column is the true difference that this number of seeds "
        "detects with a power of 80 % at the 5 % level; smaller ones are not excluded. A dash marks fewer than two "
        f"common seeds, seeds without scatter, or runs that were stopped when {group.metric} had reached a level, so "
        "that its final value is unknown."
    ]
    if any(pair is not None for pair in compared):
        yield Table(f"Paired seeds against {reference.label}: best {group.metric}", heads, lines, notes)
    axis = "cost/gradient_evaluations"
    target = group.goal
    if target is None or axis not in group.axes:
        return
    races = [race(row.times(target, axis), reference.times(target, axis)) for row in others]
    adjusted, adjusted_ratio = holm([r.p for r in races]), holm([r.p_ratio for r in races])
    further = [axis for axis in ("cost/optimizer_steps", "cost/training_seconds") if axis in group.axes]

    def ratio_on(row: Row, axis: str) -> str:
        ratio = race(row.times(target, axis), reference.times(target, axis)).ratio
        return "-" if ratio is None else mean_text(ratio, 3)

    lines = [
        [
            row.label,
            f"{r.first} / {r.second} / {r.undecided}",
            number(r.p, 2),
            number(p, 2),
            "-" if r.ratio is None else mean_text(r.ratio, 3),
            number(r.p_ratio, 2),
            number(p_ratio, 2),
            *(ratio_on(row, other) for other in further),
        ]
        for row, r, p, p_ratio in zip(others, races, adjusted, adjusted_ratio, strict=True)
    ]
    heads = [
        "row",
        "first / second / undecided",
        "p",
        "p (Holm)",
        "ratio of evaluations",
        "p of ratio",
        "p of ratio (Holm)",
        *(f"ratio of {AXES[other]}" for other in further),
    ]
    notes = [
        f"Gradient evaluations to {target} against {reference.label}, paired by seed: how often the row was first, and "
        "the sign test, whose p cannot be below 0.0625 with five seeds. The ratio is a geometric mean with its 95 % "
        "interval, and its p is of the t-test of the logarithms. Ratios are shown only if both rows reached the target "
        "on every common seed. Below 1 the row needs less."
    ]
    yield Table(f"Paired seeds against {reference.label}: {target}", heads, lines, notes)


def step_cost(group: Group, reference: Row | None) -> Table | None:
    """Return the cost of a step; ``None`` where costs were not logged."""
    if "cost/training_seconds" not in group.axes or "cost/optimizer_steps" not in group.axes:
        return None

    def ratio(row: Row, above: str, below: str, factor: float = 1.0) -> Mean:
        runs = row.runs.values()
        ends = [(run.at_end(above), run.at_end(below)) for run in runs]
        return geometric_interval([factor * a / b for a, b in ends if a and b])

    lines = []
    flops = [ratio(row, "cost/flops", "cost/optimizer_steps").mean for row in group.rows]
    flop = _flop(flops)
    for row, flops_per_step in zip(group.rows, flops, strict=True):
        step = ratio(row, "cost/training_seconds", "cost/optimizer_steps", 1000)
        base = ratio(reference, "cost/training_seconds", "cost/optimizer_steps", 1000) if reference else step
        lines.append(
            [
                row.label,
                mean_text(step, 3),
                number(step.mean / base.mean, 3),
                number(ratio(row, "cost/gradient_evaluations", "cost/optimizer_steps").mean, 3),
                number(ratio(row, "cost/training_seconds", "cost/gradient_evaluations", 1000).mean, 3),
                flop(flops_per_step),
                _machines(row),
            ]
        )
    against = reference.label if reference else "itself"
    heads = ["row", "ms a step", f"over {against}", "evaluations a step", "ms an evaluation", "FLOPs a step", "machine"]
    notes = [
        "Geometric mean over seeds, with its 95 % interval. Training alone, without evaluation; times compare only "
        "within one machine that did nothing else."
    ]
    return Table("Step cost", heads, lines, notes)


def _machines(row: Row) -> str:
    found = set()
    for run in row.runs.values():
        environment = run.summary.get("environment") or {}
        accelerator = environment.get("accelerator", "none")
        where = environment.get("processor", "not recorded") if accelerator == "none" else accelerator
        found.add(f"{where}, {environment['threads']} threads" if "threads" in environment else str(where))
    return "; ".join(sorted(found))
