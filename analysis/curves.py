"""Draw metrics over epochs and costs, and the second passes of a run."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.palette import COLOURS
from analysis.results import is_share
from analysis.rows import Group, Row
from analysis.runs import AXES, Run, curve_title
from analysis.statistics import mean_intervals
from analysis.style import INK, STYLE, label_plainly, log_if_wide, make_axes, set_margins

_POINTS = 160
_FEW = 12
# With more rows the lines of single seeds would hide each other; the bands show their spread.
_SEEDS_SHOWN = 6


def band(curves: Sequence[tuple[np.ndarray, np.ndarray]], most: float | None = None) -> tuple[np.ndarray, ...]:
    """Return positions, mean, low and high of the 95 % interval over curves.

    They end with the shortest curve, because a later mean would be biased to surviving runs.

    Args:
        curves: positions, ascending, and values of each run.
        most: of values between 0 and this, whose interval should stay there.
    """
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.linspace(start, max(start, end), _POINTS)
    return grid, *mean_intervals(np.stack([np.interp(grid, x, y) for x, y in curves]), most)


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep at most a fixed number of points, the first and the last among them."""
    if len(x) <= _POINTS:
        return x, y
    kept = np.unique(np.linspace(0, len(x) - 1, _POINTS).round().astype(int))
    return x[kept], y[kept]


def _joined(lines: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return several lines as one with gaps, which is drawn in less time."""
    gap = np.asarray([np.nan])
    x, y = (np.concatenate([part for line in lines for part in (line[i], gap)]) for i in (0, 1))
    return x, y


def _marked(x: np.ndarray) -> dict[str, Any]:
    """Return marks for a line of few points; one point alone would not be visible."""
    return {"marker": "o", "markersize": 3} if len(x) <= _FEW else {}


def curves(group: Group, metric: str, axis: str) -> Figure | None:
    """Draw a metric of every row over an axis.

    Thick lines are means over seeds, of losses geometric ones. From three seeds on they have their 95 % band; that of
    two is wider than everything else. Up to six rows have thin lines for their seeds. Where runs are of very different
    lengths, the axis is logarithmic.

    The vertical range is that of the lines, not of the bands.

    Args:
        group: its rows are drawn in their order and styles.
        metric: column of the log, of a validation or training metric.
        axis: key of :data:`analysis.runs.AXES`.

    Returns ``None`` where no row has both.
    """
    share = is_share(metric)
    seeds_shown = len(group.rows) <= _SEEDS_SHOWN
    with matplotlib.rc_context(STYLE):
        figure, axes = make_axes(curve_title(metric, axis), AXES[axis], f"{metric}{', %' if share else ''}")
        drawn: list[np.ndarray] = []
        ends = [end for row in group.rows for run in row.runs.values() if (end := run.at_end(axis))]
        if ends and max(ends) > 5 * min(ends):
            axes.set_xscale("log")
            label_plainly(axes.xaxis)
        for index, row in enumerate(group.rows):
            lines = [run.curve(metric, axis) for run in row.runs.values()]
            lines = [(x, 100 * y if share else y) for x, y in lines if len(x)]
            if not lines:
                continue
            if len(lines) > 1 and seeds_shown:
                thin = _joined([_thin(x, y) for x, y in lines])
                few = _marked(max((x for x, _ in lines), key=len))
                axes.plot(*thin, linewidth=0.6, alpha=0.45, **row.style.line, **few)
            if len(lines) == 1:
                x, mean = _thin(*lines[0])
            else:
                # A loss scatters by factors: the interval of its logarithm does not reach below zero.
                logs = not share and all((y > 0).all() for _, y in lines)
                bounds = 100.0 if share else None
                x, *limits = band([(x, np.log(y) if logs else y) for x, y in lines], bounds)
                mean, low, high = (np.exp(limit) if logs else limit for limit in limits)
                if len(lines) > 2:
                    axes.fill_between(x, low, high, alpha=0.18, linewidth=0, color=row.style.colour)
            drawn += [y for _, y in lines] if seeds_shown else [mean]
            # Marks at other places for each row, so that they do not hide each other.
            every = max(1, len(x) // 5)
            places: dict[str, Any] = {
                "markevery": (index * every // max(1, len(group.rows)), every),
                "marker": row.style.marker,
            }
            label = f"{row.label} ({len(lines)})"
            axes.plot(x, mean, linewidth=1.7, markersize=4, label=label, **row.style.line, **places)
        for target in [group.goal] if group.goal and not group.borrowed else []:
            if drawn and target.metric == metric:
                level = 100 * target.level if share else target.level
                axes.axhline(level, color=INK, linewidth=0.8, alpha=0.6, linestyle=(0, (4, 3)))
                drawn.append(np.asarray([level]))
        if drawn:
            lowest, highest = min(float(y.min()) for y in drawn), max(float(y.max()) for y in drawn)
            if share:
                margin = 0.04 * (highest - lowest) + 1e-9
                axes.set_ylim(lowest - margin, highest + margin)
            else:
                log_if_wide(axes, lowest, highest)
    return figure if drawn else None


def second_passes(row: Row) -> Figure | None:
    """Draw the second passes of a row's first run below its loss and phi.

    Returns ``None`` for an optimizer that logs no phi.
    """
    run = row.any
    if not run.has("flatness/phi"):
        return None
    with matplotlib.rc_context(STYLE):
        title = f"{row.label}, seed {run.identity.seed}: second passes"
        figure, top = make_axes(title, "", "train/loss", 4.2)
        figure.clear()
        set_margins(figure, left=0.85)
        top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 2))
        axis = "cost/optimizer_steps" if run.has("cost/optimizer_steps") else "epoch"
        top.set_title(title, loc="left")
        top.plot(*_thin(*run.curve("train/loss", axis)), color=COLOURS[0], linewidth=1.4)
        _, loss = run.curve("train/loss", axis)
        log_if_wide(top, loss.min(), loss.max())
        top.set_ylabel("train/loss")
        x, phi = run.curve("flatness/phi", axis)
        middle.plot(*_thin(x, phi), color=COLOURS[1], linewidth=1.0, label="phi")
        middle.plot(*_thin(*run.curve("flatness/threshold", axis)), color=INK, linewidth=1.0, label="threshold")
        middle.axhline(0, color=INK, linewidth=0.5, alpha=0.5)
        middle.set_ylabel("cosine")
        middle.legend(loc="best", ncols=2, handlelength=1.2, borderpad=0, fontsize=8)
        _draw_second_passes(run, top, bottom, axis)
        bottom.set_xlabel(AXES[axis])
        figure.align_ylabels()
    return figure


def _draw_second_passes(run: Run, over_loss: Axes, below: Axes, axis: str) -> None:
    """Draw the rate of second passes.

    Where each step was logged, every second pass is also marked over the loss.
    """
    x, rate = run.curve("flatness/trigger_rate", axis)
    every = run.identity.options.get("internals.every_n_steps") == 1
    if every:
        for position in x[rate > 0]:
            over_loss.axvline(position, color=COLOURS[3], linewidth=0.4, alpha=0.5)
    edges = np.concatenate([[0.0], x]) if len(x) else np.asarray([0.0, 1.0])
    below.stairs(rate if len(x) else [0.0], edges, fill=True, color=COLOURS[3], alpha=0.5)
    below.set_ylim(0, 1)
    below.set_ylabel("rate of second\npasses")
