"""Test that the pictures of a search have every trial, where it belongs."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.rows import AXIS, Group
from analysis.runs import Run
from analysis.search_pictures import best_after, sensitivity
from analysis.style import INK
from experiment.target import Target
from tests.analysis.runs import repeated

LR = "model.optimizer.lr"


def panels(group: Group) -> dict[str, Axes]:
    """Return the panels of the only picture of trials, by their title."""
    (figure,) = sensitivity(group, "search")
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def points(axes: Axes, chosen: Callable[[Line2D], Any]) -> list[tuple[float, ...]]:
    """Return the places of the marks that are chosen, in the order of drawing."""
    return [tuple(np.asarray(line.get_xydata())[0].tolist()) for line in axes.lines if chosen(line)]


def is_trial(line: Line2D) -> bool:
    return line.get_markersize() == 3.5


def is_hollow(line: Line2D) -> bool:
    return is_trial(line) and line.get_markerfacecolor() == "none"


def is_ring(line: Line2D) -> bool:
    return line.get_markersize() == 8 and line.get_markerfacecolor() == "none"


def is_best(line: Line2D) -> bool:
    return line.get_markersize() == 8 and line.get_markeredgecolor() == INK and not is_ring(line)


def changed(groups: list[Group], values: dict[str, list[float]], metric: str = "val/accuracy") -> Group:
    """Return a group whose trials have these values of a metric, by their row."""
    trials = {
        ("search", name): [
            repeated(run, 0, {metric: value})
            for run, value in zip(groups[0].sweeps["search", name], values[name], strict=True)
        ]
        for name in values
    }
    return replace(groups[0], sweeps=trials)


def test_every_row_of_a_search_has_a_panel_and_every_trial_a_mark(groups: list[Group]) -> None:
    found = panels(groups[0])  # nothing but the learning rate was varied
    # Rows of the tables come first.
    assert [*found] == ["aga of search", "adamw"]
    for label, name, rates in (("aga of search", "aga", [0.001, 0.01]), ("adamw", "adamw", [0.003, 0.01, 0.03])):
        values = [100 * run.best("val/accuracy", False) for run in groups[0].sweeps["search", name]]
        assert points(found[label], is_trial) == [*zip(rates, values, strict=True)]
        assert points(found[label], is_hollow) == []
        assert found[label].get_xscale() == "log"
    (label,) = {axes.figure.get_supxlabel() for axes in found.values()}
    assert label == "optimizer.lr"


def test_trials_have_the_colour_and_mark_of_their_row(groups: list[Group]) -> None:
    (row,) = [row for row in groups[0].rows if row.label == "aga of search"]
    trials = [line for line in panels(groups[0])["aga of search"].lines if is_trial(line)]
    assert {(line.get_color(), line.get_marker()) for line in trials} == {(row.style.colour, row.style.marker)}


def test_rings_are_around_the_trials_that_were_best_so_far_and_the_best_is_large(groups: list[Group]) -> None:
    found = panels(changed(groups, {"adamw": [0.3, 0.2, 0.5], "aga": [0.4, 0.1]}))
    assert points(found["adamw"], is_ring) == [(0.003, 30), (0.03, 50)]
    assert points(found["adamw"], is_best) == [(0.03, 50)]
    assert points(found["aga of search"], is_ring) == points(found["aga of search"], is_best) == [(0.001, 40)]
    losses = replace(
        changed(groups, {"adamw": [3.0, 2.0, 5.0], "aga": [4.0, 1.0]}, "val/loss"), metric="val/loss", lower=True
    )
    found = panels(losses)
    assert points(found["adamw"], is_ring) == [(0.003, 3), (0.01, 2)]
    assert points(found["adamw"], is_best) == [(0.01, 2)]


def test_a_trial_that_missed_the_target_is_hollow_at_the_evaluations_it_was_given(groups: list[Group]) -> None:
    goal = Target("some", "val/accuracy", 0.1)
    entry = replace(groups[0], targets=[goal], borrowed=False)
    found = panels(entry)
    hollow = 0
    for label, name in (("aga of search", "aga"), ("adamw", "adamw")):
        trials = {run: run.reached(goal, AXIS) for run in entry.sweeps["search", name]}
        expected = [(run.identity.options[LR], time or run.at_end(AXIS)) for run, time in trials.items()]
        missed = [place for place, time in zip(expected, trials.values(), strict=True) if time is None]
        assert points(found[label], is_trial) == expected
        assert points(found[label], is_hollow) == missed
        hollow += len(missed)
        times = [time for time in trials.values() if time is not None]
        assert [y for _, y in points(found[label], is_best)] == [min(times)]
    assert 0 < hollow < 5


@pytest.mark.parametrize(("metric", "lower", "edge"), [("val/accuracy", False, 20), ("val/loss", True, 0.3)])
def test_a_trial_without_a_finite_value_is_a_cross_at_the_worst_edge(
    metric: str, lower: bool, edge: float, groups: list[Group]
) -> None:
    entry = changed(groups, {"adamw": [0.3, np.nan, 0.2], "aga": [0.25, 0.25]}, metric)
    found = panels(replace(entry, metric=metric, lower=lower))
    crosses = points(found["adamw"], lambda line: line.get_marker() == "x")
    assert crosses == [(0.01, edge)]
    assert len(points(found["adamw"], is_trial)) == 2
    # Where no trial has a value, there is nothing to draw.
    empty = changed(groups, {"adamw": [np.nan] * 3, "aga": [np.inf] * 2}, metric)
    assert sensitivity(replace(empty, metric=metric, lower=lower), "search") == []


@pytest.mark.parametrize(
    ("least", "scale", "ticks"), [(0.0, "symlog", [0, 0.03]), (-0.01, "symlog", [-0.03, 0, 0.03]), (0.001, "log", None)]
)
def test_an_option_that_is_not_always_positive_has_its_ends_on_the_axis(
    least: float, scale: str, ticks: list[float] | None, groups: list[Group]
) -> None:
    entry = replace(groups[0], sweeps={("search", "adamw"): deepcopy(groups[0].sweeps["search", "adamw"])})
    entry.sweeps["search", "adamw"][0].identity.options[LR] = least
    (axes,) = panels(entry).values()
    assert axes.get_xscale() == scale
    if ticks is not None:
        assert axes.get_xticks().tolist() == ticks


def test_each_option_that_was_varied_has_a_picture_of_the_rows_that_varied_it(groups: list[Group]) -> None:
    entry = replace(groups[0], sweeps=deepcopy(groups[0].sweeps))
    for number, run in enumerate(entry.sweeps["search", "aga"]):
        run.identity.options["model.optimizer.rho"] = 0.1 + number
    figures = sensitivity(entry, "search")
    titles = [[axes.get_title(loc="left") for axes in figure.axes] for figure in figures]
    assert [figure.get_supxlabel() for figure in figures] == ["optimizer.lr", "optimizer.rho"]
    assert titles == [["aga of search", "adamw"], ["aga of search"]]


def test_the_best_of_so_many_trials_has_a_panel_for_each_row_with_two(groups: list[Group]) -> None:
    figure = best_after(groups[0], "search")
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["aga of search", "adamw"]
    best = [
        100 * max(run.best("val/accuracy", False) for run in groups[0].sweeps["search", n]) for n in ("aga", "adamw")
    ]
    # Of all trials the best is certain; the other row is drawn too, as a grey line.
    for axes, own, other in zip(figure.axes, best, reversed(best), strict=True):
        ends = [np.asarray(line.get_ydata())[-1] for line in axes.lines]
        assert ends == pytest.approx([other, own])
    one: list[Run] = groups[0].sweeps["search", "aga"][:1]
    assert best_after(replace(groups[0], sweeps={("search", "aga"): one}), "search") is None
