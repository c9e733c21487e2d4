"""Test which row is the baseline, and which rows are settled to be ahead of which."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from analysis.comparison import _places, baseline, check_names, settled, who_is_ahead
from analysis.rows import Group, Row
from analysis.runs import Run
from experiment.target import Target
from tests.analysis.runs import HALF, ranked, timed, valued

FAST, SLOW = [10, 11, 12, 10, 13], [20, 25, 21, 26, 20]


def raced(groups: list[Group], *rows: Row) -> Group:
    """Return a group of rows that are ranked by their evaluations to :data:`HALF`."""
    return ranked(groups[0], rows, [HALF])


def test_the_baseline_can_be_chosen(groups: list[Group]) -> None:
    chosen = [baseline(groups[0], wanted) for wanted in ("grok_aga", "adamw", "nobody")]
    assert [row and row.label for row in chosen] == ["grok_aga", "grok_adamw", None]
    assert baseline(groups[1], None) is None  # a single row has nothing to be compared with


def test_without_a_choice_the_baseline_is_the_best_adamw_or_else_the_best_row(groups: list[Group]) -> None:
    reference = baseline(groups[0], None)
    assert reference is not None and reference.label == "grok_adamw" and reference is not groups[0].rows[0]
    others = [row for row in groups[0].rows if row is not reference]
    assert baseline(replace(groups[0], rows=others), None) is others[0]


def test_a_name_that_no_row_or_run_has_is_refused_with_the_nearest_one(groups: list[Group]) -> None:
    check_names(groups, "grok_aga", [Target.parse("val/accuracy >= 0.5")])
    with pytest.raises(ValueError, match=r"is named grok_agaa, the --baseline; did you mean grok_aga\?$"):
        check_names(groups, "grok_agaa", ())
    with pytest.raises(
        ValueError, match=r"no run logged val/acc, the metric of a --target; did you mean val/accuracy\?$"
    ):
        check_names(groups, None, [Target.parse("val/acc >= 0.5")])


def test_rows_that_are_clearly_apart_are_settled(groups: list[Group], run: Run) -> None:
    times = {"a": FAST, "b": SLOW, "c": [41, 52, 40, 55, 44], "d": [90, 99, 82, 120, 85]}
    entry = raced(groups, *(timed(run, label, row) for label, row in times.items()))
    sign, tested = settled(entry)
    assert tested == 6
    assert sign.tolist() == [[0, 1, 1, 1], [-1, 0, 1, 1], [-1, -1, 0, 1], [-1, -1, -1, 0]]
    table = who_is_ahead(entry)
    assert table is not None and list(table.columns) == ["row", "no.", "ahead of", "behind", "not settled"]
    assert table.rows == [
        ["a", "1", "2 to 4", "-", "-"],
        ["b", "2", "3, 4", "1", "-"],
        ["c", "3", "4", "1, 2", "-"],
        ["d", "4", "-", "1 to 3", "-"],
    ]


def test_a_row_with_fewer_than_five_common_seeds_is_not_settled(groups: list[Group], run: Run) -> None:
    slow, few = timed(run, "slow", SLOW), timed(run, "few", [1, 1.2, 1.1, 1.3])
    # Four seeds in common, of five.
    apart = timed(run, "apart", [1.4, 1.5, 1.6, 1.45, 1.55], first=1)
    assert stats.ttest_rel(np.log([1, 1.2, 1.1, 1.3]), np.log(SLOW[:4])).pvalue < 0.001
    entry = raced(groups, timed(run, "fast", FAST), slow, few, apart)
    table = who_is_ahead(entry)
    assert table is not None
    assert table.rows == [
        ["few", "1", "-", "-", "2 to 4"],
        ["apart", "2", "-", "-", "1, 3, 4"],
        ["fast", "3", "4", "-", "1, 2"],
        ["slow", "4", "-", "3", "1, 2"],
    ]
    assert settled(entry)[1] == 1
    # Where no pair has five, there is nothing to show.
    assert who_is_ahead(raced(groups, slow, few)) is None


def test_the_p_value_of_a_pair_is_adjusted_for_all_pairs_that_can_be_tested(groups: list[Group], run: Run) -> None:
    one, other = [0.5, 0.6, 0.55, 0.5, 0.6], [0.54, 0.7, 0.56, 0.56, 0.62]
    p = stats.ttest_rel(one, other).pvalue
    assert 0.05 / 3 < p < 0.05
    rows = [valued(run, "worse", one), valued(run, "better", other)]
    alone = ranked(groups[0], rows)
    assert settled(alone)[0].tolist() == [[0, 1], [-1, 0]]
    # A third row, which is no worse and no better than either, has two more pairs.
    third = [0.62, 0.5, 0.66, 0.6, 0.5]
    assert min(stats.ttest_rel(third, values).pvalue for values in (one, other)) > 0.05
    sign, tested = settled(ranked(groups[0], [*rows, valued(run, "third", third)]))
    assert (tested, sign.any()) == (3, False)
    # A fourth with few seeds has pairs that are not tested, and so are not counted.
    assert settled(ranked(groups[0], [*rows, valued(run, "few", third[:4])]))[1] == 1


def test_a_pair_in_which_a_run_missed_the_target_is_settled_by_the_sign_test(groups: list[Group], run: Run) -> None:
    # First on five of five: p is 2 / 32. On six of six it is 2 / 64.
    for seeds, sign in ((5, 0), (6, 1)):
        rows = timed(run, "fast", [10.0 + seed for seed in range(seeds)]), timed(run, "never", [None] * seeds)
        assert settled(raced(groups, *rows))[0].tolist() == [[0, sign], [-sign, 0]]


@pytest.mark.parametrize(("metric", "lower", "best"), [("val/accuracy", False, "high"), ("val/loss", True, "low")])
def test_the_better_of_two_values_is_ahead(metric: str, lower: bool, best: str, groups: list[Group], run: Run) -> None:
    values = {"low": [0.3, 0.32, 0.31, 0.29, 0.3], "high": [0.5, 0.55, 0.49, 0.5, 0.56]}
    entry = replace(groups[0], metric=metric, lower=lower)
    table = who_is_ahead(ranked(entry, [valued(run, label, row, metric) for label, row in values.items()]))
    assert table is not None and table.rows[0] == [best, "1", "2", "-", "-"]
    assert f"By {metric};" in table.notes[0] and "The test is the paired t-test." in table.notes[0]


def test_values_that_runs_were_stopped_at_settle_nothing(groups: list[Group], run: Run) -> None:
    rows = valued(run, "high", [0.9, 0.92, 0.95, 0.9, 0.91]), valued(run, "low", [0.5, 0.55, 0.49, 0.5, 0.56])
    assert who_is_ahead(ranked(groups[0], rows)) is not None
    rows[0].runs["0"].log["milestone/full"] = np.full(len(run.log["epoch"]), 6.0)
    assert who_is_ahead(ranked(groups[0], rows)) is None


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], "-"),
        ([1], "1"),
        ([1, 2], "1, 2"),
        ([1, 2, 3], "1 to 3"),
        ([1, 3, 4, 5], "1, 3 to 5"),
        ([1, 2, 4, 6, 7, 8, 9], "1, 2, 4, 6 to 9"),
    ],
)
def test_three_numbers_in_a_row_or_more_are_a_range(numbers: list[int], text: str) -> None:
    assert _places(numbers) == text
