"""Test the flatness tables against the logs, SciPy and all permutations."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.flatness import MEASURES, flatness
from analysis.report import write
from analysis.rows import Group, Row, group
from analysis.runs import Run, read
from analysis.study import Study
from tests.analysis.runs import repeated

WITHIN = "with lower val/loss, within rows"


@pytest.fixture(scope="module")
def entry(corners: Path) -> Group:
    (found,) = group(read([corners])[0])
    return found


def test_the_last_values_are_those_of_the_logs(entry: Group) -> None:
    table, _ = flatness(entry)
    assert len(table.rows) == 8 and "at radius 0.05 in" in table.notes[0]
    names = {"flatness/probe_loss": "loss", **MEASURES}
    for row, line in zip(entry.rows, table.rows, strict=True):
        logs = [pd.read_csv(run.shown / "metrics.csv") for run in row.runs.values()]
        for column, cell in zip(["flatness/probe_loss", *MEASURES], line[2:], strict=True):
            last = [log[column].dropna().iloc[-1] for log in logs]
            # Geometric, except for columns with a negative value; of two seeds mean and median agree.
            mean = stats.gmean(last) if names[column] in table.notes[0].partition("only (")[2] else np.median(last)
            assert float(cell.split(" [")[0].replace(",", "")) == pytest.approx(mean, rel=6e-3, abs=1e-12)


def test_a_column_with_a_negative_value_has_medians_and_quartiles(run: Run) -> None:
    row = probed(run, "row", [-4.0, 1.0, 2.0, 300.0], [0.5] * 4)
    table = next(flatness(Group("t", "d", [row], "val/loss", True, [])))
    cell = dict(zip(table.columns, table.rows[0], strict=True))["top eigenvalue"]
    low, median, high = np.quantile([-4.0, 1.0, 2.0, 300.0], [0.25, 0.5, 0.75])
    assert cell == f"{median:g} [{low:g}, {high:.3g}]"
    assert "top eigenvalue" not in table.notes[0].partition("only (")[2].partition(")")[0]


def probed(run: Run, label: str, tops: Sequence[float], losses: Sequence[float]) -> Row:
    """Return a row of copies of a run with these top eigenvalues and losses."""
    logs = [{"flatness/hessian_top": top, "val/loss": loss} for top, loss in zip(tops, losses, strict=True)]
    return Row({str(seed): repeated(run, seed, log) for seed, log in enumerate(logs)}, label)


def correlations(group: Group, *rows: Row) -> tuple[str, str]:
    """Return how eigenvalues go with the loss, over all runs and within rows."""
    *_, table = flatness(replace(group, rows=[*rows]))
    (line,) = table.rows
    assert line[0] == "top eigenvalue" and list(table.columns)[3:] == ["with lower val/loss", WITHIN]
    return line[3], line[4]


def parts(cell: str) -> tuple[float, int, float]:
    """Return a correlation, the number of its runs, and its p."""
    found = re.fullmatch(r"([+-][\d.]+) \((\d+) runs, p ([\d.]+)\)", cell)
    assert found is not None, cell
    return float(found[1]), int(found[2]), float(found[3])


def drawn(p: float) -> object:
    """Return what 9,999 random permutations may give for the exact ``p``."""
    rounding = 0.5 * 10 ** (np.floor(np.log10(p)) - 1)
    return pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / 9999) + rounding)


def test_correlations_have_flatter_and_better_above_zero(entry: Group) -> None:
    *_, table = flatness(entry)
    runs = [run for row in entry.rows for run in row.runs.values()]
    measured = pd.DataFrame({column: [run.last(column) for run in runs] for column in (*MEASURES, "val/loss")})
    lines, signs = {line[0]: line for line in table.rows}, []
    for column, name in MEASURES.items():
        mixed = stats.spearmanr(measured[column], measured["val/loss"]).statistic
        assert lines[name][3] == f"{mixed:+.2f} (16 runs)"
        # Each of the eight rows has two seeds, of which the flatter one is better or worse: a sign test.
        steps = [measured[key].to_numpy().reshape(8, 2) @ [1, -1] for key in (column, "val/loss")]
        agree = int((np.prod(steps, axis=0) > 0).sum())
        assert np.all(np.prod(steps, axis=0) != 0)
        rho, n, p = parts(lines[name][4])
        assert (rho, n) == ((2 * agree - 8) / 8, 16)
        assert p == drawn(float(stats.binomtest(agree, 8).pvalue))
        signs.append(agree)
    assert len(set(signs)) > 1


@pytest.mark.parametrize(
    ("tops", "losses"),
    [
        ([5, 1, 4, 2, 3], [5, 2, 3, 1, 4]),
        ([5, 1, 4, 2, 3], [1, 5, 3, 2, 4]),
        ([60, 10, 40, 20, 30, 50], [0.5, 0.2, 0.3, 0.1, 0.6, 0.4]),
        ([60, 10, 40, 20, 30, 50], [0.5, 0.2, 0.2, 0.1, 0.5, 0.4]),  # ties
        ([60, 10, 40, 20, 20, 50], [0.1, 0.4, 0.2, 0.5, 0.3, 0.2]),
        ([60, 10, 40, 20, 30, 50], [0.4, 0.1, 0.1, 0.1, 0.1, 0.1]),
    ],
)
def test_within_a_single_row_p_is_of_every_order_of_its_seeds(
    tops: Sequence[float], losses: Sequence[float], groups: list[Group], run: Run
) -> None:
    overall, within = correlations(groups[0], probed(run, "one", tops, losses))
    rho = stats.spearmanr(tops, losses).statistic
    assert overall == f"{rho:+.2f} ({len(tops)} runs)"
    orders = [stats.spearmanr(order, losses).statistic for order in itertools.permutations(tops)]
    exact = float(np.mean(np.abs(orders) >= abs(rho) - 1e-9))
    found = parts(within)
    assert found[:2] == (float(f"{rho:.2f}"), len(tops))
    assert 0.01 < exact < 0.99 and found[2] == drawn(exact)


def test_differences_between_rows_are_not_within_them(groups: list[Group], run: Run) -> None:
    # Within either row the flatter seed is better, and the row with flatter runs is the worse one.
    first, second = probed(run, "first", [1, 2, 3], [7, 8, 9]), probed(run, "second", [11, 12, 13], [1, 2, 3])
    overall, within = correlations(groups[0], first, second)
    # Ranks differ by 3 in all six runs: 1 - 6 * 6 * 9 / (6 * 35).
    assert overall == "-0.54 (6 runs)"
    # Of 36 orders of three and three seeds, one agrees as much, and one disagrees as much.
    assert parts(within) == (1.0, 6, drawn(2 / 36))
    # Ranks are those of one row: a row of a single seed has none, and few seeds have no correlation.
    single = probed(run, "single", [99], [99])
    assert correlations(groups[0], first, second, single)[1] == within
    assert correlations(groups[0], first, probed(run, "two", [1, 2], [1, 2]))[1].startswith("+1.00 (5 runs, p ")
    assert list(flatness(replace(groups[0], rows=[first, single])))[1:] == []


def test_better_is_higher_for_an_accuracy(entry: Group) -> None:
    accuracy = [line[1] for line in list(flatness(entry))[1].rows]
    loss = Group(**{**vars(entry), "metric": "val/loss", "lower": True})
    assert [line[1] for line in list(flatness(loss))[1].rows] == [line[3] for line in list(flatness(entry))[1].rows]
    assert not entry.lower and accuracy


def test_runs_that_were_not_probed_have_no_such_table(runs: Path) -> None:
    for found in group(read([runs])[0]):
        assert list(flatness(found)) == []


def test_the_report_has_the_tables_and_curves_of_the_probes(tested: Path, tmp_path: Path) -> None:
    write(tmp_path, group(read([tested])[0]), [], Study(title="Corners"))
    text = (tmp_path / "report.html").read_text()
    titles = ("Flatness at the end", "Does flatter go with better?", "Robustness of the tested checkpoint")
    for title in (*titles, "Effect of each switch, in corners"):
        assert f"<h3>{title}</h3>" in text
    assert "flatness/hessian_top over gradient evaluations" in text
    assert set(MEASURES) <= set(pd.read_csv(tmp_path / "runs.csv").columns)
