"""Test the tables of values, times and costs against numbers from the logs."""

import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from analysis.comparison import baseline
from analysis.results import is_share, metric_text, milestones, named, published, results, step_cost, to_target
from analysis.rows import PUBLISHED, Group
from analysis.runs import Run
from analysis.statistics import bounded_interval, mean_interval
from analysis.tables import Table
from experiment.target import Target
from tests.analysis.runs import HALF, ranked, repeated, timed, valued

ANY = Target("any", "train/loss", 100.0, lower=True)


def line_of(table: Table | None, label: str) -> dict[str, str]:
    """Return the cells of a row by column."""
    assert table is not None
    (cells,) = [line for line in table.rows if line[0] == label]
    return dict(zip(table.columns, cells, strict=True))


def test_means_and_intervals_are_those_of_the_logs(groups: list[Group], runs: Path) -> None:
    best = [pd.read_csv(path / "metrics.csv")["val/accuracy"].max() for path in (runs / "grok_aga").iterdir()]
    mean = np.mean(best)
    low, high = stats.t.interval(0.95, len(best) - 1, mean, stats.sem(best))
    assert low < 0  # no share is
    # On the logit scale, whose derivative at the mean is 1 / (mean (1 - mean)).
    logit = np.log(mean / (1 - mean)) + np.array([low - mean, high - mean]) / (mean * (1 - mean))
    low, high = 100 / (1 + np.exp(-logit))
    table = results(groups[0])
    cells = line_of(table, "grok_aga")
    assert list(table.columns)[-3:] == ["seeds", "tuning trials", "at most"]
    assert [*cells.values()][-3:] == ["3", "none", "6 epochs"]
    assert cells["best val/accuracy"] == f"{100 * mean:.2f} % [{low:.2f}, {high:.2f}]"


def test_percent_is_used_for_shares_only() -> None:
    assert is_share("val/accuracy") and not is_share("val/perplexity")
    assert metric_text("val/accuracy", mean_interval([0.5])) == "50.00 %"
    assert metric_text("val/perplexity", mean_interval([90.69])) == "90.69"


def test_an_interval_of_a_share_stays_between_nothing_and_everything(groups: list[Group], run: Run) -> None:
    scattered = [0.5, 0.99, 0.98]
    low, high = stats.t.interval(0.95, 2, np.mean(scattered), stats.sem(scattered))
    assert low < 1 < high
    found = bounded_interval(scattered, 1.0)
    assert found.low is not None and found.high is not None and 0 < found.low < found.mean < found.high < 1
    entry = ranked(groups[0], [valued(run, "scattered", scattered)])
    expected = f"82.33 % [{100 * found.low:.2f}, {100 * found.high:.2f}]"
    assert line_of(results(entry), "scattered")["best val/accuracy"] == expected


def test_a_test_after_training_has_a_column(groups: list[Group]) -> None:
    entry = deepcopy(groups[0])
    assert not any(head.startswith("test/") for head in results(entry).columns)
    tested = next(row for row in entry.rows if len(row.runs) == 3)
    for number, run in enumerate(tested.runs.values()):
        run.log["test/accuracy"] = np.append(np.full(len(run.log["epoch"]) - 1, np.nan), 0.5 + number / 10)
    table = results(entry)
    place = list(table.columns).index("test/accuracy")
    assert [cells[place][:7] for cells in table.rows] == ["60.00 %" if row is tested else "-" for row in entry.rows]
    assert "Tested after training: the checkpoint with the best val/accuracy." in table.notes


def test_the_notes_name_the_rows_that_were_tuned_unequally_and_the_seeds_that_they_lack(groups: list[Group]) -> None:
    notes = results(groups[0]).notes
    assert [note for note in notes if "equal budgets" in note] == [
        "The rows were not tuned with equal budgets: aga of search (2 trials); grok_adamw, grok_aga (none)."
    ]
    assert [note for note in notes if note.startswith("Not every row")] == [
        "Not every row has every seed: aga of search lacks 0, 1, 2; grok_adamw lacks 5; grok_aga lacks 5."
    ]
    equal = replace(groups[0], rows=[row for row in groups[0].rows if row.trials is None])
    assert not any("equal budgets" in note or "Not every" in note for note in results(equal).notes)


