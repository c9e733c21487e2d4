"""Draw the trials of a search: over each option, and the best of so many."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import special

from analysis.palette import Style
from analysis.results import is_share
from analysis.rows import Group, Measure
from analysis.runs import AXES, Run
from analysis.style import INK, STYLE, WIDTH, label_plainly, log_if_wide
from analysis.target_pictures import scale_of
from analysis.tuning_budget import options_of, searched_rows

_WRAP = 30
# Trials span more than the rows do, and the best ones matter: from this factor on their axis is logarithmic.
_WIDE = 3.0
# Of the best of so many trials: the band has 80 % of the draws.
BAND = (0.1, 0.9)


def sensitivity(group: Group, name: str) -> list[Figure]:
    """Draw the trials of a search over each option that it varied.

    There is a small picture for each row.
    A hollow mark is a trial that ended without reaching the target, at the evaluations that it was given, and a cross
    at the edge one without a finite value. A ring is around each trial that was the best so far when it ran, and the
    best of all is large.
    """
    rows = searched_rows(group, name)
    keys = dict.fromkeys(key for trials, *_ in rows.values() for key in options_of(trials))
    figures = []
    for key in keys:
        shown = {label: row for label, row in rows.items() if key in options_of(row[0])}
        if any(group.measure.of_trial(run) is not None for trials, _ in shown.values() for run in trials):
            figures.append(_over_option(group, key, shown))
    return figures


def _over_option(group: Group, key: str, rows: dict[str, tuple[list[Run], Style]]) -> Figure:
    measure, scale = group.measure, scale_of(group.measure)
    with matplotlib.rc_context(STYLE):
        figure, panels = _panels(f"trials over {key.removeprefix('model.')}", list(rows))
        values = [v for trials, _ in rows.values() for run in trials if (v := _shown(measure, run)) is not None]
        options = [float(run.identity.options[key]) for trials, _ in rows.values() for run in trials]
        low, high = scale * min(values), scale * max(values)
        edge = high if measure.lower else low
        for axes, (trials, style) in zip(panels, rows.values(), strict=True):
            _draw_trials(axes, measure, key, trials, style, edge)
        if min(options) > 0:
            panels[0].set_xscale("log")
        else:
            largest = max(map(abs, options))
            panels[0].set_xscale("symlog", linthresh=min((abs(x) for x in options if x), default=1e-3))
            # Of an option that is zero or negative on some trials, the ends tell enough.
            ends = {-largest, 0.0, largest} if min(options) < 0 else {0.0, largest}
            panels[0].set_xticks(sorted(ends), [f"{x:.2g}" for x in sorted(ends)])
            panels[0].minorticks_off()
        if min(options) > 0:
            for axes in panels:
                label_plainly(axes.xaxis)
        if scale == 1:
            log_if_wide(panels[0], low, high, _WIDE)
        _label(figure, panels, key.removeprefix("model."), _axis_label(measure))
    return figure


def _draw_trials(axes: Axes, measure: Measure, key: str, trials: Sequence[Run], style: Style, edge: float) -> None:
    scale, best = scale_of(measure), None
    for run in trials:
        x, value = float(run.identity.options[key]), measure.of_trial(run)
        shown = _shown(measure, run)
        if shown is None:
            axes.plot([x], [edge], marker="x", color=style.colour, markersize=4, linestyle="none", clip_on=False)
            continue
        hollow: Any = "none" if value is None else style.colour
        axes.plot([x], [scale * shown], markersize=3.5, alpha=0.8, markerfacecolor=hollow, **style.points)
        if value is not None and (best is None or (value < best[1] if measure.lower else value > best[1])):
            axes.plot(
                [x], [scale * value], marker="o", markersize=8, markerfacecolor="none", color=INK, linestyle="none"
            )
            best = x, value
    if best is not None:
        axes.plot([best[0]], [scale * best[1]], markersize=8, markeredgecolor=INK, **style.points)


def _shown(measure: Measure, run: Run) -> float | None:
    """Return where a trial is drawn.

    It is at its value, or at the evaluations it was given if it missed the target.
    """
    value = measure.of_trial(run)
    if value is None and measure.target is not None and not run.diverged:
        return run.at_end(measure.column)
    return value


def best_after(group: Group, name: str) -> Figure | None:
    """Draw the best of k trials over k, in a small picture for each row.

    The line is the median over random choices of k of the row's trials, and the band has 80 % of them. Those of the
    other rows are grey. Returns ``None`` where no row has two trials with a value.
    """
    measure, scale = group.measure, scale_of(group.measure)
    found = {}
    for label, (trials, style) in searched_rows(group, name).items():
        values = [measure.of_trial(run) for run in trials]
        if sum(value is not None for value in values) > 1:
            found[label] = (best_of_k(values, measure.lower), style)
    if not found:
        return None
    with matplotlib.rc_context(STYLE):
        figure, panels = _panels(f"best of k trials, {name}", list(found))
        for axes, (label, (own, style)) in zip(panels, found.items(), strict=True):
            for other, (quantiles, _) in found.items():
                if other != label:
                    axes.plot(
                        np.arange(1, len(quantiles) + 1), scale * quantiles[:, 1], color=INK, alpha=0.2, linewidth=0.7
                    )
            k = np.arange(1, len(own) + 1)
            axes.fill_between(k, scale * own[:, 0], scale * own[:, 2], alpha=0.25, linewidth=0, color=style.colour)
            axes.plot(k, scale * own[:, 1], linewidth=1.8, **style.line)
        drawn = np.concatenate([quantiles.ravel() for quantiles, _ in found.values()])
        drawn = scale * drawn[np.isfinite(drawn)]
        panels[0].set_xscale("log")
        for axes in panels:
            label_plainly(axes.xaxis)
        if scale == 1:
            log_if_wide(panels[0], drawn.min(), drawn.max(), _WIDE)
        _label(figure, panels, "trials", _axis_label(measure))
    return figure


def best_of_k(values: Sequence[float | None], lower: bool) -> np.ndarray:
    """Return quantiles of the best of k values chosen at random.

    They are chosen without replacement, for k from 1 to their number.
    The columns are the lower end of :data:`BAND`, the median and its upper end. A missing value is worse than any
    other; where it is the best, the quantile is not finite. For the expected best see Dodge et al. (2019), "Show Your
    Work"; the median exists also where some trials have no value.
    """
    worst = math.inf if lower else -math.inf
    ordered = np.sort([worst if value is None else value for value in values])
    ordered = ordered if lower else ordered[::-1]
    n = len(ordered)
    k = np.arange(1, n + 1)
    # Probability that the best of k is among the first i values: one less that of choosing all of the others.
    others = n - np.arange(1, n + 1)
    within = 1 - special.comb(others[None, :], k[:, None]) / special.comb(n, k)[:, None]
    columns = [ordered[np.argmax(within >= level - 1e-12, axis=1)] for level in (BAND[0], 0.5, BAND[1])]
    return np.stack(columns if lower else columns[::-1], axis=1)


def _panels(title: str, labels: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Return a figure with a small plot for each label.

    Two are beside each other, and all share their axes.
    """
    columns, rows = min(2, len(labels)), -(-len(labels) // 2)
    lines = max(len(textwrap.wrap(label, _WRAP)) for label in labels)
    top, below, each, between = 0.38 + 0.13 * lines, 0.45, 1.0, 0.24 + 0.13 * lines
    height = top + below + rows * each + (rows - 1) * between
    figure = Figure(figsize=(WIDTH, height), label=title)
    figure.subplots_adjust(
        left=0.7 / WIDTH,
        right=1 - 0.1 / WIDTH,
        bottom=below / height,
        top=1 - top / height,
        hspace=between / each,
        wspace=0.12,
    )
    figure.text(0.02, 1 - 0.2 / height, title, fontsize=10)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in grid[len(labels) :]:
        axes.set_visible(False)
    for axes, label in zip(grid, labels, strict=False):
        axes.set_title(textwrap.fill(label, _WRAP), loc="left", fontsize=8)
        axes.tick_params(which="both", labelsize=7.5)
    return figure, list(grid[: len(labels)])


def _label(figure: Figure, panels: Sequence[Axes], x: str, y: str) -> None:
    """Label the axes of all panels together."""
    height = figure.get_size_inches()[1]
    figure.supxlabel(x, fontsize=9, y=0.06 / height)
    figure.supylabel(y, fontsize=9, x=0.01)
    for axes in panels[-2:]:
        axes.tick_params(labelbottom=True)


def _axis_label(measure: Measure) -> str:
    if measure.target is not None:
        return AXES[measure.column]
    column = measure.column.replace("test/", "val/")
    return f"best {column}{', %' if is_share(column) else ''}"
