"""Check the effect of each switch against the logs, by pair and by mean of four."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from analysis.ablation import ablations
from analysis.rows import Group, Row, group
from analysis.runs import read
from analysis.tables import number


@pytest.fixture(scope="module")
def entry(corners: Path) -> Group:
    (found,) = group(read([corners])[0])
    return found


def last(corners: Path, column: str) -> dict[tuple[bool, bool, bool], np.ndarray]:
    """Return the last values of a column by corner, in the order of the seeds.

    A corner is flatness, geometry and energy, on or off.
    """
    values: dict[tuple[bool, bool, bool], dict[int, float]] = {}
    for path in corners.glob("*/*/config.yaml"):
        config = yaml.safe_load(path.read_text())
        options = config["model"]["init_args"]["optimizer"]["init_args"]
        corner = options["mode"] == "sync", options["geometry"], options["energy"]
        log = pd.read_csv(path.parent / "metrics.csv")
        values.setdefault(corner, {})[config["seed_everything"]] = log[column].dropna().iloc[-1]
    return {corner: np.asarray([by[seed] for seed in sorted(by)]) for corner, by in values.items()}


def test_effects_are_those_of_the_logs(entry: Group, corners: Path) -> None:
    (table,) = ablations(entry)
    assert table.title == "Effect of each switch, in corners"
    assert len(table.rows) == 15 and table.strong == {0, 5, 10}
    lines = {line[0]: line for line in table.rows}
    assert list(table.columns)[:3] == ["switch", "best val/accuracy (points)", "last val/loss, ratio"]
    losses = last(corners, "val/loss")
    for name, on, off in (
        ("flatness, with geometry, with energy", (True, True, True), (False, True, True)),
        ("geometry, with flatness, without energy", (True, True, False), (True, False, False)),
        ("energy, without flatness, without geometry", (False, False, True), (False, False, False)),
    ):
        # A ratio of geometric means, with the interval and the test of its logarithm.
        logs = np.log(losses[on] / losses[off])
        limits = np.exp(stats.t.interval(0.95, 1, logs.mean(), stats.sem(logs)))
        interval = ", ".join(number(float(limit), 3) for limit in limits)
        test = stats.ttest_rel(np.log(losses[on]), np.log(losses[off]))
        mean, p = lines[name][2].split(" [")[0], lines[name][2].rpartition(" ")[2]
        assert float(mean) == pytest.approx(stats.gmean(losses[on]) / stats.gmean(losses[off]), rel=6e-3)
        assert lines[name][2] == f"{mean} [{interval}], p {p}" and p == number(float(test.pvalue), 2)


def test_the_mean_is_over_the_four_pairs_and_ratios_are_of_geometric_means(entry: Group, corners: Path) -> None:
    (table,) = ablations(entry)
    lines = {line[0]: line for line in table.rows}
    tops = last(corners, "flatness/hessian_top")
    assert len(tops) == 8
    logs = [np.log(tops[corner] / tops[(False, *corner[1:])]) for corner in tops if corner[0]]
    # A row in which some eigenvalue is not positive has no ratio.
    cell = lines["flatness, mean of four"][4]
    assert all((values > 0).all() for values in tops.values())
    assert float(cell.split(" [")[0]) == pytest.approx(np.exp(np.mean(logs)), rel=6e-3)


def test_a_search_without_all_corners_has_no_such_table(entry: Group) -> None:
    assert list(ablations(Group(**{**vars(entry), "rows": entry.rows[1:]}))) == []


def test_the_halves_of_energy_have_a_table_of_their_own(entry: Group, corners: Path) -> None:
    halves: list[Row] = []
    for row in entry.rows:
        options = row.any.identity.options
        if options.get("model.optimizer.mode") == "base":
            half = deepcopy(row)
            # The corners without geometry stand for the halves.
            if not options.get("model.optimizer.geometry", True):
                changed = {
                    "geometry": True,
                    "energy": "scalar" if options.get("model.optimizer.energy", True) else "whitening",
                }
                for run in half.runs.values():
                    run.identity.options.update({f"model.optimizer.{key}": value for key, value in changed.items()})
            halves.append(half)
    (table,) = ablations(Group(**{**vars(entry), "rows": halves}))
    assert [line[0] for line in table.rows] == [
        "whitening, mean of two",
        "whitening, with scalar",
        "whitening, without scalar",
        "scalar, mean of two",
        "scalar, with whitening",
        "scalar, without whitening",
    ]
    losses = last(corners, "val/loss")
    both, scalar = losses[False, True, True], losses[False, False, True]
    assert float(table.rows[1][2].split(" [")[0]) == pytest.approx(stats.gmean(both) / stats.gmean(scalar), rel=6e-3)


def test_a_row_with_half_of_energy_is_not_in_the_table_of_three_switches(entry: Group) -> None:
    row = deepcopy(entry.rows[0])
    for run in row.runs.values():
        run.identity.options["model.optimizer.energy"] = "scalar"
    (table,) = ablations(Group(**{**vars(entry), "rows": [*entry.rows, row]}))
    assert table.rows == next(ablations(entry)).rows


def test_rows_of_one_search_alone_are_called_by_their_optimizer(entry: Group) -> None:
    assert "base true true" in {row.label for row in entry.rows}
