"""Test how runs are sorted into tables and rows, and what the rows are ranked by."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from analysis.results import milestones, to_target
from analysis.rows import AXIS, Group, Measure, group
from analysis.runs import Problem, Run, read
from experiment.identity import Sweep
from experiment.target import Target
from tests.analysis.runs import HALF, SEEDS, copy, cut, ranked, repeated, timed, valued


def test_protocols_never_share_a_table_and_seeds_of_a_setting_share_a_row(groups: list[Group]) -> None:
    first, second = groups
    assert first.digest != second.digest
    assert [sorted(entry.runs) for entry in second.rows] == [["42"]]
    by_label = {entry.label: entry for entry in first.rows}
    assert by_label.keys() == {"grok_adamw", "grok_aga", "aga of search"}
    assert sorted(by_label["grok_aga"].runs) == [str(seed) for seed in SEEDS]
    # Trials of a search are no rows.
    assert sorted(by_label["aga of search"].runs) == ["5"]


def test_unfinished_runs_of_different_lengths_are_different_rows(runs: Path, tmp_path: Path) -> None:
    for lines, path in zip((4, 4, 8), sorted((runs / "grok_aga").iterdir()), strict=True):
        cut(copy(path, tmp_path, path.name), lines)
    assert read([tmp_path])[0] == []
    (entry,) = group(read([tmp_path], unfinished=True)[0])
    lengths = {row.label: sorted(row.runs) for row in entry.rows}
    assert len(lengths) == 2
    assert all(label.startswith("grok_aga, ") and label.endswith(" of 6 epochs") for label in lengths)
    assert sorted(map(len, lengths.values())) == [1, 2]


def test_the_targets_of_a_task_of_ones_own_are_the_milestones_of_its_config(runs: Path, tmp_path: Path) -> None:
    folder = copy(min((runs / "grok_aga").iterdir()), tmp_path, "mine")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    thresholds = {"any": "val/accuracy >= 0.01", "never": "val/loss < -1"}
    callback = {"class_path": "callbacks.milestones.Milestones", "init_args": {"thresholds": thresholds}}
    config |= {"task": "mine", "trainer": {**config["trainer"], "callbacks": [callback]}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (entry,) = group(read([tmp_path])[0])
    assert [(target.name, str(target)) for target in entry.aims] == [*thresholds.items()]
    assert entry.goal == Target("never", "val/loss", -1.0, lower=True)
    table = milestones(entry)
    assert table is not None and table.columns == ["row", *thresholds.values()]
    (given,) = group(read([tmp_path])[0], targets=[Target("other", "val/loss", 1.0, lower=True)])
    assert [target.name for target in given.targets] == ["other"]


def test_borrowed_targets_that_no_run_reached_are_not_goals(groups: list[Group]) -> None:
    targets = [Target("one", "train/loss", 100.0, lower=True), Target("never", "train/loss", 0.0, lower=True)]
    own = replace(groups[0], targets=targets, borrowed=False)
    borrowed = replace(own, borrowed=True)
    none = replace(borrowed, targets=targets[1:])
    assert groups[0].borrowed  # p = 7 is no published protocol
    assert [entry.aims for entry in (own, borrowed, none)] == [targets, targets[:1], []]
    assert [entry.goal for entry in (own, borrowed, none)] == [targets[1], targets[0], None]
    assert milestones(none) is None and to_target(none) is None


def test_rows_are_ranked_by_their_own_targets_and_never_by_borrowed_ones(groups: list[Group]) -> None:
    goal, by_value = Target("any", "val/accuracy", 0.01), Measure(None, "val/accuracy", False)
    own = replace(groups[0], targets=[goal], borrowed=False)
    assert own.measure == Measure(goal, AXIS, True)
    assert str(own.measure) == "gradient evaluations to val/accuracy >= 0.01"
    borrowed = replace(own, borrowed=True)
    assert borrowed.goal == goal and borrowed.measure == by_value
    # Nor by one that no run reached.
    missed = replace(own, targets=[HALF])
    assert missed.goal == HALF and missed.measure == by_value
    assert replace(groups[0], targets=[], metric="val/loss", lower=True).measure == Measure(None, "val/loss", True)


def test_rows_are_ranked_by_the_test_metric_once_every_row_was_tested(groups: list[Group], run: Run) -> None:
    tested, other = (valued(run, label, [value], "test/accuracy") for label, value in (("good", 0.9), ("bad", 0.8)))
    entry = ranked(groups[0], [other, tested], [HALF])
    assert entry.measure == Measure(None, "test/accuracy", False)
    assert [row.label for row in entry.rows] == ["good", "bad"]
    untested = timed(run, "untested", [10])
    assert ranked(groups[0], [tested, untested], [HALF]).measure == Measure(HALF, AXIS, True)


def test_rows_are_in_the_order_of_their_times_and_then_of_their_best_values(groups: list[Group], run: Run) -> None:
    rows = [timed(run, "never", [None]), timed(run, "slow", [30]), timed(run, "fast", [10]), timed(run, "worse", [10])]
    for one in rows[-1].runs.values():
        one.log["val/accuracy"] = 0.6 * one.log["val/accuracy"]
    assert [row.label for row in ranked(groups[0], rows, [HALF]).rows] == ["fast", "worse", "slow", "never"]
    losses = [valued(run, label, [loss], "val/loss") for label, loss in (("two", 2), ("one", 1), ("none", np.nan))]
    by_loss = replace(groups[0], metric="val/loss", lower=True)
    assert [row.label for row in ranked(by_loss, losses).rows] == ["one", "two", "none"]


@pytest.mark.parametrize(("metric", "stopped"), [("val/accuracy", True), ("val/loss", True), ("train/loss", False)])
def test_a_milestone_fixes_every_metric_of_its_stage(metric: str, stopped: bool, groups: list[Group]) -> None:
    (row,) = [row for row in groups[0].rows if row.label == "grok_aga"]
    assert not groups[0].stopped_on(row, metric)
    # "full" is 99 % of val/accuracy.
    row = replace(row, runs={seed: Run(run.folder) for seed, run in row.runs.items()})
    run = row.any
    assert run.stopped_at is None
    run.log["milestone/full"] = np.full(len(run.log["epoch"]), float(run.epochs))
    assert run.stopped_at == "full"
    assert groups[0].stopped_on(row, metric) is stopped


def test_a_milestone_that_the_task_does_not_have_may_be_of_any_metric(groups: list[Group]) -> None:
    row = replace(groups[0].rows[0])
    row.runs = {"0": repeated(row.any, 0, {"milestone/full": 6})}
    unknown = replace(groups[0], milestones={})
    assert unknown.stopped_on(row, "train/loss") and unknown.stopped_on(row, "val/loss")


def test_trials_are_those_of_a_rows_own_and_of_its_familys_rows_without_a_winner(
    groups: list[Group], runs: Path
) -> None:
    found, _ = read([runs])
    # Three trials of AdamW have no winner, and two of AGA have one.
    assert {key: len(trials) for key, trials in groups[0].sweeps.items()} == {
        ("search", "adamw"): 3,
        ("search", "aga"): 2,
    }

    def trials(
        *more: Run, problems: Sequence[Problem] = (), family: Sequence[str] = ("adamw", "aga")
    ) -> dict[str, int]:
        families = {"both": family} if family else {}
        entry = max(group([*found, *more], problems, families=families), key=lambda entry: len(entry.rows))
        return {row.search[1]: row.trials or 0 for row in entry.rows if row.search is not None}

    assert trials(family=()) == {"aga": 2}
    assert trials() == {"aga": 5}
    assert trials(family=["aga"]) == trials(family=["adamw"]) == {"aga": 2}
    # One that ran again on another seed is one setting; one that left no readable run is one too.
    first = groups[0].sweeps["search", "adamw"][0]
    assert trials(repeated(first, 9, {})) == {"aga": 5}
    lost = repeated(first, 0, {}).identity
    lost.sweep = Sweep("search", "adamw", 7)
    assert trials(problems=[Problem(Path("lost"), "it has no metrics.csv", lost)]) == {"aga": 6}
    # The trials of another search found nothing here.
    other = repeated(first, 0, {})
    other.identity.sweep = Sweep("other", "adamw", 0)
    assert trials(other) == {"aga": 5}
    # Once the other row has a winner too, each has its own trials.
    winner = repeated(first, 5, {})
    winner.identity.sweep = Sweep("search", "adamw")
    assert trials(winner) == {"aga": 2, "adamw": 3}


def test_a_row_that_is_no_searchs_has_no_trials(groups: list[Group]) -> None:
    assert [row.trials for row in groups[0].rows if row.search is None] == [None, None]
