"""Check the performance profile against one by hand, on tasks made of real runs."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest

from analysis.profile import FURTHEST, costs, draw, profile, score, table, target_of
from analysis.rows import Group, group
from analysis.runs import read
from experiment.target import Target

# Of three tasks: A is the best of one and twice the best of the second; B is the best of two, and never reaches the
# last.
TASKS: Mapping[str, Mapping[str, float]] = {
    "first": {"A": 100.0, "B": 300.0},
    "second": {"A": 200.0, "B": 100.0},
    "third": {"A": 900.0, "B": np.inf},
}


@pytest.fixture(scope="module")
def tasks(runs: Path) -> dict[str, Group]:
    """Return a group and a copy in which every run needs twice the evaluations."""
    first = max(group(read([runs])[0], targets=[Target("easy", "train/loss", 2.2, True)]), key=lambda g: len(g.rows))
    second = deepcopy(first)
    for row in second.rows:
        for run in row.runs.values():
            run.log["cost/gradient_evaluations"] = 2 * run.log["cost/gradient_evaluations"]
            run._curves.clear()
    return {"first": first, "second": second}


def test_a_profile_is_the_share_of_tasks_within_a_ratio_of_the_best() -> None:
    x, y = profile(list(TASKS.values()), "A")
    assert x.tolist() == [1, 1, 1, 2, FURTHEST]  # the best of two tasks, twice the best of one
    assert y == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    x, y = profile(list(TASKS.values()), "B")
    assert x.tolist() == [1, 1, 3, FURTHEST]
    assert y == pytest.approx([0, 1 / 3, 2 / 3, 2 / 3])


def test_the_score_is_the_mean_height_of_the_profile() -> None:
    # A: two thirds from 1 to 2, then 1 up to 4.
    assert score(list(TASKS.values()), "A") == pytest.approx((2 / 3 * 1 + 1 * 2) / 3)
    assert score(list(TASKS.values()), "B") == pytest.approx((1 / 3 * 2 + 2 / 3 * 1) / 3)
    assert score([{"A": 1.0, "B": 1.0}], "B") == 1
    assert score([{"A": 1.0, "B": 5.0}], "B") == 0  # beyond the end


def test_the_picture_has_a_line_for_each_optimizer() -> None:
    labelled = [line for line in draw(TASKS).axes[0].lines if not str(line.get_label()).startswith("_")]
    assert [line.get_label() for line in labelled] == ["A", "B"]
    assert len({line.get_color() for line in labelled}) == 2


def test_costs_are_medians_of_evaluations_to_the_tasks_target(tasks: dict[str, Group]) -> None:
    found = costs(tasks)
    assert list(found) == ["first", "second"]
    target = target_of(tasks["first"])
    assert target == Target("easy", "train/loss", 2.2, True)
    reached = 0
    for row in tasks["first"].rows:
        median = row.median(target, "cost/gradient_evaluations")
        cost = np.inf if median is None or median.median is None else median.median
        assert found["first"][row.label] == cost
        assert found["second"][row.label] == 2 * cost
        reached += np.isfinite(cost)
    assert reached > 1
    text = table(tasks, found)
    assert [line[0] for line in text.rows] == ["first", "second", "score"]
    assert [line[1] for line in text.rows] == ["train/loss < 2.2"] * 2 + ["-"]


def test_a_family_has_the_cost_of_its_faster_row_and_absent_optimizers_are_left_out(tasks: dict[str, Group]) -> None:
    by_label = costs(tasks)["first"]
    entry = Group(**{**vars(tasks["first"]), "families": {"both": ["grok_adamw", "grok_aga"]}})
    one = costs({"first": entry})["first"]
    assert one["both"] == min(by_label["grok_adamw"], by_label["grok_aga"])
    assert one.keys() == {"both", "aga of search"}
    fewer = Group(**{**vars(entry), "families": {}, "rows": entry.rows[:2]})
    assert costs({"first": tasks["first"], "second": fewer})["first"].keys() == {row.label for row in entry.rows[:2]}


@pytest.mark.parametrize(("metric", "lower"), [("val/loss", True), ("val/accuracy", False)])
def test_without_a_target_the_level_is_what_half_of_adamws_runs_reach(
    metric: str, lower: bool, tasks: dict[str, Group]
) -> None:
    entry = Group(**{**vars(tasks["first"]), "targets": [], "metric": metric, "lower": lower})
    target = target_of(entry)
    assert target is not None and (target.metric, target.lower) == (metric, lower)
    (adamw,) = [row for row in entry.rows if row.optimizer == "adamw"]
    reached = [run.reached(target, "cost/gradient_evaluations") for run in adamw.runs.values()]
    assert 2 * sum(time is not None for time in reached) >= len(reached)
    # No stricter level is reached by half of them.
    best = sorted(adamw.best(metric, lower).values(), reverse=not lower)
    stricter = [value for value in best if (value < np.float32(target.level)) == lower]
    assert 2 * (len(stricter) - 1) < len(best) + 1


def test_without_adamw_and_a_target_there_is_no_level(tasks: dict[str, Group]) -> None:
    others = [row for row in tasks["first"].rows if row.optimizer != "adamw"]
    assert target_of(Group(**{**vars(tasks["first"]), "targets": [], "rows": others})) is None
