"""Check the performance profile against one by hand, on tasks made of real runs."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.profile import FURTHEST, Cost, costs, draw, profile, score, table, target_of
from analysis.rows import AXIS, Group, group
from analysis.runs import read
from experiment.target import Target
from tests.analysis.runs import HALF, ranked, repeated, timed

# Of three tasks: A is the best of two and twice the best of the second; B is the best of the second, three times the
# best of the first, and did not reach the last in twice the evaluations that A needs.
TASKS: Mapping[str, Mapping[str, Cost]] = {
    "first": {"A": Cost(100, True), "B": Cost(300, True)},
    "second": {"A": Cost(200, True), "B": Cost(100, True)},
    "third": {"A": Cost(900, True), "B": Cost(1800, False)},
}


@pytest.fixture(scope="module")
def tasks(runs: Path) -> dict[str, Group]:
    """Return a group and a copy in which every run needs twice the evaluations."""
    first = max(group(read([runs])[0], targets=[Target("easy", "train/loss", 2.2, True)]), key=lambda g: len(g.rows))
    second = deepcopy(first)
    for row in second.rows:
        for run in row.runs.values():
            run.log[AXIS] = 2 * run.log[AXIS]
            run._curves.clear()
    return {"first": first, "second": second}


def test_a_profile_is_the_share_of_tasks_within_a_ratio_of_the_best() -> None:
    x, y = profile(list(TASKS.values()), "A")
    assert x.tolist() == [1, 1, 1, 2, FURTHEST]  # the best of two tasks, twice the best of one
    assert y == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    x, y = profile(list(TASKS.values()), "B")
    assert x.tolist() == [1, 1, 3, FURTHEST]  # a missed target counts as never reached
    assert y == pytest.approx([0, 1 / 3, 2 / 3, 2 / 3])
    x, y = profile(list(TASKS.values()), "B", optimistic=True)
    assert x.tolist() == [1, 1, 2, 3, FURTHEST]
    assert y == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])


def test_the_score_is_the_mean_height_of_the_profile() -> None:
    # A: two thirds from 1 to 2, then 1 up to 4.
    assert score(list(TASKS.values()), "A") == pytest.approx((2 / 3 * 1 + 1 * 2) / 3)
    assert score(list(TASKS.values()), "B") == pytest.approx((1 / 3 * 2 + 2 / 3 * 1) / 3)
    assert score([{"A": Cost(1, True), "B": Cost(1, True)}], "B") == 1
    assert score([{"A": Cost(1, True), "B": Cost(5, True)}], "B") == 0  # beyond the end


def test_an_optimistic_score_takes_a_missed_target_as_reached_where_the_runs_end() -> None:
    # A has missed none. B: a third from 1 to 2, two thirds from 2 to 3, then 1.
    assert score(list(TASKS.values()), "A", optimistic=True) == pytest.approx((2 / 3 * 1 + 1 * 2) / 3)
    assert score(list(TASKS.values()), "B", optimistic=True) == pytest.approx((1 / 3 + 2 / 3 + 1) / 3)
    # Runs that ended before the best of the others reached the target may have been the best.
    short = [{"A": Cost(100, True), "B": Cost(50, False)}]
    assert [score(short, "B", optimistic) for optimistic in (False, True)] == [0, 1]
    assert [score(short, "A", optimistic) for optimistic in (False, True)] == [1, 1]
    # Where nobody reached the target, nobody was the best.
    missed = [{"A": Cost(100, False), "B": Cost(200, False)}]
    assert [score(missed, name, optimistic) for name in "AB" for optimistic in (False, True)] == [0] * 4


def test_the_table_has_lower_limits_of_costs_and_both_ends_of_scores(tasks: dict[str, Group]) -> None:
    found = table(dict.fromkeys(TASKS, tasks["first"]), TASKS)
    assert list(found.columns) == ["task", "target", "A", "B"]
    assert [line[2:] for line in found.rows[:-1]] == [["100", "300"], ["200", "100"], ["900", "> 1,800"]]
    # 8 ninths, and from 4 to 6 ninths.
    assert found.rows[-1] == ["score", "-", "0.9", "0.4 to 0.7"]
    assert found.strong == {3}


def test_the_picture_has_a_line_for_each_optimizer() -> None:
    labelled = [line for line in draw(TASKS).axes[0].lines if not str(line.get_label()).startswith("_")]
    assert [line.get_label() for line in labelled] == ["A", "B"]
    assert len({line.get_color() for line in labelled}) == 2


def test_costs_are_medians_of_evaluations_to_the_tasks_target(tasks: dict[str, Group]) -> None:
    found = costs(tasks)
    assert list(found) == ["first", "second"]
    target = target_of(tasks["first"])
    assert target == Target("easy", "train/loss", 2.2, True)
    for row in tasks["first"].rows:
        # All runs of a row have one length, and of a middle pair the median is the first: when half of them are done.
        times = sorted(time for run in row.runs.values() if (time := run.reached(target, AXIS)) is not None)
        middle = (len(row.runs) - 1) // 2
        assert len(times) > middle
        assert found["first"][row.label] == Cost(times[middle], True)
        assert found["second"][row.label] == Cost(2 * times[middle], True)
    text = table(tasks, found)
    assert [line[0] for line in text.rows] == ["first", "second", "score"]
    assert [line[1] for line in text.rows] == ["train/loss < 2.2"] * 2 + ["-"]


def test_a_family_has_the_cost_of_its_faster_row_and_absent_optimizers_are_left_out(tasks: dict[str, Group]) -> None:
    by_label = costs(tasks)["first"]
    entry = Group(**{**vars(tasks["first"]), "families": {"both": ["grok_adamw", "grok_aga"]}})
    one = costs({"first": entry})["first"]
    assert one["both"] == Cost(min(by_label[name].value for name in ("grok_adamw", "grok_aga")), True)
    assert one.keys() == {"both", "aga of search"}
    fewer = Group(**{**vars(entry), "families": {}, "rows": entry.rows[:2]})
    assert costs({"first": tasks["first"], "second": fewer})["first"].keys() == {row.label for row in entry.rows[:2]}


def test_the_cost_of_a_missed_target_is_how_long_runs_were_watched(groups: list[Group]) -> None:
    run = next(row.any for row in groups[0].rows if row.search is None)
    rows = [
        timed(run, "half", [10, 20, None, None]),
        timed(run, "few", [10, None, None, None]),
        timed(run, "slow", [2000, 3000]),
        replace(timed(run, "short", []), runs={"0": repeated(run, 0, {AXIS: 400, "val/accuracy": 0.0})}),
    ]
    # A run that reached it says more than one that missed it, and of two that missed it the shorter one is the limit.
    families = {"some": ["few", "slow"], "none": ["few", "short"], "all": ["few", "half", "short", "slow"]}
    expected = {"half": Cost(20, True), "few": Cost(1000, False), "slow": Cost(2000, True), "short": Cost(400, False)}
    together = {"some": Cost(2000, True), "none": Cost(400, False), "all": Cost(20, True)}
    assert costs({"task": ranked(groups[0], rows, [HALF])})["task"] == expected
    for family, members in families.items():
        kept = [row for row in rows if row.label in members]
        entry = replace(ranked(groups[0], kept, [HALF]), families={family: members})
        assert costs({"task": entry})["task"] == {family: together[family]}
    # Gradient evaluations that no run of a row has logged are no cost.
    unlogged = repeated(run, 0, {"val/accuracy": 1.0})
    del unlogged.log[AXIS]
    entry = ranked(groups[0], [*rows, replace(rows[0], runs={"0": unlogged}, label="unlogged")], [HALF])
    assert costs({"task": entry})["task"] == expected


@pytest.mark.parametrize(("metric", "lower"), [("val/loss", True), ("val/accuracy", False)])
def test_without_a_target_the_level_is_what_half_of_adamws_runs_reach(
    metric: str, lower: bool, tasks: dict[str, Group]
) -> None:
    entry = Group(**{**vars(tasks["first"]), "targets": [], "metric": metric, "lower": lower})
    target = target_of(entry)
    assert target is not None and (target.metric, target.lower) == (metric, lower)
    (adamw,) = [row for row in entry.rows if row.optimizer == "adamw"]
    reached = [run.reached(target, AXIS) for run in adamw.runs.values()]
    assert 2 * sum(time is not None for time in reached) >= len(reached)
    # No stricter level is reached by half of them.
    best = sorted(adamw.best(metric, lower).values(), reverse=not lower)
    stricter = [value for value in best if (value < np.float32(target.level)) == lower]
    assert 2 * (len(stricter) - 1) < len(best) + 1


def test_without_adamw_and_a_target_there_is_no_level(tasks: dict[str, Group]) -> None:
    others = [row for row in tasks["first"].rows if row.optimizer != "adamw"]
    assert target_of(Group(**{**vars(tasks["first"]), "targets": [], "rows": others})) is None


def test_an_optimizer_whose_runs_all_diverged_never_reaches_the_target(tasks: dict[str, Group]) -> None:
    entry = deepcopy(tasks["first"])
    lost = entry.rows[-1]
    for run in lost.runs.values():
        run.diverged = True
        run.log["train/loss"] = np.full(len(run.log["epoch"]), np.nan)
        run._curves.clear()
    found = costs({"first": entry})
    assert found["first"][lost.label] == Cost(np.inf, False)
    assert score(list(found.values()), lost.label, optimistic=True) == 0
    assert table({"first": entry}, found).rows[0][-1] == "not reached"
