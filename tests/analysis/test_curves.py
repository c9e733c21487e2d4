"""Test the curves of metrics and of second passes against the logs."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from analysis.curves import band, curves, second_passes
from analysis.rows import AXIS, Group
from analysis.runs import Run
from analysis.statistics import mean_interval
from tests.analysis.runs import HALF, ranked, repeated, valued


def drawn(figure: Figure | None) -> dict[str, list[float]]:
    """Return the values of every labelled line by its label."""
    assert figure is not None
    lines = [line for line in figure.axes[0].lines if not str(line.get_label()).startswith("_")]
    return {str(line.get_label()): np.asarray(line.get_ydata(), dtype=float).tolist() for line in lines}


def test_bands_end_where_the_shortest_run_does() -> None:
    long, short = np.arange(1.0, 11.0), np.arange(1.0, 6.0)
    x, mean, low, high = band([(long, long), (short, 3 * short), (short, 2 * short)])
    assert (x[0], x[-1]) == (1, 5)
    middle = np.abs(x - 3).argmin()
    assert mean[middle] == pytest.approx(2 * x[middle])
    expected = mean_interval([x[middle], 2 * x[middle], 3 * x[middle]])
    assert (low[middle], high[middle]) == pytest.approx((expected.low, expected.high))


def test_a_band_of_shares_stays_below_everything() -> None:
    x = np.asarray([1.0, 2.0])
    lines = [(x, np.asarray([0.0, y])) for y in (50.0, 99.0, 98.0)]
    assert band(lines)[3][-1] > 100
    _, mean, low, high = band(lines, 100.0)
    assert 0 < low[-1] < mean[-1] < high[-1] < 100


def test_every_row_is_a_line_of_its_style_and_number_of_seeds(groups: list[Group]) -> None:
    figure = curves(groups[0], "val/accuracy", AXIS)
    assert figure is not None
    assert [*drawn(figure)] == [f"{row.label} ({len(row.runs)})" for row in groups[0].rows]
    lines = [line for line in figure.axes[0].lines if not str(line.get_label()).startswith("_")]
    assert [line.get_marker() for line in lines] == [row.style.marker for row in groups[0].rows]
    assert [to_hex(str(line.get_color())) for line in lines] == [row.style.colour.lower() for row in groups[0].rows]
    _, values = groups[0].rows[0].any.curve("val/accuracy", AXIS)
    assert drawn(figure)["aga of search (1)"] == pytest.approx(100 * values)
    # Borrowed targets are levels of another protocol, and are not drawn.
    assert groups[0].borrowed and groups[0].goal is not None
    assert not any(np.ptp(np.asarray(line.get_ydata())) == 0 for line in figure.axes[0].lines)


def test_a_mean_of_shares_is_arithmetic_and_that_of_losses_geometric(groups: list[Group], run: Run) -> None:
    entry = ranked(groups[0], [valued(run, "some", [0.2, 0.3, 0.7])])
    assert drawn(curves(entry, "val/accuracy", "epoch"))["some (3)"] == pytest.approx([40.0] * 160)
    entry = ranked(groups[0], [valued(run, "some", [1.0, 2.0, 4.0], "val/loss")])
    assert drawn(curves(entry, "val/loss", "epoch"))["some (3)"] == pytest.approx([2.0] * 160)


def test_seeds_have_thin_lines_in_up_to_six_rows_and_bands_from_three_seeds_on(groups: list[Group], run: Run) -> None:
    rows = [valued(run, f"row {n}", [0.1 * n, 0.1 * n + 0.05, 0.1 * n + 0.02]) for n in range(1, 8)]
    two = replace(rows[0], runs={seed: rows[0].runs[seed] for seed in "01"})
    for shown, lines, bands in ((rows, 7, 7), (rows[:6], 12, 6), ([two, *rows[1:3]], 6, 2)):
        figure = curves(ranked(groups[0], shown), "val/accuracy", "epoch")
        assert figure is not None
        assert (len(figure.axes[0].lines), len(figure.axes[0].collections)) == (lines, bands)


def test_the_target_is_a_line_in_the_picture_of_its_metric(groups: list[Group], run: Run) -> None:
    entry = ranked(groups[0], [valued(run, "some", [0.1])], [HALF])
    for metric, lines in (("val/accuracy", 2), ("val/loss", 1)):
        figure = curves(entry, metric, "epoch")
        assert figure is not None and len(figure.axes[0].lines) == lines
        if lines == 2:
            assert set(np.asarray(figure.axes[0].lines[-1].get_ydata())) == {50.0}
            assert figure.axes[0].get_ylim()[1] > 50


def test_runs_of_very_different_lengths_have_a_logarithmic_axis(groups: list[Group], run: Run) -> None:
    for factor, scale in ((2, "linear"), (20, "log")):
        row = replace(groups[0].rows[0], runs={"0": run, "1": repeated(run, 1, {})})
        row.runs["1"].log["epoch"] = factor * row.runs["1"].log["epoch"]
        figure = curves(ranked(groups[0], [row]), "val/accuracy", "epoch")
        assert figure is not None and figure.axes[0].get_xscale() == scale


def test_a_metric_that_no_row_logged_has_no_picture(groups: list[Group]) -> None:
    assert curves(groups[0], "flatness/hessian_top", "epoch") is None


def test_second_passes_are_drawn_for_rows_that_make_some(groups: list[Group]) -> None:
    by_label = {entry.label: entry for entry in groups[0].rows}
    figure = second_passes(by_label["grok_aga"])
    assert figure is not None
    # Every step was logged: each second pass is a line over the loss.
    run = by_label["grok_aga"].any
    _, rate = run.curve("flatness/trigger_rate", "cost/optimizer_steps")
    over_loss = figure.axes[0].lines
    assert len(over_loss) == 1 + int((rate > 0).sum())
    assert second_passes(by_label["grok_adamw"]) is None
