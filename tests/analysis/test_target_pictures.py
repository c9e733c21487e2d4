"""The pictures of a ranking and of reached targets show every seed, and nothing that a run did not reach."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest

from analysis.rows import Group, group
from analysis.runs import read
from analysis.target_pictures import ranking, reached_over_cost
from experiment.target import Target


@pytest.fixture
def entry(runs: Path) -> Group:
    """Return a group whose goal most seeds of AdamW miss."""
    found = max(group(read([runs])[0]), key=lambda entry: len(entry.rows))
    (adamw,) = [row for row in found.rows if row.optimizer == "adamw"]
    level = sorted(adamw.best("train/loss", True).values())[0] * (1 + 1e-6)
    found.targets, found.borrowed = [Target("hard", "train/loss", level, lower=True)], False
    return found


def test_every_seed_is_in_the_ranking_hollow_where_it_missed_the_target(entry: Group) -> None:
    figure = ranking(entry, None)
    assert figure is not None
    (axes,) = figure.axes
    assert [text.get_text().replace("\n", " ") for text in axes.get_yticklabels()] == [row.label for row in entry.rows]
    points = [line for line in axes.lines if line.get_linestyle() == "None"]
    hollow = sum(len(line.get_xdata()) for line in points if line.get_markerfacecolor() == "none")
    small = sum(len(line.get_xdata()) for line in points if line.get_markersize() == 3.5)
    times = [t for row in entry.rows for t in row.times(entry.measure.target, entry.measure.column).values()]  # type: ignore[arg-type]
    missed = sum(time.reached is None for time in times)
    assert (hollow, small) == (missed, len(times) - missed)
    assert 0 < missed < len(times)


def test_the_best_row_is_on_top_and_the_values_stand_beside_it(entry: Group) -> None:
    entry.targets = []
    figure = ranking(entry, entry.rows[-1])
    assert figure is not None
    (axes,) = figure.axes
    ticks = axes.get_yticks()
    assert (np.diff(ticks) < 0).all()  # downwards
    texts = [text.get_text() for text in axes.texts]
    assert len(texts) == len(entry.rows) and all("%" in text for text in texts)
    # The dashed line is at the reference.
    (line,) = [line for line in axes.lines if line.get_zorder() == 0]
    values = list(entry.measure.values(entry.rows[-1]).values())
    assert line.get_xdata()[0] == pytest.approx(100 * np.mean(values))  # type: ignore[index]


def test_a_long_name_is_broken_and_not_cut(entry: Group) -> None:
    entry.rows[0].label = "Base, weights averaged (settings of late with averaging)"
    figure = ranking(entry, None)
    assert figure is not None
    text = figure.axes[0].get_yticklabels()[0].get_text()
    assert text.count("\n") == 2 and text.replace("\n", " ") == entry.rows[0].label


def test_the_share_of_seeds_rises_to_those_that_reached_the_target(entry: Group) -> None:
    figure = reached_over_cost(entry)
    assert figure is not None
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    goal, plain = entry.goal, []
    assert goal is not None
    for row in entry.rows:
        times = row.times(goal, "cost/gradient_evaluations")
        share = 100 * sum(time.reached is not None for time in times.values()) / len(times)
        y = np.asarray(lines[row.label].get_ydata())
        assert y[0] == 0 and (np.diff(y) >= 0).all()
        if len({time.watched for time in times.values()}) == 1:  # only then the share is a plain one
            assert y[-1] == pytest.approx(share)
            plain.append(row.label)
    assert "grok_adamw" in plain
    never = deepcopy(entry)
    never.targets = [Target("never", "train/loss", 0.0, lower=True)]
    assert reached_over_cost(never) is None
    # What no run reached ranks no row.
    by_value = ranking(never, None)
    assert by_value is not None and by_value.axes[0].get_xlabel() == "val/accuracy, %"
