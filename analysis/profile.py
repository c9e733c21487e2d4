"""Compare optimizers over several tasks by a performance profile.

See Dolan and More (2002); AlgoPerf scores by it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from analysis.palette import styles
from analysis.results import GRAIN
from analysis.rows import AXIS, Group, Row
from analysis.style import STYLE, make_axes
from analysis.tables import Table, number
from experiment.target import Target

# The profile ends at this ratio, as those of AlgoPerf do.
FURTHEST = 4.0
# The optimizer whose level is the target of a task that has none.
REFERENCE = "adamw"


def target_of(group: Group) -> Target | None:
    """Return the level whose cost counts.

    It is the task's last target, or what half of the best AdamW's runs reach.
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


@dataclass(frozen=True)
class Cost:
    """Median gradient evaluations to a task's target.

    Where fewer than half of the runs reached it, ``value`` is how long they were watched.
    """

    value: float
    reached: bool


def costs(groups: Mapping[str, Group]) -> dict[str, dict[str, Cost]]:
    """Return by task the cost of each optimizer.

    Rows of a family are one optimizer, which has the cost of its faster row. Only optimizers that every task has are
    returned.
    """
    found: dict[str, dict[str, Cost]] = {}
    for task, group in groups.items():
        target = target_of(group)
        if target is None or AXIS not in group.axes:
            continue
        for row in group.rows:
            median = row.median(target, AXIS)
            if median is None:
                continue
            watched = np.inf if np.isnan(median.horizon) else median.horizon  # never, if every run diverged
            cost = Cost(watched, False) if median.median is None else Cost(median.median, True)
            by_optimizer, name = found.setdefault(task, {}), _family(group, row)
            by_optimizer[name] = min(cost, by_optimizer.get(name, cost), key=lambda one: (not one.reached, one.value))
    shared = [
        name for name in next(iter(found.values()), {}) if all(name in by_optimizer for by_optimizer in found.values())
    ]
    return {task: {name: by_optimizer[name] for name in shared} for task, by_optimizer in found.items()}


def _family(group: Group, row: Row) -> str:
    name = row.name if row.search is None else row.search[1]
    return next((family for family, names in group.families.items() if name in names), row.label)


def profile(
    by_task: Sequence[Mapping[str, Cost]], optimizer: str, optimistic: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return ratios, and the share of tasks within each of the best optimizer.

    The ratios ascend from 1 to :data:`FURTHEST`.

    Args:
        by_task: cost of every optimizer for each task.
        optimizer: one of them.
        optimistic: whether an optimizer that missed a target is taken to reach it where its runs end, and not never.
    """
    ratios = sorted(
        max(1.0, task[optimizer].value / best)
        for task in by_task
        if (best := min((one.value for one in task.values() if one.reached), default=np.nan)) > 0
        and (task[optimizer].reached or optimistic)
    )
    inside = [ratio for ratio in ratios if ratio <= FURTHEST]
    shares = [0.0, *(np.arange(1, len(inside) + 1) / len(by_task))]
    return np.asarray([1.0, *inside, FURTHEST]), np.asarray([*shares, shares[-1]])


def draw(by_task: Mapping[str, Mapping[str, Cost]]) -> Figure:
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


def table(groups: Mapping[str, Group], by_task: Mapping[str, Mapping[str, Cost]]) -> Table:
    """Return the costs behind the profile, and its scores."""
    names, tasks = list(next(iter(by_task.values()))), list(by_task.values())
    lines = []
    for task, by_optimizer in by_task.items():
        cells = [_text(by_optimizer[name]) for name in names]
        lines.append([task, str(target_of(groups[task])), *cells])
    scores = []
    for name in names:
        low, high = (f"{score(tasks, name, optimistic):.1f}" for optimistic in (False, True))
        scores.append(low if low == high else f"{low} to {high}")
    lines.append(["score", "-", *scores])
    notes = [
        "Median gradient evaluations over seeds, of the faster row of each optimizer. The target is the study's own, "
        "or a level that at least half of tuned AdamW's runs reach; AdamW cannot miss that one, and it comes near the "
        "end of its runs. Where fewer than half of the runs reached the target, the cost is greater than their length. "
        f"The score is the mean height of the profile for ratios from 1 to {FURTHEST:g}: 1 for an optimizer that no "
        "other beats. Its lower end counts a missed target as never reached, the upper one as reached where the runs "
        f"end. Optimizers that some study lacks are left out. {GRAIN} Where runs are validated seldom, most optimizers "
        "tie. Rows may differ in their length, and a schedule that ends earlier reaches a level earlier. Most rows "
        "were tuned for the value at the end, and not for this time. The scores have no interval: small differences "
        "between them say nothing."
    ]
    return Table("Cost by task", ["task", "target", *names], lines, notes, strong={len(lines) - 1})


def _text(cost: Cost) -> str:
    if np.isinf(cost.value):
        return "not reached"
    return number(cost.value) if cost.reached else f"> {number(cost.value)}"


def score(by_task: Sequence[Mapping[str, Cost]], optimizer: str, optimistic: bool = False) -> float:
    """Return the mean height of a profile between the ratios 1 and :data:`FURTHEST`."""
    x, y = profile(by_task, optimizer, optimistic)
    return float((np.diff(x) * y[:-1]).sum() / (FURTHEST - 1))
