"""Test the first table of a report against SciPy."""

from dataclasses import replace

import numpy as np
from scipy import stats

from analysis.glance import at_a_glance
from analysis.rows import Group
from analysis.runs import Run
from analysis.tables import number
from tests.analysis.runs import HALF, ranked, timed, valued


def geometric(one: list[float], other: list[float]) -> str:
    """Return the ratio of times as a table has it, by SciPy."""
    logs = np.log(one) - np.log(other)
    low, high = np.exp(stats.t.interval(0.95, len(logs) - 1, logs.mean(), stats.sem(logs)))
    return f"{number(float(np.exp(logs.mean())), 3)} [{number(float(low), 3)}, {number(float(high), 3)}]"


def test_times_are_compared_by_ratios_and_p_is_adjusted(groups: list[Group], run: Run) -> None:
    times = {"fast": [10.0, 11.0, 12.0], "base": [20.0, 25.0, 21.0], "near": [21.0, 22.0, 25.0]}
    rows = {label: timed(run, label, row) for label, row in times.items()}
    table = at_a_glance(ranked(groups[0], [*rows.values()], [HALF]), rows["base"])
    assert list(table.columns) == [
        "row",
        "gradient evaluations to val/accuracy >= 0.5",
        "ratio to base",
        "p",
        "probability of being faster",
        "seeds",
        "trials",
    ]
    p = {label: stats.ttest_rel(np.log(times[label]), np.log(times["base"])).pvalue for label in ("fast", "near")}
    assert p["fast"] < p["near"]
    # Of nine pairs of runs near is first in four, and one is undecided.
    cells = {line[0]: line for line in table.rows}
    assert [line[0] for line in table.rows] == ["fast", "base", "near"]
    assert cells["base"][2:5] == ["baseline", "-", "-"]
    # All nine pairs agree: the limit is that of three pairs of different runs.
    always = f"100 % [{100 * stats.binomtest(3, 3).proportion_ci().low:.0f}, 100]"
    assert cells["fast"][2:5] == [geometric(times["fast"], times["base"]), number(2 * p["fast"], 2), always]
    assert cells["near"][2:4] == [geometric(times["near"], times["base"]), number(p["near"], 2)]
    ahead = [(one < other) + (one == other) / 2 for one in times["near"] for other in times["base"]]
    assert cells["near"][4].startswith(f"{100 * np.mean(ahead):.0f} % [")
    assert cells["fast"][1].startswith("11 [10, ") and cells["fast"][5:] == ["3", "none"]


def test_a_row_that_missed_the_target_is_compared_by_who_was_first(groups: list[Group], run: Run) -> None:
    base = timed(run, "base", [20, 25, 21, 26, 22, 20])
    often = timed(run, "often", [10, 11, 12, 13, 10, None])
    never = timed(run, "never", [None] * 6)
    table = at_a_glance(ranked(groups[0], [base, often, never], [HALF]), base)
    cells = {line[0]: line for line in table.rows}
    sign = {"often": 2 * (1 + 6) / 64, "never": 2 / 64}
    assert cells["often"][2:4] == ["first on 5, second on 1 of 6", number(sign["often"], 2)]
    rarely = f"0 % [0, {100 * stats.binomtest(0, 6).proportion_ci().high:.0f}]"
    assert cells["never"][2:5] == ["first on 0, second on 6 of 6", number(2 * sign["never"], 2), rarely]
    assert cells["often"][1].endswith(" (5 of 6)") and cells["never"][1] == "not within 1,000 (0 of 6)"


def test_two_rows_that_both_missed_the_target_are_undecided(groups: list[Group], run: Run) -> None:
    base, reached = timed(run, "base", [None, None]), timed(run, "reached", [10], first=7)
    table = at_a_glance(ranked(groups[0], [base, timed(run, "other", [None, None]), reached], [HALF]), base)
    (line,) = [line for line in table.rows if line[0] == "other"]
    assert line[2:5] == ["first on 0, second on 0, undecided on 2 of 2", "-", "-"]