def test_rows_whose_runs_were_stopped_at_a_level_are_named(groups: list[Group], run: Run) -> None:
    whole, stopped = valued(run, "whole", [0.5, 0.6]), valued(run, "stopped", [0.9, 0.9])
    stopped.runs["0"].log["milestone/full"] = np.full(len(run.log["epoch"]), 6.0)
    (note,) = [note for note in results(ranked(groups[0], [whole, stopped])).notes if "were stopped" in note]
    assert note.startswith("Runs of stopped were stopped when a validation metric had reached a level.")
    assert not any("were stopped" in note for note in results(ranked(groups[0], [whole])).notes)


def test_many_rows_are_counted_rather_than_named() -> None:
    assert named(["a", "b"], 5) == "a, b"
    assert named(["a", "b", "c", "d"], 9) == "a, b, c, d"
    assert named(["a", "b", "c", "d", "e"], 9) == "5 of 9 rows"
    assert named(["a", "b"], 2) == "all rows"
    assert named(["a"], 1) == "a"


def test_diverged_runs_are_counted_and_have_no_last_value(groups: list[Group], run: Run) -> None:
    row = valued(run, "some", [0.5, 0.7, 0.9])
    row.runs["2"].diverged = True
    cells = line_of(results(ranked(groups[0], [row])), "some")
    assert cells["seeds"] == "3, 1 diverged"
    assert cells["best val/accuracy"].startswith("70.00 %") and cells["last val/accuracy"].startswith("60.00 %")


def test_milestones_are_medians_over_seeds(groups: list[Group], runs: Path) -> None:
    paths = [path for path in (runs / "grok_adamw").iterdir() if "seed42" not in path.name]
    losses = [pd.read_csv(path / "metrics.csv")["train/loss"].dropna() for path in paths]
    # Two of three seeds reach the second lowest of their last losses, one of them barely.
    level = sorted(loss.iloc[-1] for loss in losses)[1] * (1 + 1e-6)
    epochs = [next((epoch for epoch, value in enumerate(loss, 1) if value < level), None) for loss in losses]
    reached = sorted(epoch for epoch in epochs if epoch is not None)
    assert len(losses) == 3 and len(reached) >= 2
    half, never = (Target(name, "train/loss", x, lower=True) for name, x in (("half", level), ("never", 0.0)))
    cells = line_of(milestones(replace(groups[0], targets=[half], borrowed=False)), "grok_adamw")
    assert cells[str(half)].startswith(f"{reached[1]} [{reached[0]}, ")
    missed = milestones(replace(groups[0], targets=[never], borrowed=False))
    assert missed is not None and {line[1] for line in missed.rows} == {"not within 6"}


def test_the_cost_of_a_target_is_a_median_with_quartiles(groups: list[Group], run: Run) -> None:
    rows = [timed(run, "all", [10, 20, 30, 40]), timed(run, "two", [10, 20, None, None]), timed(run, "never", [None])]
    table = to_target(ranked(groups[0], rows, [HALF]))
    heads = "reached", "gradient evaluations", "quartiles of gradient evaluations"
    found = {label: [line_of(table, label)[head] for head in heads] for label in ("all", "two", "never")}
    assert found["all"][0] == "4 of 4" and found["all"][1].startswith("20 [10, ") and found["all"][2] == "10 to 30"
    # Half of the runs got there, and of a quarter more nobody knows when.
    assert found["two"][0] == "2 of 4" and found["two"][1].startswith("20 [") and found["two"][2] == "10 to -"
    assert found["never"] == ["0 of 1", "not within 1,000", "-"]


def test_step_costs_are_ratios_of_the_logs_last_row(groups: list[Group]) -> None:
    reference = baseline(groups[0], None)
    table = step_cost(groups[0], reference)
    run = next(row for row in groups[0].rows if row.label == "aga of search").any
    last = pd.read_csv(run.shown / "metrics.csv").iloc[-1]
    steps, cells = last["cost/optimizer_steps"], line_of(table, "aga of search")
    assert float(cells["ms a step"]) == pytest.approx(1000 * last["cost/training_seconds"] / steps, rel=5e-3)
    assert float(cells["evaluations a step"]) == pytest.approx(last["cost/gradient_evaluations"] / steps, rel=5e-3)
    own = line_of(table, "grok_adamw")
    assert (own["over grok_adamw"], own["evaluations a step"]) == ("1", "1")
    environment = run.summary["environment"]
    assert environment["threads"] == "1" and own["machine"] == f"{environment['processor']}, 1 thread"


