"""Compare optimizers over several tasks by a performance profile (Dolan and More 2002), as AlgoPerf does."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from analysis.palette import styles
from analysis.rows import AXIS, Group, Row
from analysis.style import STYLE, make_axes
from analysis.tables import Table, number
from experiment.target import Target

# The profile ends at this ratio, as those of AlgoPerf do.
FURTHEST = 4.0
# The optimizer whose level is the target of a task that has none.
REFERENCE = "adamw"


def target_of(group: Group) -> Target | None:
    """Return the level whose cost counts: the task's last target, or what half of the best AdamW's runs reach.

    ``None`` without either.
    """
    if group.goal is not None and not group.borrowed:
        return group.goal
    row = next((row for row in group.rows if row.optimizer == REFERENCE), None)
    best = [] if row is None else [x for x in row.best(group.metric, group.lower).values() if np.isfinite(x)]
    if not best:
        return None
    # Of two middle values the one that half of the runs reach. A lower-is-better level is to be undercut.
    level = float(np.quantile(best, 0.5, method="higher" if group.lower else "lower"))
    if group.lower:
        level = float(np.nextafter(np.float32(level), np.float32(np.inf)))
    return Target("profile", group.metric, level, group.lower)


def costs(groups: Mapping[str, Group]) -> dict[str, dict[str, float]]:
    """Return by task the median gradient evaluations that each optimizer needs for the task's target.

    Rows of a family are one optimizer, which has the cost of its faster row. Only those that every task has are
    returned. The cost is infinite where fewer than half of the runs reached the target.
    """
    found: dict[str, dict[str, float]] = {}
    for task, group in groups.items():
        target = target_of(group)
        if target is None or AXIS not in group.axes:
            continue
        for row in group.rows:
            median = row.median(target, AXIS)
            cost = np.inf if median is None or median.median is None else median.median
            by_optimizer = found.setdefault(task, {})
            name = _family(group, row)
            by_optimizer[name] = min(cost, by_optimizer.get(name, np.inf))
    shared = [
        name for name in next(iter(found.values()), {}) if all(name in by_optimizer for by_optimizer in found.values())
    ]
    return {task: {name: by_optimizer[name] for name in shared} for task, by_optimizer in found.items()}


def _family(group: Group, row: Row) -> str:
    name = row.name if row.search is None else row.search[1]
    return next((family for family, names in group.families.items() if name in names), row.label)


def profile(by_task: Sequence[Mapping[str, float]], optimizer: str) -> tuple[np.ndarray, np.ndarray]:
    """Return ratios, ascending from 1 to :data:`FURTHEST`, and the share of tasks within each of the best optimizer.

    Args:
        by_task: cost of every optimizer for each task.
        optimizer: one of them.
    """
    finite = [task for task in by_task if np.isfinite(task[optimizer])]
    ratios = sorted(task[optimizer] / min(task.values()) for task in finite)
    inside = [ratio for ratio in ratios if ratio <= FURTHEST]
    shares = [0.0, *(np.arange(1, len(inside) + 1) / len(by_task))]
    return np.asarray([1.0, *inside, FURTHEST]), np.asarray([*shares, shares[-1]])


def draw(by_task: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw the profiles of all optimizers."""
    names = list(next(iter(by_task.values())))
    with matplotlib.rc_context(STYLE):
        figure, axes = make_axes("performance profile", "evaluations over those of the task's best", "tasks, %")
        for name, style in zip(names, styles(names), strict=True):
            x, y = profile(list(by_task.values()), name)
            axes.step(x, 100 * y, where="post", linewidth=1.7, alpha=0.9, **style.line)
            tops = np.flatnonzero(np.diff(x) > 0)[int(y[0] == y[1]) :]  # the top of every step
            axes.plot(x[tops], 100 * y[tops], markersize=6, **style.points)
            axes.plot([], [], label=name, linewidth=1.7, marker=style.marker, **style.line)
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 1.5, 2, 3, 4], ["1", "1.5", "2", "3", "4"])
        axes.minorticks_off()
        axes.set_xlim(0.97, FURTHEST)
        axes.set_ylim(-2, 104)
    return figure


def table(groups: Mapping[str, Group], by_task: Mapping[str, Mapping[str, float]]) -> Table:
    """Return the costs behind the profile, and the area below it that AlgoPerf scores by."""
    names = list(next(iter(by_task.values())))
    lines = []
    for task, by_optimizer in by_task.items():
        cells = ["not reached" if np.isinf(by_optimizer[name]) else number(by_optimizer[name]) for name in names]
        lines.append([task, str(target_of(groups[task])), *cells])
    lines.append(["score", "-", *(f"{score(list(by_task.values()), name):.2f}" for name in names)])
    notes = [
        "Median gradient evaluations over seeds, of the faster row of each optimizer. The target is the task's own, or "
        "the level that half of tuned AdamW's runs reach. The score is the mean height of the profile for ratios from "
        f"1 to {FURTHEST:g}: 1 for an optimizer that is the best on every task. Optimizers that some task lacks are "
        "left out. Costs are as fine as the distance between validations, and a few tasks are no sample of all tasks."
    ]
    return Table("Cost by task", ["task", "target", *names], lines, notes, strong={len(lines) - 1})


def score(by_task: Sequence[Mapping[str, float]], optimizer: str) -> float:
    """Return the mean height of a profile between the ratios 1 and :data:`FURTHEST`."""
    x, y = profile(by_task, optimizer)
    return float((np.diff(x) * y[:-1]).sum() / (FURTHEST - 1))