def test_shares_are_compared_in_points(groups: list[Group], run: Run) -> None:
    values = {"better": [0.6, 0.62, 0.65], "base": [0.5, 0.64, 0.55]}
    rows = {label: valued(run, label, row) for label, row in values.items()}
    table = at_a_glance(ranked(groups[0], [*rows.values()]), rows["base"])
    assert list(table.columns)[1:5] == [
        "best val/accuracy",
        "difference to base (points)",
        "p",
        "probability of being better",
    ]
    differences = 100 * np.subtract(values["better"], values["base"])
    limits = stats.t.interval(0.95, 2, differences.mean(), stats.sem(differences))
    low, high = (number(float(limit), 3) for limit in limits)
    line = table.rows[0]
    assert line[1].startswith("62.33 % [")
    assert line[2] == f"{number(float(differences.mean()), 3)} [{low}, {high}]"
    assert line[3] == number(float(stats.ttest_rel(*values.values()).pvalue), 2)
    # Seven of nine pairs.
    assert line[4].startswith("78 % [")


def test_rows_with_one_common_seed_are_not_compared(groups: list[Group], run: Run) -> None:
    for make, targets in ((timed, [HALF]), (valued, [])):
        base, other = make(run, "base", [0.5, 0.6]), make(run, "other", [0.7, 0.8], first=1)
        table = at_a_glance(ranked(groups[0], [base, other], targets), base)
        (line,) = [line for line in table.rows if line[0] == "other"]
        assert line[2:5] == ["-", "-", "-"]


def test_values_that_runs_were_stopped_at_are_not_compared(groups: list[Group], run: Run) -> None:
    base, stopped = valued(run, "base", [0.5, 0.6]), valued(run, "stopped", [0.9, 0.95])
    stopped.runs["1"].log["milestone/full"] = np.full(len(run.log["epoch"]), 6.0)
    table = at_a_glance(ranked(groups[0], [base, stopped]), base)
    assert table.rows[0][0] == "stopped" and table.rows[0][2:5] == ["-", "-", "-"]


def test_a_single_row_is_compared_with_nothing(groups: list[Group]) -> None:
    table = at_a_glance(groups[1], None)
    assert list(table.columns) == ["row", "best val/accuracy", "seeds", "trials"]
    assert table.rows == [["grok_adamw", "5.00 %", "1", "none"]]
    (note,) = table.notes
    assert note.startswith("Mean over seeds with its 95 % interval. ") and note.endswith(", so it is optimistic.")


def test_the_notes_say_what_p_rests_on_where_seeds_are_few(groups: list[Group], run: Run) -> None:
    def notes(seeds: int) -> list[str]:
        values = np.linspace(0.4, 0.6, seeds)
        rows = [valued(run, "base", [*values]), valued(run, "other", [*values**2, 0.5])]
        return [note for note in at_a_glance(ranked(groups[0], rows), rows[0]).notes if "permutation" in note]

    # Of 2 ** n changes of signs, no fewer than two are as extreme. Only common seeds count.
    for seeds, least in ((3, "0.25"), (5, "0.0625"), (6, "0.03125")):
        (note,) = notes(seeds)
        assert note.startswith(f"With {seeds} common seeds the t-test rests on normally distributed differences: ")
        assert note.endswith(f" could not give less than {least}.")
    assert notes(7) == []


def test_a_p_value_is_never_smaller_than_one_in_ten_thousand(groups: list[Group], run: Run) -> None:
    values = {"base": [0.5, 0.51, 0.52, 0.5, 0.53], "far": [0.7, 0.712, 0.721, 0.699, 0.731]}
    assert stats.ttest_rel(*values.values()).pvalue < 0.0001
    rows = {label: valued(run, label, row) for label, row in values.items()}
    table = at_a_glance(ranked(groups[0], [*rows.values()]), rows["base"])
    assert table.rows[0][0] == "far" and table.rows[0][3] == "< 0.0001"


def test_seeds_that_diverged_and_trials_are_counted(groups: list[Group], run: Run) -> None:
    row = valued(run, "some", [0.5, 0.6, 0.7])
    row.runs["2"].diverged, row.trials = True, 24
    (line,) = at_a_glance(ranked(groups[0], [row]), None).rows
    assert line[2:] == ["3, 1 diverged", "24"]


def test_a_test_metric_is_not_called_the_best(groups: list[Group], run: Run) -> None:
    losses = replace(groups[0], metric="val/loss", lower=True)
    rows = [valued(run, label, [x, x + 0.1], "test/loss") for label, x in (("tested", 1.5), ("base", 1.8))]
    table = at_a_glance(ranked(losses, rows), rows[1])
    assert table.columns[1] == "test/loss" and table.rows[0][1].startswith("1.55 [")
    assert not any("optimistic" in note for note in table.notes)
    # Points are of shares.
    assert table.columns[2] == "difference to base"
