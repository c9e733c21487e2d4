"""Test the reading of run folders, damaged ones among them."""

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from analysis.archive import find
from analysis.results import results
from analysis.rows import PUBLISHED, group
from analysis.runs import AXES, Run, read
from callbacks.milestones import THRESHOLDS
from experiment.target import Target
from tests.analysis.runs import EPOCHS, TRAINED_IN, copy, cut, unpack


def one(runs: Path, experiment: str) -> Path:
    """Return the first run folder of an experiment."""
    return min((runs / experiment).iterdir())


def logged(folder: Path, column: str) -> list[tuple[dict[str, str], float]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [(row, float(row[column])) for row in csv.DictReader(file) if row.get(column)]


def test_a_run_that_recorded_less_of_its_data_joins_the_only_one_that_it_can_be(runs: Path, tmp_path: Path) -> None:
    source = min((runs / "grok_adamw").iterdir())

    def recorded(name: str, **contents: object) -> None:
        path = copy(source, tmp_path, name) / "protocol.yaml"
        protocol = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump(protocol | {f"contents.{key}": value for key, value in contents.items()}))

    def tables() -> int:
        return len({run.identity.protocol_digest for run in read([tmp_path])[0]})

    recorded("old")
    recorded("new", corpus="a", tokenizer="b")
    assert tables() == 1  # repeats of each other, by their seed
    failed = copy(source, tmp_path, "failed")
    for name in ("metrics.csv", "protocol.yaml", "summary.json"):
        (failed / name).unlink()
    (run,), problems = read([tmp_path])
    (lost,) = [problem.identity for problem in problems if problem.folder == failed]
    assert lost is not None and lost.protocol_digest == run.identity.protocol_digest
    shutil.rmtree(failed)
    recorded("newer", corpus="a", tokenizer="c")
    assert tables() == 3  # it may be of either
    summary = json.loads((tmp_path / "copies" / "old" / "summary.json").read_text())
    (tmp_path / "copies" / "old" / "protocol.yaml").unlink()
    old = tmp_path / "copies" / "old" / "summary.json"
    old.write_text(json.dumps(summary | {"data": {"corpus": "A corpus, in words", "tokenizer": "b"}}))
    assert Run(tmp_path / "copies" / "old").identity.contents == {"tokenizer": "b"}


def test_numbers_are_those_of_the_log(runs: Path) -> None:
    folder = one(runs, "grok_aga")
    run = Run(folder)
    rows = logged(folder, "val/accuracy")
    assert (run.epochs, run.finished, run.diverged) == (EPOCHS, True, False)
    assert run.best("val/accuracy", lower=False) == max(value for _, value in rows)
    assert run.best("val/loss", lower=True) == min(value for _, value in logged(folder, "val/loss"))
    assert run.last("val/accuracy") == rows[-1][1]
    for axis in AXES:
        positions, values = run.curve("val/accuracy", axis)
        assert values.tolist() == [value for _, value in rows]
        offset = 1 if axis == "epoch" else 0  # epochs count from 1
        assert positions.tolist() == [float(row[axis]) + offset for row, _ in rows]
    assert np.isnan(run.best("val/perplexity", lower=True))
    assert run.curve("val/perplexity")[0].size == 0


