"""Draw figures as SVG that are readable on light and on dark pages."""

import html
import io
import re
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

# Placeholder for the text colour of the page.
INK = "#010203"
# Inches. At 400 pixels the text is still legible, and a page has two or three pictures side by side.
WIDTH = 4.8
STYLE: Any = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
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


def svg(figure: Figure) -> str:
    """Return a figure as SVG that scales to the available width.

    Use :func:`on_page` or :func:`on_white` to colour its text.

    Args:
        figure: made within :data:`STYLE`. Its label names it for those who cannot see it; without one it is decoration.
    """
    with matplotlib.rc_context(STYLE):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Use the font of the page, and scale the picture to the width of the page.
    text = re.sub(
        r"font(-family)?: ([\d.]+px )?[^;\"]*",
        lambda m: f"font: {m[2]}sans-serif" if m[2] else "font-family: sans-serif",
        text,
    )
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    # Coordinates need two decimals; labels between the tags keep all of theirs.
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(?<=\.\d\d)\d+", "", tag[0]), text)
    head, rest = text.split(">", 1)
    title = str(figure.get_label())
    named = f'role="img" aria-label="{html.escape(title)}"' if title else 'aria-hidden="true"'
    head = re.sub(r' (width|height)="[\d.]+pt"', "", head).replace("<svg", f"<svg {named}", 1)
    head = re.sub(r' xmlns:xlink="[^"]*"', "", head)
    return f"{head}>{rest.replace('xlink:href', 'href')}"


def on_page(picture: str) -> str:
    """Let the text and axes of a picture take the colour of the page's text."""
    return picture.replace(INK, "currentColor")


def on_white(picture: str) -> str:
    """Put a picture on a white ground."""
    style = "background: #ffffff; font-family: sans-serif"
    return picture.replace(INK, "#1c1e21").replace("<svg", f'<svg style="{style}"', 1)


def make_axes(title: str, x: str, y: str, height: float = 3.1) -> tuple[Figure, Axes]:
    """Return a figure with a single plot, made within :data:`STYLE`."""
    figure = Figure(figsize=(WIDTH, height), label=title)
    set_margins(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def set_margins(figure: Figure, below: float = 0.0, left: float = 0.75) -> None:
    """Leave room for labels, and ``below`` inches more at the lower edge.

    matplotlib's constrained layout finds much the same margins in twice the time of drawing.
    """
    width, height = figure.get_size_inches()
    figure.subplots_adjust(
        left=left / width,
        right=1 - 0.12 / width,
        bottom=(0.47 + below) / height,
        top=1 - 0.3 / height,
        hspace=0.1,
    )


def add_legend(figure: Figure) -> None:
    """Put a legend of the first axes below, and make the figure as much higher."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = 2 if max(map(len, labels), default=0) < 25 else 1
    width, height = figure.get_size_inches()
    below = 0.08 + 0.19 * -(-len(labels) // columns)
    figure.set_size_inches(width, height + below)
    set_margins(figure, below)
    with matplotlib.rc_context(STYLE):
        figure.legend(handles, labels, loc="lower left", ncols=columns, handlelength=2.6, columnspacing=1.2)


class _Plain(LogFormatter):
    """Label a logarithmic axis without mathtext, whose layout takes much time.

    It labels few enough ticks to fit.
    """

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Return the label of a tick, empty where there is none."""
        assert self.axis is not None
        low, high = sorted(self.axis.get_view_interval())
        if low <= 0 or x <= 0 or high < 3 * low:
            return f"{x:g}" if super().__call__(x, pos) else ""
        first = round(x / 10 ** np.floor(np.log10(x) + 1e-9), 6)
        few = {1.0, 3.0} if high < 120 * low else {1.0}
        shown = {1.0, 2.0, 3.0, 5.0} if high < 6 * low else {1.0, 2.0, 5.0} if high < 12 * low else few
        return f"{x:g}" if first in shown else ""


def label_plainly(axis: Axis) -> None:
    """Label a logarithmic axis."""
    axis.set_major_formatter(_Plain())
    axis.set_minor_formatter(_Plain())


def log_if_wide(axes: Axes, low: float, high: float, factor: float = 10.0) -> None:
    """Scale the values logarithmically where they span more than a factor."""
    if low > 0 and high > factor * low:
        axes.set_yscale("log")
        label_plainly(axes.yaxis)
        axes.set_ylim(low / 1.3, 1.3 * high)
