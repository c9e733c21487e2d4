"""Draw how rows rank, and how many of their seeds reached the target."""

import textwrap

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from analysis.results import is_share, metric_mean, metric_text
from analysis.rows import AXIS, Group, Measure, Row
from analysis.runs import AXES
from analysis.style import INK, STYLE, WIDTH, label_plainly, make_axes
from analysis.tables import median_text
from analysis.times import Median, reached_share

# Characters of a row's name in a line of the ranking.
_WRAP = 22


def ranking(group: Group, reference: Row | None) -> Figure | None:
    """Draw the measure of every row.

    There are its seeds, the median or mean with its interval, and both as text.
    The best row is at the top. A dashed line is at the reference. Seeds that missed the target are hollow, at the
    right.

    Returns ``None`` where no row has a value, and for a single run.
    """
    measure = group.measure
    found = {row.label: _summary(measure, row) for row in group.rows}
    values = {row.label: _seeds(measure, row) for row in group.rows}
    finite = [x for seeds in values.values() for x in seeds if np.isfinite(x)]
    if not finite or sum(map(len, values.values())) < 2:
        return None
    names = [textwrap.fill(row.label, _WRAP) for row in group.rows]
    heights = [0.2 + 0.14 * name.count("\n") + 0.06 for name in names]
    height = sum(heights) + 0.85
    right = 0.2 + 0.057 * max(len(text) for *_, text in found.values())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), label=_title(measure))
        figure.subplots_adjust(left=1.62 / WIDTH, right=1 - right / WIDTH, bottom=0.48 / height, top=1 - 0.32 / height)
        axes = figure.add_subplot()
        figure.text(0.02, 1 - 0.2 / height, _title(measure), fontsize=10)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        wide = measure.target is not None and max(finite) > 3 * min(finite)
        if wide:
            axes.set_xscale("log")
            label_plainly(axes.xaxis)
        missed = max(finite) * 1.12 if wide else max(finite) + 0.06 * (np.ptp(finite) or abs(max(finite)) or 1.0)
        places = -np.cumsum([0, *(np.add(heights[:-1], heights[1:]) / 2)])
        for row, y in zip(group.rows, places, strict=True):
            middle, low, high, text = found[row.label]
            seeds = np.asarray(values[row.label])
            reached = seeds[np.isfinite(seeds)]
            axes.plot(reached, np.full(len(reached), y), markersize=3.5, alpha=0.45, **row.style.points)
            axes.plot(
                np.full(len(seeds) - len(reached), missed),
                np.full(len(seeds) - len(reached), y),
                markersize=5,
                markerfacecolor="none",
                **row.style.points,
            )
            if np.isfinite(middle):
                axes.plot([low, high], [y, y], color=row.style.colour, linewidth=2.4, solid_capstyle="butt")
                axes.plot([middle], [y], markersize=7, markeredgecolor=INK, markeredgewidth=0.6, **row.style.points)
            axes.annotate(text, (1, y), (6, 0), ("axes fraction", "data"), "offset points", va="center", fontsize=8)
        if reference is not None and np.isfinite(found[reference.label][0]):
            axes.axvline(
                found[reference.label][0], color=INK, linewidth=0.8, alpha=0.6, linestyle=(0, (4, 3)), zorder=0
            )
        axes.set_yticks(places, names)
        axes.set_ylim(places[-1] - heights[-1] / 2 - 0.04, heights[0] / 2 + 0.04)
        axes.set_xlabel(_axis_label(measure))
    return figure


def _title(measure: Measure) -> str:
    better = "fewer is better" if measure.target else f"{'lower' if measure.lower else 'higher'} is better"
    return f"{measure}, {better}"


def _axis_label(measure: Measure) -> str:
    if measure.target is not None:
        return AXES[measure.column]
    return f"{measure.column}{', %' if is_share(measure.column) else ''}"


def scale_of(measure: Measure) -> float:
    """Return 100 for a metric that is shown in percent, and else 1."""
    return 100.0 if measure.target is None and is_share(measure.column) else 1.0


def _seeds(measure: Measure, row: Row) -> list[float]:
    """Return the values of a row's seeds, infinite where one missed the target."""
    if measure.target is None:
        return [scale_of(measure) * value for value in measure.values(row).values() if np.isfinite(value)]
    times = row.times(measure.target, measure.column).values()
    return [np.inf if time.reached is None else time.reached for time in times]


def _summary(measure: Measure, row: Row) -> tuple[float, float, float, str]:
    """Return median or mean, both limits of its interval, and all of them as text."""
    if measure.target is not None:
        median = row.median(measure.target, measure.column)
        if median is None or median.median is None:
            return np.nan, np.nan, np.nan, "-" if median is None else median_text(median)
        return *_limits(median), median_text(median)
    mean = metric_mean(measure.column, measure.values(row))
    text = metric_text(measure.column, mean)
    scale = scale_of(measure)
    low, high = (mean.mean if limit is None else limit for limit in (mean.low, mean.high))
    return scale * mean.mean, scale * low, scale * high, text


def _limits(median: Median) -> tuple[float, float, float]:
    middle = np.nan if median.median is None else median.median
    low = middle if median.low is None else median.low
    high = middle if median.n < 2 else median.horizon if median.high is None else median.high
    return middle, low, high


def reached_over_cost(group: Group) -> Figure | None:
    """Draw the share of each row's seeds that had reached the goal (an ECDF).

    Runs that were not watched to the end count by Kaplan and Meier. Returns ``None`` where no seed reached it.
    """
    goal, axis = group.goal, AXIS if AXIS in group.axes else "epoch"
    if goal is None:
        return None
    times = {row.label: list(row.times(goal, axis).values()) for row in group.rows}
    reached = [time.reached for row in times.values() for time in row if time.reached is not None]
    if not reached:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = make_axes(f"seeds that reached {goal}", AXES[axis], "seeds, %")
        for row in group.rows:
            if not times[row.label]:
                continue
            x, y = reached_share(times[row.label])
            axes.step(
                x,
                100 * y,
                where="post",
                linewidth=1.5,
                marker=row.style.marker,
                markersize=4,
                markevery=[int(np.argmax(y))] if y.any() else [len(y) - 1],
                label=row.label,
                **row.style.line,
            )
        if max(reached) > 3 * min(reached):
            axes.set_xscale("log")
            label_plainly(axes.xaxis)
        axes.set_xlim(left=0.85 * min(reached))
        axes.set_ylim(-2, 103)
    return figure
