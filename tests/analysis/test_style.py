"""Test that pictures fit their page, and that their axes can be read."""

import re
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.figure import Figure

from analysis.style import INK, STYLE, add_legend, label_plainly, log_if_wide, make_axes, on_page, on_white, svg


def drawn() -> Figure:
    with matplotlib.rc_context(STYLE):
        figure, axes = make_axes("a title", "steps", "loss")
        axes.plot([1, 2, 3], [0.123456, 0.2, 0.3], label="some")
        axes.annotate("0.123456", (1, 0.123456))
    return figure


def labels_of(low: float, high: float) -> list[str]:
    """Return the labels of a logarithmic axis from ``low`` to ``high``."""
    with matplotlib.rc_context(STYLE):
        figure, axes = make_axes("", "", "")
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        label_plainly(axes.xaxis)
        figure.draw_without_rendering()
        ticks = [*axes.xaxis.get_major_ticks(), *axes.xaxis.get_minor_ticks()]
        return [tick.label1.get_text() for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_text()]


def test_a_picture_is_the_same_each_time_and_as_wide_as_its_page() -> None:
    text = svg(drawn())
    assert text == svg(drawn())
    head = text[: text.index(">")]
    assert head.startswith('<svg role="img"') and "viewBox" in head
    assert "width=" not in head and "height=" not in head
    assert "<metadata" not in text and "xlink" not in text
    ElementTree.fromstring(text)


def test_coordinates_are_rounded_and_labels_keep_their_digits() -> None:
    text = svg(drawn())
    assert not any(re.search(r"\.\d{3}", tag) for tag in re.findall("<[^>]*>", text))
    assert ">0.123456</text>" in text
    # The font is that of the page, and its size that of the picture.
    assert "DejaVu" not in text and {*re.findall(r"(\d+)px", text)} == {"9", "10"}


def test_the_text_of_a_picture_has_the_colour_of_its_page() -> None:
    text = svg(drawn())
    assert INK in text
    assert INK not in on_page(text) and "currentColor" in on_page(text)
    white = on_white(text)
    assert white.startswith('<svg style="background: #ffffff; ') and "#1c1e21" in white
    assert INK not in white and "currentColor" not in white


def test_a_legend_is_below_the_plot_which_keeps_its_size() -> None:
    figure = drawn()
    before = figure.axes[0].get_position().height * figure.get_size_inches()[1]
    add_legend(figure)
    assert figure.axes[0].get_position().height * figure.get_size_inches()[1] == pytest.approx(before)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["some"]
    figure.draw_without_rendering()
    plot = figure.axes[0].get_tightbbox()
    assert plot is not None and legend.get_window_extent().y1 < plot.y0


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (1, 1e4, ["1", "10", "100", "1000", "10000"]),
        (1, 100, ["1", "10", "100", "3", "30"]),
        (1, 10, ["1", "10", "2", "5"]),
    ],
)
def test_a_logarithmic_axis_has_few_labels_and_no_powers(low: float, high: float, labels: list[str]) -> None:
    assert labels_of(low, high) == labels


def test_a_narrow_logarithmic_axis_has_labels_too() -> None:
    labels = labels_of(2, 5)
    assert len(labels) >= 2 and all(2 <= float(label) <= 5 for label in labels)


@pytest.mark.parametrize(
    ("low", "high", "factor", "scale"),
    [(1, 9, 10, "linear"), (1, 11, 10, "log"), (1, 4, 3, "log"), (0, 100, 10, "linear"), (-1, 100, 10, "linear")],
)
def test_values_over_more_than_a_factor_are_on_a_logarithmic_scale(
    low: float, high: float, factor: float, scale: str
) -> None:
    _, axes = make_axes("", "", "")
    log_if_wide(axes, low, high, factor)
    assert axes.get_yscale() == scale
    if scale == "log":
        assert axes.get_ylim()[0] < low and high < axes.get_ylim()[1]
