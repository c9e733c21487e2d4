"""Test that the result in words says what the numbers say, and no more."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from analysis.glance import at_a_glance
from analysis.pairs import pairs
from analysis.rows import Group, group
from analysis.runs import Run
from analysis.tables import number
from analysis.verdict import headlines, sentence
from tests.analysis.runs import HALF, ranked, timed, valued

FAST, SLOW = [10.0, 11.0, 12.0, 10.0, 13.0], [20.0, 25.0, 21.0, 26.0, 20.0]
LOWEST = "has the lowest median of gradient evaluations to val/accuracy >= 0.5"


def ratio(one: list[float], other: list[float], rows: int) -> tuple[str, str]:
    """Return a ratio of times, and the smallest p of some rows, by SciPy."""
    logs = np.log(one) - np.log(other)
    low, high = np.exp(stats.t.interval(0.95, len(logs) - 1, logs.mean(), stats.sem(logs)))
    p = rows * stats.ttest_1samp(logs, 0).pvalue
    interval = f"[{number(float(low), 3)}, {number(float(high), 3)}]"
    return f"{number(float(np.exp(logs.mean())), 3)} {interval}", number(float(p), 2)


def test_the_best_row_is_compared_with_the_baseline(groups: list[Group], run: Run) -> None:
    base, middle = timed(run, "base", SLOW), timed(run, "middle", [15, 16, 18, 17, 16])
    entry = ranked(groups[0], [base, timed(run, "best", FAST), middle], [HALF])
    value, p = ratio(FAST, SLOW, rows=2)
    assert sentence(entry, base) == (
        f"best {LOWEST}: 11 [10, 13], over 5 seeds. It needs {value} times the gradient evaluations of the baseline, "
        f"base (5 common seeds, p {p} after Holm). best is ahead of each of the 2 other rows."
    )


def test_a_baseline_that_is_best_is_compared_with_the_next_row(groups: list[Group], run: Run) -> None:
    further = [30.0, 70.0, 32.0, 34.0, 31.0]
    base, rows = timed(run, "base", FAST), [timed(run, "next", SLOW), timed(run, "last", further)]
    entry = ranked(groups[0], [*rows, base], [HALF])
    # The comparisons are those of the first table: of either row with the baseline, and not of the baseline with one.
    p = [stats.ttest_rel(np.log(times), np.log(FAST)).pvalue for times in (SLOW, further)]
    adjusted = number(float(max(p[0], 2 * min(p))), 2)
    (line,) = [line for line in at_a_glance(entry, base).rows if line[0] == "next"]
    assert line[2:4] == [ratio(SLOW, FAST, rows=2)[0], adjusted]
    for reference in (base, None):
        assert sentence(entry, reference) == (
            f"base {LOWEST}: 11 [10, 13], over 5 seeds. The next row, next, needs {line[2]} times its gradient "
            f"evaluations (5 common seeds, p {adjusted} after Holm). base is ahead of each of the 2 other rows."
        )


def test_a_baseline_that_is_best_may_not_be_distinguished_from_the_next_row(groups: list[Group], run: Run) -> None:
    near, values = [19.0, 26.0, 20.0, 27.0, 19.0], [0.5, 0.6, 0.7]
    base, rows = timed(run, "base", near), [timed(run, "next", SLOW), timed(run, "no seed", [40.0], first=9)]
    value, p = ratio(SLOW, near, rows=1)
    assert (
        f"The next row, next, cannot be distinguished from it: the mean ratio is {value} (5 common seeds, p {p} "
        in (sentence(ranked(groups[0], [*rows, base], [HALF]), base))
    )
    apart = ranked(groups[0], [base, rows[1]], [HALF])
    assert ". The next row, no seed, has too few seeds in common with it." in sentence(apart, base)
    # Of a metric that is lower for the next row: by 20, 19 and 21 points, of which the standard error is 0.577.
    metrics = [valued(run, "base", values), valued(run, "next", [0.3, 0.41, 0.49])]
    p = number(float(stats.ttest_1samp([20, 19, 21], 0).pvalue), 2)
    assert f". The next row, next, has 20 [17.5, 22.5] points less than it (3 common seeds, p {p} after Holm)." in (
        sentence(ranked(groups[0], metrics), metrics[0])
    )


def test_a_metric_is_compared_in_points_more_or_less(groups: list[Group], run: Run) -> None:
    values = {"high": [0.8, 0.86, 0.83, 0.8, 0.85], "low": [0.7, 0.77, 0.72, 0.74, 0.71]}
    rows = {label: valued(run, label, row) for label, row in values.items()}
    differences = 100 * np.subtract(values["high"], values["low"])
    limits = stats.t.interval(0.95, 4, differences.mean(), stats.sem(differences))
    size = f"{number(float(differences.mean()), 3)} [{', '.join(number(float(limit), 3) for limit in limits)}]"
    p = number(float(stats.ttest_1samp(differences, 0).pvalue), 2)
    found = sentence(ranked(groups[0], [*rows.values()]), rows["low"])
    assert found.startswith("high has the highest mean of best val/accuracy: 82.80 % [")
    assert found.endswith(
        f", over 5 seeds. It has {size} points more than the baseline, low (5 common seeds, p {p} after Holm)."
    )
    losses = {label: valued(run, label, row, "val/loss") for label, row in values.items()}
    found = sentence(ranked(replace(groups[0], metric="val/loss", lower=True), [*losses.values()]), losses["high"])
    assert found.startswith("low has the lowest mean of best val/loss: 0.728 [")
    assert f". It has {number(float(differences.mean()) / 100, 3)} [" in found
    assert f"] less than the baseline, high (5 common seeds, p {p} after Holm)." in found


def test_a_tested_metric_is_not_called_the_best(groups: list[Group], run: Run) -> None:
    rows = [valued(run, label, [x, x + 0.1, x], "test/accuracy") for label, x in (("high", 0.8), ("low", 0.7))]
    assert sentence(ranked(groups[0], rows), rows[1]).startswith(
        "high has the highest mean of test/accuracy: 83.33 % ["
    )


@pytest.mark.parametrize("seeds", [1, 2])
def test_with_fewer_than_three_seeds_nothing_is_settled(seeds: int, groups: list[Group], run: Run) -> None:
    base, best = timed(run, "base", SLOW[:seeds]), timed(run, "best", FAST[:seeds])
    found = sentence(ranked(groups[0], [base, best], [HALF]), base)
    kind = {1: "10, from one seed", 2: "10 [10, 11], over 2 seeds"}[seeds]
    least = {1: "At most 1 seed a row", 2: "At most 2 seeds a row"}[seeds]
    words = "needs the fewest gradient evaluations to val/accuracy >= 0.5" if seeds == 1 else LOWEST
    assert found == f"best {words}: {kind}. {least}: nothing here is settled."


@pytest.mark.parametrize("seeds", [3, 4])
def test_with_three_or_four_seeds_no_lead_is_settled(seeds: int, groups: list[Group], run: Run) -> None:
    base, best = timed(run, "base", SLOW[:seeds]), timed(run, "best", FAST[:seeds])
    found = sentence(ranked(groups[0], [base, best], [HALF]), base)
    value, p = ratio(FAST[:seeds], SLOW[:seeds], rows=1)
    assert found.endswith(
        f". It needs {value} times the gradient evaluations of the baseline, base ({seeds} common seeds, p {p} after "
        f"Holm). With {seeds} common seeds, no lead counts as settled."
    )
    # As many seeds as are in common, and not as many as a row has.
    longer = timed(run, "longer", [*SLOW, *SLOW], first=5 - seeds)
    found = sentence(ranked(groups[0], [longer, timed(run, "best", FAST)], [HALF]), longer)
    assert f"({seeds} common seeds, p " in found
    assert found.endswith(f" With {seeds} common seeds, no lead counts as settled.")


def test_rows_that_never_reached_the_target_are_compared_by_their_metric(groups: list[Group], run: Run) -> None:
    base, best = valued(run, "base", [0.1, 0.12, 0.14]), valued(run, "best", [0.3, 0.35, 0.4])
    first, second = headlines(ranked(groups[0], [base, best], [HALF]), base)
    assert first.startswith("best has the highest mean of best val/accuracy: 35.00 % [")
    assert second == "No run reached val/accuracy >= 0.5."
    # Those of another protocol are none to miss, and a tested row has another measure.
    assert len([*headlines(replace(ranked(groups[0], [base, best], [HALF]), borrowed=True), base)]) == 1
    tested = [valued(run, label, [0.1], "test/accuracy") for label in ("one", "other")]
    assert len([*headlines(ranked(groups[0], tested, [HALF]), None)]) == 1


def test_a_metric_without_finite_values_has_no_winner(groups: list[Group], run: Run) -> None:
    rows = [valued(run, label, [np.nan, np.inf]) for label in ("one", "other")]
    assert sentence(ranked(groups[0], rows), rows[0]) == "No run has a finite val/accuracy."


def test_a_single_row_and_none_are_said_to_be(groups: list[Group]) -> None:
    assert sentence(groups[1], None) == "grok_adamw is the only row. val/accuracy: 5.00 %, from one seed."
    only = replace(groups[1], targets=[replace(HALF, level=0.01)], borrowed=False)
    assert sentence(only, None).startswith("grok_adamw is the only row. Gradient evaluations to val/accuracy >= 0.01: ")
    (trials,) = group([run for runs in groups[0].sweeps.values() for run in runs])
    assert [*headlines(trials, None)] == ["There are only trials of searches, and no row."]


def test_the_rows_that_the_lead_is_not_settled_over_are_named(groups: list[Group], run: Run) -> None:
    best = valued(run, "best", [0.8, 0.86, 0.83, 0.8, 0.85])
    clear = valued(run, "clear", [0.3, 0.37, 0.32, 0.34, 0.31])
    # However many rows there are, this one is far behind, and no smaller number is claimed.
    p = stats.ttest_rel([0.8, 0.86, 0.83, 0.8, 0.85], [0.3, 0.37, 0.32, 0.34, 0.31]).pvalue
    assert 5 * p < 0.0001
    assert "clear (5 common seeds, p < 0.0001 after Holm)." in sentence(ranked(groups[0], [best, clear]), clear)
    near = [valued(run, f"near {n}", [0.79, 0.87, 0.82, 0.81, 0.84 - n / 1000]) for n in range(4)]
    ends = {
        1: "The lead over near 0 is not settled.",
        2: "The lead is not settled over near 0; near 1.",
        3: "The lead is not settled over near 0; near 1; near 2.",
        4: "The lead is not settled over 4 of the 5 other rows.",
    }
    for number_, end in ends.items():
        assert sentence(ranked(groups[0], [best, clear, *near[:number_]]), clear).endswith(f"). {end}")
    # The baseline was named before.
    found = sentence(ranked(groups[0], [best, clear, near[0]]), near[0])
    assert found.endswith("after Holm). best is ahead of the 1 further row.")
    assert sentence(ranked(groups[0], [best, near[0]]), near[0]).endswith(" after Holm).")
    found = sentence(ranked(groups[0], [best, *near]), near[0])
    assert found.endswith("). No lead over another row is settled.")


def test_a_row_that_may_be_no_better_cannot_be_distinguished(groups: list[Group], run: Run) -> None:
    base, near = timed(run, "base", SLOW), timed(run, "near", [19, 26, 20, 27, 19])
    value, p = ratio([19, 26, 20, 27, 19], SLOW, rows=1)
    assert sentence(ranked(groups[0], [base, near], [HALF]), base).endswith(
        f"It cannot be distinguished from the baseline, base: the mean ratio is {value} (5 common seeds, p {p} after "
        "Holm)."
    )
    values = {"base": [0.5, 0.6, 0.7], "near": [0.51, 0.62, 0.68]}
    rows = {label: valued(run, label, row) for label, row in values.items()}
    found = sentence(ranked(groups[0], [*rows.values()]), rows["base"])
    assert "It cannot be distinguished from the baseline, base: the difference is 0.333 [" in found
    assert " points (3 common seeds, p " in found


def test_who_was_first_is_said_where_a_run_missed_the_target(groups: list[Group], run: Run) -> None:
    base = timed(run, "base", [20, 25, 21, 26, 20])
    entry = ranked(groups[0], [base, timed(run, "best", [10, 11, 12, 13, None])], [HALF])
    assert "It was first on 4, second on 1 of 5 common seeds with the baseline, base (p 0.38 after Holm)." in sentence(
        entry, base
    )


def test_runs_that_were_stopped_are_not_tested(groups: list[Group], run: Run) -> None:
    base, best = (valued(run, label, [x, x, x + 0.02]) for label, x in (("base", 0.6), ("best", 0.7)))
    best.runs["0"].log["milestone/full"] = np.full(len(run.log["epoch"]), 6.0)
    assert "It is not tested against the baseline, base. " in sentence(ranked(groups[0], [base, best]), base)


def test_rows_that_never_reached_the_target_are_named_below(groups: list[Group], run: Run) -> None:
    base = timed(run, "base", FAST)
    never = [timed(run, label, [None] * 5) for label in ("one", "other")]
    entry = ranked(groups[0], [base, *never, timed(run, "once", [*[None] * 4, 900])], [HALF])
    first, second = headlines(entry, base)
    assert first == sentence(entry, base)
    assert second == "No run of these rows reached val/accuracy >= 0.5: one; other."
    assert len([*headlines(ranked(groups[0], [base], [HALF]), base)]) == 1


def test_a_target_that_fewer_than_half_of_the_seeds_reached_has_no_winner(groups: list[Group], run: Run) -> None:
    some, none = timed(run, "some", [10, None, None]), timed(run, "none", [None] * 3)
    entry = ranked(groups[0], [none, some], [HALF])
    assert [row.label for row in entry.rows] == ["some", "none"]
    first, second = headlines(entry, none)
    assert first == "No row reached val/accuracy >= 0.5 on half of its seeds; some did on 1 of 3 seeds."
    assert second == "No run of these rows reached val/accuracy >= 0.5: none."


def test_rows_without_common_seeds_are_not_said_to_be_compared(groups: list[Group], run: Run) -> None:
    base = timed(run, "base", SLOW, first=10)
    found = sentence(ranked(groups[0], [timed(run, "best", FAST), base], [HALF]), base)
    assert ". It has too few seeds in common with the baseline, base." in found
    assert "0 of 0" not in found


def test_a_difference_without_scatter_has_neither_p_nor_doubt(groups: list[Group], run: Run) -> None:
    base = valued(run, "base", [0.5] * 5)
    found = sentence(ranked(groups[0], [base, valued(run, "best", [0.75] * 5)]), base)
    assert found.endswith(". It differs from the baseline, base by 25 points on each of 5 common seeds.")


def test_only_seeds_with_a_value_are_counted(groups: list[Group], run: Run) -> None:
    base = valued(run, "base", [0.5, 0.52, 0.51, 0.53, np.nan])
    entry = ranked(groups[0], [base, valued(run, "best", [0.75, 0.8, 0.76, 0.79, 0.77])])
    assert "(4 common seeds, p " in sentence(entry, base)


def test_the_p_of_the_sentence_is_that_of_the_first_table(groups: list[Group], run: Run) -> None:
    base, best = timed(run, "base", SLOW), timed(run, "best", FAST)
    others = [timed(run, "one seed", [12.0]), timed(run, "more", [15, 19, 18, 14, 16])]
    entry = ranked(groups[0], [base, best, *others], [HALF])
    table = at_a_glance(entry, base)
    p = {line[0]: line[table.columns.index("p")] for line in table.rows}
    assert f"(5 common seeds, p {p['best']} after Holm)" in sentence(entry, base)
    by_test = next(table for table in pairs(entry, base) if "val/accuracy >= 0.5" in table.title)
    assert {line[0]: line[3] for line in by_test.rows} == {label: x for label, x in p.items() if label != "base"}


def test_a_row_that_others_are_ahead_of_on_common_seeds_is_said_to_be_behind(groups: list[Group], run: Run) -> None:
    # The lowest median is that of a row which is slower on each seed that the other has.
    best = timed(run, "best", [30, 33, 31, 36, 32, *[1] * 7])
    other = timed(run, "other", [10, 12, 10.5, 13, 11])
    third = timed(run, "third", [100, 130, 110, 140, 120])
    entry = ranked(groups[0], [best, other, third], [HALF])
    assert entry.rows[0] is best
    assert sentence(entry, third).endswith(" On common seeds it is behind other.")


def test_equal_values_and_times_are_said_to_be_equal(groups: list[Group], run: Run) -> None:
    base, same = timed(run, "base", FAST), timed(run, "same", FAST)
    found = sentence(ranked(groups[0], [base, same], [HALF]), base)
    assert " needed as many gradient evaluations as it on each of 5 common seeds." in found
    values = [valued(run, label, [0.5] * 5) for label in ("base", "same")]
    found = sentence(ranked(groups[0], values), values[0])
    assert " has the same value as it on each of 5 common seeds." in found


def test_times_in_epochs_are_called_epochs(groups: list[Group], run: Run) -> None:
    base, best = timed(run, "base", SLOW), timed(run, "best", FAST)
    for row in (base, best):
        for one in row.runs.values():
            one.log = {name: values for name, values in one.log.items() if not name.startswith("cost/")}
            one.log["val/accuracy"][: 3 if row is base else 1] = 0.0
            one._curves.clear()
    # The last seed is one epoch later, so that there is scatter.
    best.runs["4"].log["val/accuracy"][:2] = 0.0
    found = sentence(ranked(groups[0], [base, best], [HALF]), base)
    assert found.startswith("best has the lowest median of epochs to val/accuracy >= 0.5: 1 ")
    assert " times the epochs of the baseline, base " in found and "evaluations" not in found
