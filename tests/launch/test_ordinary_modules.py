"""An ordinary LightningModule trains on the command line, counted and reported."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.results import results
from analysis.rows import group
from analysis.runs import read
from experiment.identity import RunIdentity
from tests.helpers.commands import Result, call, metrics
from tests.helpers.commands import fit as fit_by_command
from tests.launch.lit import LitAddition

DATA = (
    *("--data", "datamodules.modular_addition.ModularAdditionData", "--data.p", "7", "--data.batch_size", "4"),
    *("--checkpoint.monitor", "val_accuracy", "--checkpoint.mode", "max"),
    *("--trainer.max_epochs", "3", "--trainer.accelerator", "cpu", "--wandb", "false"),
)


def options(name: str = "LitAddition", *more: str) -> tuple[str, ...]:
    return ("--model", f"tests.launch.lit.{name}", *DATA, *more)


def fit(runs: Path, *more: str, name: str = "LitAddition") -> Path:
    return fit_by_command(runs, *options(name, *more))


def weights(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return state


@pytest.mark.parametrize(("mode", "passes"), [("base", 1.0), ("sync", 2.0), ("aga", None)])
def test_its_costs_are_counted_and_summarised(mode: str, passes: float | None, tmp_path: Path) -> None:
    folder = fit(tmp_path, "--model.mode", mode, "--trainer.accumulate_grad_batches", "3")
    summary = json.loads((folder / "summary.json").read_text())
    costs = summary["costs"]
    assert costs["optimizer_steps"] == 6 and costs["examples"] == 3 * 14  # four batches of 14 pairs, in two windows
    rate = costs["gradient_evaluations"] / costs["optimizer_steps"]
    assert rate == passes if passes else 1 < rate < 2
    assert costs["flops"] > 0
    assert summary["metrics"].keys() == {"val_loss", "val_accuracy"}
    assert summary["metrics"]["val_loss"]["best"] <= summary["metrics"]["val_loss"]["last"]
    rows = [row for row in metrics(folder) if row.get("train/loss")]
    assert [float(row["train/loss"]) for row in rows] == pytest.approx(
        [float(row["epoch_loss"]) for row in rows], rel=1e-5
    )


def test_its_training_step_may_empty_the_batch(tmp_path: Path) -> None:
    expected = metrics(fit(tmp_path / "tuples", name="Pops"))
    found = metrics(fit(tmp_path / "names", "--data", "tests.launch.lit.ByName", name="Pops"))
    assert [row.get("train/loss") for row in found] == [row.get("train/loss") for row in expected]


def test_its_runs_are_rows_of_one_table(tmp_path: Path) -> None:
    for mode in ("base", "sync"):
        fit(tmp_path, "--model.mode", mode, "--experiment", mode)
    runs, problems = read([tmp_path])
    (table,) = group(runs)
    assert not problems and {row.name for row in table.rows} == {"base", "sync"}
    # Names such as val_loss are read as those of the suite.
    assert table.metric == "val/accuracy" and not table.lower
    shown = results(table)
    assert {"best val/loss", "last val/loss"} <= set(shown.columns)
    assert "-" not in [cell for line in shown.rows for cell in line]


def test_an_evaluation_is_not_a_broken_run(tmp_path: Path) -> None:
    fit(tmp_path)
    assert call("test", *options(), "--ckpt_path", "last", "--runs", tmp_path).code == 0
    runs, problems = read([tmp_path])
    assert len(runs) == 1
    assert [problem.reason for problem in problems] == ["it is an evaluation, not a training run"]


def test_a_module_in_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_lit.py").write_text("from tests.launch.lit import LitAddition as Mine\n")
    monkeypatch.setattr("tests.helpers.commands.ROOT", tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    result = call("fit", "--model", "my_lit.Mine", *DATA, "--runs", tmp_path / "runs")
    assert result.code == 0, result.err
    missing = call("fit", "--model", "no_such_file.Mine", *DATA, "--runs", tmp_path / "runs").error
    assert "No module named 'no_such_file' in the checkout, in the current folder or on PYTHONPATH" in missing


def test_its_training_options_are_settings_and_the_others_protocol() -> None:
    def identity(**model: Any) -> RunIdentity:
        init = {"width": 16, "lr": 0.1, "mode": "sync", **model}
        return RunIdentity(
            {
                "model": {"class_path": "tests.launch.lit.LitAddition", "init_args": init},
                "data": {"class_path": "datamodules.modular_addition.ModularAdditionData", "init_args": {"p": 7}},
            }
        )

    assert identity().optimizer == "litaddition_sync"
    assert identity(lr=0.2).protocol_digest == identity().protocol_digest == identity(mode="base").protocol_digest
    assert identity(lr=0.2).setting_digest != identity().setting_digest
    assert identity(width=8).protocol_digest != identity().protocol_digest


def test_its_optimizer_may_come_from_the_config(tmp_path: Path) -> None:
    optimizer = ("--model.optimizer", "ars2.ARS2Neo", "--model.optimizer.mode", "sync", "--model.optimizer.lr", "1e-3")
    folder = fit(tmp_path, *optimizer, name="WithOptimizer")
    assert json.loads((folder / "summary.json").read_text())["costs"]["gradient_evaluations"] == 24
    plain = ("--model.optimizer", "torch.optim.AdamW", "--internals.every_n_steps", "3")
    folder = fit(tmp_path, *plain, name="WithOptimizer")
    assert json.loads((folder / "summary.json").read_text())["costs"]["gradient_evaluations"] == 12
    assert sum("optimizer/update_rms_all" in row for row in metrics(folder)) == 4


@pytest.mark.parametrize("steps", [5, 6])
def test_a_run_that_ends_within_an_epoch_resumes_exactly(steps: int, tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", "--model.mode", "aga", "--trainer.max_epochs", "4")
    part = fit(tmp_path / "part", "--model.mode", "aga", "--trainer.max_epochs", "4", "--trainer.max_steps", str(steps))
    checkpoint = str(part / "checkpoints/last.ckpt")
    rest = fit(tmp_path / "rest", "--model.mode", "aga", "--trainer.max_epochs", "4", "--ckpt_path", checkpoint)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(rest)[name]), name
    counted = [json.loads((folder / "summary.json").read_text())["costs"] for folder in (whole, rest)]
    assert counted[0]["gradient_evaluations"] == counted[1]["gradient_evaluations"]
    assert counted[0]["optimizer_steps"] == counted[1]["optimizer_steps"] == 16
    # The mean of the resumed epoch includes the batches before the stop.
    losses = [[row["train/loss"] for row in metrics(folder) if row.get("train/loss")] for folder in (whole, rest)]
    assert len(losses[1]) == 3 and losses[0][1:] == losses[1]


def test_its_checkpoint_is_tested_and_loaded(tmp_path: Path) -> None:
    folder = fit(tmp_path)
    result = call("test", *options(), "--ckpt_path", "best", "--runs", tmp_path)
    assert result.code == 0 and "val_accuracy" in result.out
    loaded = LitAddition.load_from_checkpoint(folder / "checkpoints/best.ckpt", weights_only=True)
    assert loaded.hparams["width"] == 16


def test_its_flatness_and_robustness_are_probed_and_its_surface_drawn(tmp_path: Path) -> None:
    probe = ("--trainer.callbacks+=callbacks.flatness_probe.FlatnessProbe", "--trainer.callbacks.epochs", "3")
    folder = fit(tmp_path, *probe, "--trainer.callbacks.max_products", "4")
    with (folder / "metrics.csv").open() as file:
        (row,) = [row for row in csv.DictReader(file) if row["flatness/probe_loss"]]
    assert float(row["flatness/hessian_top"]) > 0
    for name, value in weights(fit(tmp_path / "without")).items():
        assert torch.equal(value, weights(folder)[name]), name
    surface = ("--trainer.callbacks+=callbacks.loss_surface.LossSurface", "--trainer.callbacks.points", "3")
    robustness = "--trainer.callbacks+=callbacks.robustness_probe.RobustnessProbe"
    result = call("test", *options(), *surface, robustness, "--ckpt_path", "last", "--runs", tmp_path)
    assert result.code == 0 and "loss surface:" in result.out and "robustness/hessian_top" in result.out


def refused(tmp_path: Path, *arguments: str) -> Result:
    return call("fit", *arguments, "--runs", tmp_path)


def test_what_cannot_be_trained_is_one_sentence(tmp_path: Path) -> None:
    error = refused(tmp_path, *options("Manual")).error
    assert "Manual makes its own optimizer steps" in error and "modules.two_pass.TwoPassModule" in error
    twice = ("--trainer.callbacks+=ars2.lightning.TwoPass",)
    assert "more than one TwoPass: remove all but one" in refused(tmp_path, *options("LitAddition", *twice)).error
    assert (
        "the training loss is nan in epoch 1: lower the learning rate" in refused(tmp_path, *options("Diverging")).err
    )