def test_threads_of_a_machine_are_counted(groups: list[Group], run: Run) -> None:
    row = replace(groups[0].rows[0], runs={str(seed): repeated(run, seed, {}) for seed in range(3)})
    for one, environment in zip(
        row.runs.values(),
        ({"processor": "A", "threads": "2"}, {"accelerator": "B", "threads": "12", "processor": "C"}, {}),
        strict=True,
    ):
        one.summary = {"environment": environment}
    cells = line_of(step_cost(replace(groups[0], rows=[row]), None), row.label)
    assert cells["machine"] == "A, 2 threads; B, 12 threads; not recorded"


def test_step_costs_are_medians_over_seeds_with_quartiles(groups: list[Group], run: Run) -> None:
    seconds = [1.0, 2.0, 30.0]
    logs = [{"cost/training_seconds": x, "cost/optimizer_steps": 1000.0} for x in seconds]
    row = replace(groups[0].rows[0], label="three", runs={str(i): repeated(run, i, log) for i, log in enumerate(logs)})
    two = replace(row, label="two", runs={seed: row.runs[seed] for seed in "01"})
    table = step_cost(replace(groups[0], rows=[row, two]), row)
    # A mean would follow the one that shared its machine.
    assert line_of(table, "three")["ms a step"] == "2 [1.5, 16]"
    assert (line_of(table, "two")["ms a step"], line_of(table, "two")["over three"]) == ("1.5", "0.75")


def test_a_column_of_flops_has_one_unit_in_its_head(groups: list[Group]) -> None:
    rows = [replace(row, runs={seed: Run(run.folder) for seed, run in row.runs.items()}) for row in groups[0].rows]
    entry = replace(groups[0], rows=rows, targets=[ANY], borrowed=False)
    for run in entry.rows[0].runs.values():
        run.log["cost/flops"] = 1000 * run.log["cost/flops"]
    for table, head in ((step_cost(entry, None), "MFLOPs a step"), (to_target(entry), "MFLOPs")):
        assert table is not None and [column for column in table.columns if "FLOP" in column] == [head]
        cells = [line[table.columns.index(head)] for line in table.rows]
        assert len(cells) == 3 and not any(re.search("[a-zA-Z]", cell) for cell in cells)
        run = entry.rows[0].any
        flops, steps = (run.log[f"cost/{name}"] for name in ("flops", "optimizer_steps"))
        expected = flops[-1] / steps[-1] if "step" in head else run.reached(ANY, "cost/flops")
        assert expected is not None and float(cells[0].split()[0]) == pytest.approx(expected / 1e6, rel=6e-3)


def test_published_numbers_stand_beside_runs_of_their_settings_alone(groups: list[Group]) -> None:
    # The published protocol has another p than 7.
    assert published(groups[0]) is None
    shown = replace(groups[0], published=yaml.safe_load(PUBLISHED.read_text())["modular_addition"])
    table = published(shown)
    assert table is not None
    lines = {line[0]: line for line in table.rows}
    # The published AdamW has another learning rate than the runs here; AGA has the same one.
    assert "AdamW: no run here" in lines
    assert lines["ARS2-Neo AGA: measured (grok_aga)"][1:3] == ["3", "6"]
    assert lines["ARS2-Neo AGA: later report"][3:8] == ["12", "-", "77", "116", "234"]
    assert not any("aga of search" in name for name in lines)
    others = [row for row in groups[0].rows if "grok_aga" not in row.label]
    assert others and published(replace(shown, rows=others)) is None


def test_the_last_value_is_of_the_last_epoch_and_the_best_of_the_best(groups: list[Group], run: Run) -> None:
    log = pd.read_csv(run.shown / "metrics.csv")["val/accuracy"].dropna()
    assert log.max() > log.iloc[-1]
    cells = line_of(results(groups[0]), groups[0].rows[0].label)
    assert cells["best val/accuracy"] == f"{100 * log.max():.2f} %"
    assert cells["last val/accuracy"] == f"{100 * log.iloc[-1]:.2f} %"


def test_a_target_without_any_logged_axis_has_no_cost(groups: list[Group]) -> None:
    only_trials = Group(**{**vars(groups[0]), "rows": [], "targets": [Target("any", "val/accuracy", 0.0)]})
    assert only_trials.axes == [] and to_target(only_trials) is None
