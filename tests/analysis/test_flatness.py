"""Test the flatness tables against the logs and against SciPy's correlations."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.flatness import MEASURES, flatness
from analysis.report import write
from analysis.rows import Group, group
from analysis.runs import read
from analysis.study import Study
from analysis.tables import number


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
            # Geometric, except for the columns in which some row has a negative value.
            mean = stats.gmean(last) if names[column] in table.notes[0].partition("only (")[2] else np.mean(last)
            assert float(cell.split(" [")[0].replace(",", "")) == pytest.approx(mean, rel=6e-3, abs=1e-12)


def test_correlations_are_spearmans_with_flatter_and_better_above_zero(entry: Group) -> None:
    *_, table = flatness(entry)
    runs = [run for row in entry.rows for run in row.runs.values()]
    measured = pd.DataFrame({column: [run.last(column) for run in runs] for column in (*MEASURES, "val/loss")})
    rows = pd.Series([row.label for row in entry.rows for _ in row.runs])
    apart = measured - measured.groupby(rows).transform("mean")
    lines = {line[0]: line for line in table.rows}
    for column, name in MEASURES.items():
        mixed, within = (stats.spearmanr(found[column], found["val/loss"]).statistic for found in (measured, apart))
        assert lines[name][3] == f"{mixed:+.2f} (16 runs)"
        # Of 16 runs the means of eight rows were subtracted: t has 7 degrees of freedom.
        p = 2 * stats.t.sf(abs(within) * np.sqrt(7 / (1 - within**2)), 7)
        assert lines[name][4] == f"{within:+.2f} (16 runs, p {number(float(p), 2)})"


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