def test_config_and_log_alone_give_the_same_run(runs: Path, tmp_path: Path) -> None:
    folder = copy(one(runs, "grok_aga"), tmp_path, "bare")
    for path in list(folder.iterdir()):
        if path.name not in ("config.yaml", "metrics.csv"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    bare, complete = Run(folder), Run(one(runs, "grok_aga"))
    assert bare.finished
    assert bare.log.keys() == complete.log.keys()
    assert all(np.array_equal(bare.log[name], complete.log[name], equal_nan=True) for name in bare.log)
    assert bare.identity.protocol_digest == complete.identity.protocol_digest


def test_targets_are_reached_where_the_log_first_meets_them(runs: Path) -> None:
    folder = one(runs, "grok_adamw")
    run = Run(folder)
    losses = logged(folder, "train/loss")
    level = sorted(value for _, value in losses)[2]
    expected = next(row for row, value in losses if value < level)
    target = Target("half", "train/loss", level, lower=True)
    assert run.reached(target) == float(expected["epoch"]) + 1
    assert run.reached(target, "cost/gradient_evaluations") == float(expected["cost/gradient_evaluations"])
    assert run.reached(Target("never", "train/loss", -1.0, lower=True)) is None


@pytest.mark.parametrize(
    ("evaluations", "trainer", "budget"),
    [
        ((), {}, f"{EPOCHS} epochs"),
        ((), {"max_epochs": -1, "max_steps": 4000}, "4,000 steps"),
        ((), {"max_epochs": 1}, "1 epoch"),
        ((800,), {}, "800 gradient evaluations"),
        ((1200,), {"max_epochs": -1}, "1,200 gradient evaluations"),
        ((1,), {}, "1 gradient evaluation"),
        # The one that ends first.
        ((800, 90), {}, "90 gradient evaluations"),
    ],
)
def test_the_budget_of_a_run_is_in_evaluations_or_its_length(
    evaluations: Sequence[int], trainer: dict[str, int], budget: str, runs: Path, tmp_path: Path
) -> None:
    folder = copy(one(runs, "grok_aga"), tmp_path, "budget")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    callbacks = [
        {"class_path": "callbacks.evaluation_budget.EvaluationBudget", "init_args": {"gradient_evaluations": number}}
        for number in evaluations
    ]
    config["trainer"] |= {**trainer, "callbacks": [*config["trainer"]["callbacks"], *callbacks]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    run = Run(folder)
    assert run.budget == budget
    (entry,) = group([run])
    assert results(entry).rows[0][-1] == budget


def test_a_level_is_met_in_single_precision(tmp_path: Path, runs: Path) -> None:
    folder = copy(one(runs, "grok_adamw"), tmp_path, "edge")
    rows = list(csv.DictReader((folder / "metrics.csv").open(newline="")))
    for row in rows:
        if row["val/accuracy"]:
            row["val/accuracy"] = str(float(np.float32(0.95)))  # 0.949999988...
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    assert Run(folder).reached(Target("val_95", "val/accuracy", 0.95)) == 1


def test_the_reports_targets_are_the_milestones_of_the_run(runs: Path) -> None:
    (entry,) = [entry for entry in group(read([runs])[0]) if len(entry.rows) > 1]
    assert [(t.name, t.metric, t.level, t.lower) for t in entry.targets] == [
        (t.name, t.metric, t.level, t.lower) for t in THRESHOLDS
    ]
    assert PUBLISHED.exists()
    checked = 0
    for folder in sorted(runs.glob("*/*")):
        run = Run(folder)
        milestones = json.loads((folder / "summary.json").read_text())["milestones"]
        for target in entry.targets:
            assert run.reached(target) == milestones[target.name]["epoch"]
            evaluations = milestones[target.name]["gradient_evaluations"]
            assert run.reached(target, "cost/gradient_evaluations") == evaluations
            checked += evaluations is not None
    assert checked > 5


def test_a_resumed_run_has_the_rows_of_its_beginning(tmp_path: Path) -> None:
    first, second = sorted(unpack("resumed", tmp_path).glob("*/*"))
    config = second / "config.yaml"
    config.write_text(config.read_text().replace(str(TRAINED_IN), str(tmp_path)))
    (continuous,) = unpack("continuous", tmp_path).glob("*/*")
    found, problems = read([tmp_path / "resumed"])
    assert [run.folder for run in found] == [second]
    assert [(problem.folder, "it was resumed in" in problem.reason) for problem in problems] == [(first, True)]
    for column in ("val/accuracy", "train/loss", "cost/gradient_evaluations"):
        assert found[0].curve(column)[1].tolist() == Run(continuous).curve(column)[1].tolist()
    shutil.rmtree(first)
    assert "no longer exists" in read([second])[1][0].reason


def damaged(change: Callable[[Path], object], runs: Path, tmp_path: Path) -> str:
    """Return the reason given for a run with this damage.

    A good run beside it is still read.
    """
    change(copy(one(runs, "grok_aga"), tmp_path, "damaged"))
    found, problems = read([one(runs, "grok_adamw"), tmp_path])
    assert [run.identity.optimizer for run in found] == ["adamw"]
    (problem,) = problems
    assert problem.folder == tmp_path / "copies" / "damaged"
    return problem.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: cut(folder, 10), f"half-finished: 2 epochs of {EPOCHS} epochs"),
        (lambda folder: cut(folder, 0), "no complete epoch"),
        (lambda folder: (folder / "metrics.csv").unlink(), "it has no metrics.csv"),
        (lambda folder: (folder / "metrics.csv").write_text(""), "metrics.csv cannot be read"),
        (lambda folder: (folder / "metrics.csv").write_bytes(b"\xff\xfe\0epoch\n1\n"), "metrics.csv"),
        (lambda folder: (folder / "metrics.csv").write_text("epoch,train/loss\n0,lots\n"), "not a number"),
        (lambda folder: (folder / "metrics.csv").write_text("epoch,train/loss\n0,2\n,1\n"), "without its epoch"),
        (lambda folder: (folder / "metrics.csv").write_text("epoch,train/loss\n0,2\n1\n"), "different lengths"),
        (lambda folder: (folder / "metrics.csv").write_text("a,b\n1,2\n"), "no columns"),
        (lambda folder: (folder / "config.yaml").unlink(), "it has no config.yaml"),
        (lambda folder: (folder / "config.yaml").write_text("a: [1"), "config.yaml is not valid YAML"),
        (lambda folder: (folder / "config.yaml").write_text(""), "config.yaml is empty"),
        (lambda folder: (folder / "config.yaml").write_text("a: 1"), "names no model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damage_is_listed_and_not_fatal(
    change: Callable[[Path], object], reason: str, runs: Path, tmp_path: Path
) -> None:
    assert reason in damaged(change, runs, tmp_path)


def test_an_edited_config_is_noticed(runs: Path, tmp_path: Path) -> None:
    def edit(folder: Path) -> None:
        path = folder / "config.yaml"
        path.write_text(path.read_text().replace("train_fraction: 0.3", "train_fraction: 0.5"))

    assert "it was edited" in damaged(edit, runs, tmp_path)


def test_callbacks_that_only_watch_change_neither_row_nor_numbers(runs: Path, tmp_path: Path) -> None:
    (folder,) = unpack("watched", tmp_path).glob("*/*")
    watched, plain = (
        Run(folder),
        next(run for run in map(Run, (runs / "grok_aga").iterdir()) if run.identity.seed == "0"),
    )
    rates = logged(folder, "lr-ARS2Neo/pg1")
    assert rates and not any(row["epoch"] for row, _ in rates)
    assert watched.identity.setting_digest == plain.identity.setting_digest
    for column in ("val/accuracy", "train/loss", "cost/gradient_evaluations", "optimizer/gradient_norm"):
        assert watched.curve(column)[1].tolist() == plain.curve(column)[1].tolist()


def test_a_run_that_diverged_after_rows_without_epochs_is_read(runs: Path, tmp_path: Path) -> None:
    folder = copy(one(runs, "grok_aga"), tmp_path, "diverged")
    (folder / "summary.json").unlink()
    (folder / "metrics.csv").write_text("lr-ARS2Neo,step\n0.1,0\n")
    (folder / "error.txt").write_text("FloatingPointError: the training loss is nan in epoch 1: lower it\n")
    run = Run(folder)
    assert (run.diverged, run.epochs, len(run.log["epoch"])) == (True, 0, 0)


def test_half_a_line_at_the_end_is_no_number(runs: Path, tmp_path: Path) -> None:
    folder = copy(one(runs, "grok_aga"), tmp_path, "killed")
    path = folder / "metrics.csv"
    path.write_text(path.read_text()[:-9])
    rows = len(Run(one(runs, "grok_aga")).log["epoch"])
    assert len(Run(folder).log["epoch"]) == rows - 1


def test_a_diverged_run_counts_as_one_that_never_reaches_its_target(runs: Path, tmp_path: Path) -> None:
    folder = copy(one(runs, "grok_aga"), tmp_path, "diverged")
    cut(folder, 8)
    (folder / "error.txt").write_text("Traceback\nFloatingPointError: the training loss is nan in epoch 3: lower it\n")
    (run,), problems = read([tmp_path])
    assert problems == []
    assert (run.diverged, run.finished) == (True, True)
    assert np.isnan(run.last("val/accuracy"))
    assert run.best("val/accuracy", lower=False) >= 0
    row = group([run])[0].rows[0]
    (time,) = row.times(Target("never", "val/accuracy", 2.0), "epoch").values()
    assert (time.reached, time.watched) == (None, np.inf)


def test_a_real_run_that_diverges_at_once_is_read_too(tmp_path: Path) -> None:
    (run,), problems = read([unpack("diverged", tmp_path)])
    assert problems == []
    assert (run.diverged, run.epochs) == (True, 0)
    compared = group([run])[0]
    assert compared.goal is None  # the targets of another protocol do not apply to it
    median = compared.rows[0].median(compared.targets[-1], "cost/gradient_evaluations")
    assert median is not None
    assert (median.n, median.reached, median.median) == (1, 0, None)


def test_of_repeats_with_one_seed_the_latest_counts(runs: Path, tmp_path: Path) -> None:
    folder = one(runs, "grok_aga")
    copy(folder, tmp_path, "2020-01-01-seed0")
    later = copy(folder, tmp_path, "2030-01-01-seed0")
    found, problems = read([tmp_path])
    assert [run.folder for run in found] == [later]
    assert "same setting and seed" in problems[0].reason


def test_a_folder_that_is_not_there_is_listed(tmp_path: Path) -> None:
    found, problems = read([tmp_path / "nothing"])
    assert found == []
    assert problems[0].reason == "there is no such folder"


def test_an_evaluation_is_no_training_run(tmp_path: Path) -> None:
    problems = read([unpack("evaluation", tmp_path)])[1]
    assert [problem.reason for problem in problems] == ["it is an evaluation, not a training run"]


def test_wandb_files_in_a_run_folder_are_no_run(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    (folder / "wandb" / "offline" / "files").mkdir(parents=True)
    (folder / "wandb" / "offline" / "files" / "config.yaml").write_text("a: 1")
    assert list(find([tmp_path])) == []
