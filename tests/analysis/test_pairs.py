"""Test the comparisons with one row on common seeds against SciPy."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from analysis.comparison import baseline
from analysis.pairs import pairs
from analysis.rows import AXIS, Group
from analysis.runs import Run
from analysis.tables import number
from experiment.target import Target
from tests.analysis.runs import HALF, SEEDS, ranked, timed, valued


def test_pairs_are_scipys_paired_t_test(groups: list[Group], runs: Path) -> None:
    def best(experiment: str) -> dict[str, float]:
        found = [Run(path) for path in (runs / experiment).iterdir()]
        return {run.identity.seed: run.best("val/loss", True) for run in found}

    entry = replace(groups[0], metric="val/loss", lower=True)
    reference = baseline(entry, None)
    assert reference is not None and reference.label == "grok_adamw"
    aga, adamw = best("grok_aga"), {seed: v for seed, v in best("grok_adamw").items() if seed != "42"}
    test = stats.ttest_rel(*([values[str(seed)] for seed in SEEDS] for values in (aga, adamw)))
    quality, speed = pairs(entry, reference)
    (line,) = [line for line in quality.rows if line[0] == "grok_aga"]
    cells = dict(zip(quality.columns, line, strict=True))
    difference = np.mean([aga[str(seed)] - adamw[str(seed)] for seed in SEEDS])
    assert cells["common seeds"] == "3"
    assert float(cells["difference"].split()[0]) == pytest.approx(difference, rel=5e-3)
    # It is the only row that can be tested, so that Holm's rule changes nothing.
    assert cells["p"] == cells["t-test"] == number(float(test.pvalue), 2)
    better = np.mean([one < other for one in aga.values() for other in adamw.values()])
    assert cells["probability of being better"].split(" %")[0] == f"{100 * better:.0f}"
    # One seed in common is no pair: "aga of search" ran on another seed altogether.
    (line,) = [line for line in quality.rows if line[0] == "aga of search"]
    assert line[1:] == ["0", *["-"] * 6]
    goal = entry.goal
    assert goal is not None
    costs = [
        {run.identity.seed: run.reached(goal, AXIS) for run in map(Run, (runs / row).iterdir())}
        for row in ("grok_aga", "grok_adamw")
    ]
    first = sum((costs[0][str(seed)] or np.inf) < (costs[1][str(seed)] or np.inf) for seed in SEEDS)
    second = sum((costs[0][str(seed)] or np.inf) > (costs[1][str(seed)] or np.inf) for seed in SEEDS)
    (line,) = [line for line in speed.rows if line[0] == "grok_aga"]
    assert line[1] == f"{first} / {second} / {3 - first - second}"


def test_the_p_value_of_several_rows_is_adjusted_by_holms_rule_and_those_of_further_tests_are_not(
    groups: list[Group], run: Run
) -> None:
    values = {"base": [0.5, 0.6, 0.55, 0.5], "near": [0.52, 0.61, 0.58, 0.49], "far": [0.71, 0.85, 0.77, 0.7]}
    rows = {label: valued(run, label, row) for label, row in values.items()}
    table, *_ = pairs(ranked(groups[0], [*rows.values()]), rows["base"])
    lines = {line[0]: dict(zip(table.columns, line, strict=True)) for line in table.rows}
    p = {label: stats.ttest_rel(values[label], values["base"]).pvalue for label in ("near", "far")}
    assert p["far"] < p["near"]
    assert (lines["far"]["p"], lines["far"]["t-test"]) == (number(2 * p["far"], 2), number(p["far"], 2))
    assert lines["near"]["p"] == lines["near"]["t-test"] == number(p["near"], 2)
    # Of four seeds that all agree: 2 of 16 changes of signs.
    assert lines["far"]["permutation test"] == "0.12"
    assert lines["far"]["difference (points)"].startswith("22 [")


def test_ratios_of_every_cost_are_over_the_same_seeds(groups: list[Group], runs: Path) -> None:
    easy = Target("easy", "val/accuracy", 0.0)
    entry = replace(groups[0], targets=[easy])
    reference = baseline(entry, None)
    assert reference is not None
    speed = list(pairs(entry, reference))[-1]
    (line,) = [line for line in speed.rows if line[0] == "grok_aga"]
    for axis, name in (
        (AXIS, "ratio of evaluations"),
        ("cost/optimizer_steps", "ratio of optimizer steps"),
        ("cost/training_seconds", "ratio of training seconds"),
    ):
        aga, adamw = (
            {run.identity.seed: run.reached(easy, axis) or 0.0 for run in map(Run, (runs / row).iterdir())}
            for row in ("grok_aga", "grok_adamw")
        )
        logs = [np.log(aga[str(seed)] / adamw[str(seed)]) for seed in SEEDS]
        ratio = float(line[speed.columns.index(name)].split(" [")[0])
        assert ratio == pytest.approx(np.exp(np.mean(logs)), rel=5e-3), name


def test_rows_without_common_seeds_are_not_compared(groups: list[Group]) -> None:
    by_label = {row.label: row for row in groups[0].rows}
    entry = replace(groups[0], rows=[by_label["grok_aga"], by_label["aga of search"]])
    assert list(pairs(entry, entry.rows[0])) == []


def test_a_metric_that_runs_were_stopped_on_is_not_tested(groups: list[Group]) -> None:
    by_label = {row.label: row for row in groups[0].rows}
    adamw, aga = by_label["grok_adamw"], by_label["grok_aga"]
    whole = replace(groups[0], rows=[adamw, aga])
    values = "Paired seeds against grok_adamw: best val/accuracy"
    times = f"Paired seeds against grok_adamw: {whole.goal}"
    assert [table.title for table in pairs(whole, adamw)] == [values, times]
    # "full" is 99 % of val/accuracy: a run that reaches it has it as the best value, and the loss of that time.
    aga = replace(aga, runs={seed: Run(run.folder) for seed, run in aga.runs.items()})
    for run in aga.runs.values():
        run.log["milestone/full"] = np.full(len(run.log["epoch"]), float(run.epochs))
    entry = replace(whole, rows=[adamw, aga])
    by_loss, by_training_loss = (replace(entry, metric=f"{stage}/loss", lower=True) for stage in ("val", "train"))
    assert [table.title for table in pairs(entry, adamw)] == [times]
    assert [table.title for table in pairs(by_loss, adamw)] == [times]
    assert next(pairs(by_training_loss, adamw)).title == f"{values[:-12]}train/loss"


def test_times_are_tested_by_their_ratios_or_by_who_was_first_where_a_run_missed(groups: list[Group], run: Run) -> None:
    times = {"base": [20.0, 25.0, 21.0], "fast": [10.0, 11.0, 12.0]}
    rows = {label: timed(run, label, row) for label, row in times.items()} | {
        "missed": timed(run, "missed", [5, 6, None])
    }
    *_, table = pairs(ranked(groups[0], [*rows.values()], [HALF]), rows["base"])
    lines = {line[0]: dict(zip(table.columns, line, strict=True)) for line in table.rows}
    p = stats.ttest_rel(np.log(times["fast"]), np.log(times["base"])).pvalue
    fast, missed = lines["fast"], lines["missed"]
    assert (fast["first / second / undecided"], missed["first / second / undecided"]) == ("3 / 0 / 0", "2 / 1 / 0")
    # Three of three, and two of three.
    assert (fast["p"], fast["t-test"], fast["sign test"]) == (number(2 * p, 2), number(p, 2), "0.25")
    assert (missed["p"], missed["t-test"], missed["permutation test"], missed["sign test"]) == ("1", "-", "-", "1")
    # Of three seeds that all agree: 2 of 8 changes of signs.
    assert fast["permutation test"] == "0.25" and missed["ratio of evaluations"] == "-"
    # The limit is that of three pairs of runs, which all agree.
    limit = 100 * stats.binomtest(3, 3).proportion_ci().low
    assert fast["probability of being faster"] == f"100 % [{limit:.0f}, 100]"
    assert missed["probability of being faster"].startswith("67 % [")


def test_no_p_value_is_smaller_than_the_tests_can_be_trusted_with(groups: list[Group], run: Run) -> None:
    values = {"base": [0.5, 0.51, 0.52, 0.5, 0.53], "far": [0.7, 0.712, 0.721, 0.699, 0.731]}
    times = {"base": [200.0, 210.0, 220.0, 200.0, 230.0], "far": [20.0, 21.1, 22.0, 20.1, 23.0]}
    for of, make, targets in ((values, valued, []), (times, timed, [HALF])):
        rows = {label: make(run, label, row) for label, row in of.items()}
        test = stats.ttest_rel(*(np.log(row) if targets else row for row in of.values()))
        assert test.pvalue < 0.0001
        *_, table = pairs(ranked(groups[0], [*rows.values()], targets), rows["base"])
        (cells,) = [dict(zip(table.columns, line, strict=True)) for line in table.rows]
        assert (cells["p"], cells["t-test"], cells["permutation test"]) == ("< 0.0001", "< 0.0001", "0.062")
