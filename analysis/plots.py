"""Draw the pictures of a report as SVG, readable on light and on dark pages."""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from analysis.results import is_share
from analysis.rows import Group, Row
from analysis.runs import AXES, Run
from analysis.statistics import mean_intervals
from analysis.tuning_budget import Points, best_of, evaluations_to, evaluations_without, sensitivities

# Distinct on white and on black, and in their lightness; further rows take the next line style.
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#e11d48", "#a855f7", "#d4a106", "#06a5c4", "#8a8f98")
STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")
# Placeholder for the text colour of the page.
_INK = "#010203"
_POINTS = 160
_FEW = 12
_STYLE: Any = {
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "ars2",
    "path.simplify_threshold": 0.5,
}


def style(index: int) -> dict[str, Any]:
    """Return colour and line style of a row, the same in every picture."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": STYLES[index // len(COLOURS) % len(STYLES)],
    }


def mark(index: int) -> dict[str, Any]:
    """Return colour and marker of the row with this index, for pictures of points."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index // len(COLOURS) % len(MARKERS)]}


def svg(figure: Figure) -> str:
    """Return a figure as SVG that scales to the available width.

    Use :func:`on_page` or :func:`on_white` to colour its text.

    Args:
        figure: made within :data:`_STYLE`.
    """
    with matplotlib.rc_context(_STYLE):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Use the font of the page, and scale the picture to the width of the page.
    text = re.sub(r"font(-family)?: ([\d.]+px )?[^;\"]*", lambda m: f"font: {m[2] or ''}sans-serif", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"(?<=\.\d\d)\d+", "", text)
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[\d.]+pt"', "", head).replace("<svg", '<svg role="img"', 1)
    head = re.sub(r' xmlns:xlink="[^"]*"', "", head)
    return f"{head}>{rest.replace('xlink:href', 'href')}"


def on_page(picture: str) -> str:
    """Let the text and axes of a picture take the colour of the page's text."""
    return picture.replace(_INK, "currentColor")


def on_white(picture: str) -> str:
    """Put a picture on a white ground."""
    style = "background: #ffffff; font-family: sans-serif"
    return picture.replace(_INK, "#1c1e21").replace("<svg", f'<svg style="{style}"', 1)


def band(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, ...]:
    """Return positions, mean, low and high of the 95 % interval over curves.

    They end with the shortest curve, because a later mean would be biased to surviving runs.

    Args:
        curves: positions, ascending, and values of each run.
    """
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.linspace(start, max(start, end), _POINTS)
    return grid, *mean_intervals(np.stack([np.interp(grid, x, y) for x, y in curves]))


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


