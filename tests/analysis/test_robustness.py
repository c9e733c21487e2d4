"""Test the tables of robustness and forgetting against plain formulas."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.robustness import robustness
from analysis.rows import Group, group
from analysis.runs import read
from tests.analysis.conftest import TEST

KEYS = [key for key in TEST if key != "robustness/train_loss"]


@pytest.fixture(scope="module")
def entry(tested: Path) -> Group:
    (found,) = group(read([tested])[0])
    return found


def differences(entry: Group) -> dict[str, dict[str, dict[str, float]]]:
    """Return the values by column, row and seed."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in entry.rows:
        for seed, run in row.runs.items():
            log = pd.read_csv(run.shown / "metrics.csv")
            if "robustness/loss" not in log:
                continue
            of = log[KEYS].dropna().iloc[-1]
            values = {
                "loss": of["robustness/loss"],
                "rise by 8 bits": of["robustness/loss_8_bit"] - of["robustness/loss"],
                "rise by 3 bits": of["robustness/loss_3_bit"] - of["robustness/loss"],
                "rise by noise": of["robustness/loss_noise"] - of["robustness/loss"],
                "top eigenvalue": of["robustness/hessian_top"],
                "rise along the gradient": of["robustness/rise_gradient"],
                "forgotten": of["forgetting/loss_after"] - of["forgetting/loss_before"],
                "learned": of["forgetting/new_loss_before"] - of["forgetting/new_loss_after"],
            }
            for name, value in values.items():
                found.setdefault(name, {}).setdefault(row.label, {})[seed] = value
    return found


def test_the_values_are_those_of_the_logs(entry: Group) -> None:
    table, _ = robustness(entry, entry.rows[0])
    expected = differences(entry)
    assert list(table.columns) == ["row", "seeds", *expected]
    for row, line in zip(entry.rows, table.rows, strict=True):
        assert line[:2] == [row.label, "2"]
        for by_row, cell in zip(expected.values(), line[2:], strict=True):
            mean = np.mean(list(by_row[row.label].values()))
            assert float(cell.split(" [")[0]) == pytest.approx(mean, rel=6e-3)
    for words in ("noise of 0.2 relative", "radius 0.05 in", "by 100 steps of AdamW at learning rate 0.001 on"):
        assert words in table.notes[0]


def test_rows_are_compared_with_the_reference_on_common_seeds(entry: Group) -> None:
    reference = entry.rows[-1]
    _, table = robustness(entry, reference)
    expected = {name: by_row for name, by_row in differences(entry).items() if name != "loss"}
    # One run has no test, so that its row has a single seed to compare.
    compared = [row for row in entry.rows[:-1] if len(expected["forgotten"][row.label]) == 2]
    assert len(compared) == len(entry.rows) - 2
    for row, line in zip(compared, table.rows, strict=True):
        assert line[0] == row.label
        for by_row, cell in zip(expected.values(), line[1:], strict=True):
            ours, others = ([by_row[label][seed] for seed in "01"] for label in (row.label, reference.label))
            assert float(cell.split(" [")[0]) == pytest.approx(np.mean(ours) - np.mean(others), rel=6e-3)
            assert float(cell.rpartition("(")[2][:-1]) == pytest.approx(stats.ttest_rel(ours, others).pvalue, rel=0.06)
    assert len(list(robustness(entry, None))) == 1


def test_runs_without_a_test_have_no_such_table(runs: Path) -> None:
    for found in group(read([runs])[0]):
        assert list(robustness(found, None)) == []