def _axes(title: str, x: str, y: str, height: float = 3.3) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, height))
    _set_margins(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _set_margins(figure: Figure, below: float = 0.0) -> None:
    """Leave room for labels, and ``below`` inches more at the lower edge.

    matplotlib's constrained layout finds much the same margins in twice the time of drawing.
    """
    width, height = figure.get_size_inches()
    figure.subplots_adjust(
        left=0.75 / width,
        right=1 - 0.12 / width,
        bottom=(0.47 + below) / height,
        top=1 - 0.3 / height,
        hspace=0.1,
    )


def add_legend(figure: Figure) -> None:
    """Put a legend of the first axes below, and make the figure as much higher."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = 2 if max(map(len, labels), default=0) < 30 else 1
    width, height = figure.get_size_inches()
    below = 0.08 + 0.19 * -(-len(labels) // columns)
    figure.set_size_inches(width, height + below)
    _set_margins(figure, below)
    with matplotlib.rc_context(_STYLE):
        figure.legend(handles, labels, loc="lower left", ncols=columns, handlelength=1.8, columnspacing=1.2)


class _Plain(LogFormatter):
    """Label a logarithmic axis without mathtext, whose layout takes much time."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Return the label of a tick, empty where matplotlib shows none."""
        return f"{x:g}" if super().__call__(x, pos) else ""


def _label_plainly(axis: Axis) -> None:
    """Label a logarithmic axis."""
    axis.set_major_formatter(_Plain())
    axis.set_minor_formatter(_Plain())


def _log_if_wide(axes: Axes, low: float, high: float) -> None:
    """Scale the values logarithmically where they span more than a factor of ten."""
    if low > 0 and high > 10 * low:
        axes.set_yscale("log")
        _label_plainly(axes.yaxis)
        axes.set_ylim(low / 1.3, 1.3 * high)


def curves(group: Group, metric: str, axis: str) -> Figure | None:
    """Draw a metric of every row over an axis.

    Thin lines are seeds, thick ones their mean. From three seeds on the mean has its 95 % band; that of two is wider
    than everything else. Of losses it is the geometric mean. Where runs are of very different lengths, the axis is
    logarithmic.

    The vertical range is that of the lines, not of the bands.

    Args:
        group: its rows are drawn in their order, see :func:`style`.
        metric: column of the log, of a validation or training metric.
        axis: key of :data:`analysis.runs.AXES`.

    Returns ``None`` where no row has both.
    """
    share = is_share(metric)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(f"{metric} over {AXES[axis]}", AXES[axis], f"{metric}{', %' if share else ''}")
        drawn: list[np.ndarray] = []
        ends = [end for row in group.rows for run in row.runs.values() if (end := run.at_end(axis))]
        if ends and max(ends) > 5 * min(ends):
            axes.set_xscale("log")
            _label_plainly(axes.xaxis)
        for index, row in enumerate(group.rows):
            lines = [run.curve(metric, axis) for run in row.runs.values()]
            lines = [(x, 100 * y if share else y) for x, y in lines if len(x)]
            drawn += [y for _, y in lines]
            label = f"{row.label} ({len(lines)})"
            if len(lines) > 1:
                thin = _joined([_thin(x, y) for x, y in lines])
                few = _marked(max((x for x, _ in lines), key=len))
                axes.plot(*thin, linewidth=0.6, alpha=0.45, **style(index), **few)
            if len(lines) == 1:
                axes.plot(*_thin(*lines[0]), linewidth=1.5, label=label, **style(index), **_marked(lines[0][0]))
            elif lines:
                # A loss scatters by factors: the interval of its logarithm does not reach below zero.
                logs = not share and all((y > 0).all() for _, y in lines)
                x, *limits = band([(x, np.log(y) if logs else y) for x, y in lines])
                mean, low, high = (np.exp(limit) if logs else limit for limit in limits)
                axes.plot(x, mean, linewidth=1.8, label=label, **style(index))
                if len(lines) > 2:
                    axes.fill_between(x, low, high, alpha=0.18, linewidth=0, color=style(index)["color"])
        for target in [group.goal] if group.goal else []:
            if drawn and target.metric == metric:
                level = 100 * target.level if share else target.level
                axes.axhline(level, color=_INK, linewidth=0.8, alpha=0.6, linestyle=(0, (4, 3)))
                drawn.append(np.asarray([level]))
        if drawn:
            lowest, highest = min(float(y.min()) for y in drawn), max(float(y.max()) for y in drawn)
            if share:
                margin = 0.04 * (highest - lowest) + 1e-9
                axes.set_ylim(lowest - margin, highest + margin)
            else:
                _log_if_wide(axes, lowest, highest)
    return figure if drawn else None


def second_passes(row: Row) -> Figure | None:
    """Draw the second passes of a row's first run below its loss and phi.

    Returns ``None`` for an optimizer that logs no phi.
    """
    run = row.any
    if not run.has("flatness/phi"):
        return None
    with matplotlib.rc_context(_STYLE):
        title = f"{row.label}, seed {run.identity.seed}: second passes"
        figure, top = _axes(title, "", "train/loss", 4.2)
        figure.clear()
        top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 2))
        axis = "cost/optimizer_steps" if run.has("cost/optimizer_steps") else "epoch"
        top.set_title(title, loc="left")
        top.plot(*_thin(*run.curve("train/loss", axis)), color=COLOURS[0], linewidth=1.4)
        _, loss = run.curve("train/loss", axis)
        _log_if_wide(top, loss.min(), loss.max())
        top.set_ylabel("train/loss")
        x, phi = run.curve("flatness/phi", axis)
        middle.plot(*_thin(x, phi), color=COLOURS[1], linewidth=1.0, label="phi")
        middle.plot(*_thin(*run.curve("flatness/threshold", axis)), color=_INK, linewidth=1.0, label="threshold")
        middle.axhline(0, color=_INK, linewidth=0.5, alpha=0.5)
        middle.set_ylabel("cosine")
        middle.legend(loc="lower right", bbox_to_anchor=(1.0, 0.96), ncols=2, handlelength=1.2, borderpad=0)
        _draw_second_passes(run, top, bottom, axis)
        bottom.set_xlabel(AXES[axis])
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
    below.set_ylabel("second-pass rate")


def sensitivity(group: Group, name: str) -> list[Figure]:
    """Draw the trials of a search over each option that it varied.

    There is a picture of the best metric. Where a trial reached the goal, there is one of the gradient evaluations to
    it, in which a hollow mark is a trial that ended without reaching it. See
    :func:`analysis.tuning_budget.sensitivities`.
    """
    unit = ", %" if is_share(group.metric) else ""
    best = sensitivities(group, name, best_of(group))
    figures = [_trials(group, name, key, f"best {group.metric}{unit}", points, {}) for key, points in best.items()]
    if group.goal:
        reached = sensitivities(group, name, evaluations_to(group.goal))
        missed = sensitivities(group, name, evaluations_without(group.goal))
        label = f"gradient evaluations to {group.goal}"
        figures += [_trials(group, name, key, label, points, missed[key]) for key, points in reached.items()]
    return [figure for figure in figures if figure is not None]


def _trials(
    group: Group, name: str, key: str, label: str, points: dict[str, Points], missed: dict[str, Points]
) -> Figure | None:
    """Draw points by optimizer; ``None`` where there are none."""
    if not any(points.values()):
        return None
    scale = 100 if label.endswith(", %") else 1
    optimizers = list(dict.fromkeys(optimizer for other, optimizer in group.sweeps if other == name))
    with matplotlib.rc_context(_STYLE):
        option = key.removeprefix("model.")
        figure, axes = _axes(f"{name}: trials over {option}", option, label)
        for hollow, by_optimizer in ((False, points), (True, missed)):
            for optimizer, pairs in by_optimizer.items():
                x, y = np.asarray(pairs).reshape(-1, 2).T
                axes.plot(
                    x,
                    scale * y,
                    linestyle="none",
                    markersize=4,
                    alpha=0.75,
                    markerfacecolor="none" if hollow else None,
                    label=None if hollow else optimizer,
                    **mark(optimizers.index(optimizer)),
                )
        drawn = [pair for by in (points, missed) for pairs in by.values() for pair in pairs]
        positive = all(x > 0 for x, _ in drawn)
        if positive:
            axes.set_xscale("log")
        else:
            axes.set_xscale("symlog", linthresh=1e-3)
        _label_plainly(axes.xaxis)
        if scale == 1:
            _log_if_wide(axes, min(y for _, y in drawn), max(y for _, y in drawn))
        add_legend(figure)
    return figure
