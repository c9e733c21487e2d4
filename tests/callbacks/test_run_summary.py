import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from torch import Tensor

from callbacks.cost_counters import CostCounters
from callbacks.last_checkpoint import LastCheckpoint
from callbacks.milestones import GrokkingMilestones
from callbacks.run_summary import RunSummary
from experiment.quantities import duration
from modules.modular_addition import ModularAddition
from tests.callbacks.fits import MemorisedSums, ars2, data, fit, module, rows


def summary(folder: Path) -> dict[str, Any]:
    assert not list(folder.glob("*.tmp"))
    text = (folder / "summary.json").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    loaded: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return loaded


def expected_metrics(*folders: Path) -> dict[str, dict[str, float]]:
    """Find best and last in the logs; of equal values the first is the best."""
    logged = [row for folder in folders for row in rows(folder, having="val/loss")]
    expected = {}
    for key, pick in (("val/loss", min), ("val/accuracy", max)):
        best = pick(logged, key=lambda row: row[key])
        expected[key] = {"best": best[key], "best_epoch": best["epoch"] + 1, "last": logged[-1][key]}
        expected[key]["lower_is_better"] = pick is min
    return expected


def test_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = ModelCheckpoint(monitor="val/accuracy", mode="max", filename="best", dirpath=str(tmp_path / "saved"))
    last = LastCheckpoint(dirpath=str(tmp_path / "saved"))
    begin = time.perf_counter()
    callbacks = [RunSummary(), GrokkingMilestones(), CostCounters(), best, last]
    fit(module(ars2("sync")), data(), callbacks, tmp_path / "run", 3, enable_checkpointing=True)
    wall = time.perf_counter() - begin

    got = summary(tmp_path / "run")
    assert (got["status"], got["epochs"]) == ("finished", 3)
    assert got["metrics"] == expected_metrics(tmp_path / "run")
    assert got["milestones"]["full"]["text"] == "not within 12 steps"
    training = got["costs"].pop("training_seconds")
    assert training <= got["wall_seconds"] <= wall
    assert got["costs"].pop("flops") > 0
    assert got["costs"] == {"optimizer_steps": 12, "gradient_evaluations": 24, "examples": 87}
    assert got["run_folder"] == str(tmp_path / "run")
    assert Path(got["best_checkpoint"]).name == "best.ckpt"
    assert Path(got["last_checkpoint"]).name == "last.ckpt"
    assert Path(got["best_checkpoint"]).is_file()
    assert Path(got["last_checkpoint"]).is_file()

    printed = capsys.readouterr().out
    assert "Run finished after 3 epochs" in printed
    assert "network: 2.4 k parameters" in printed
    assert re.search(r"compute +│ [\d.]+ [kMG]FLOP ", printed)
    for name, seconds in (("training", training), ("wall", got["wall_seconds"])):
        assert re.search(rf"{name} time +│ {duration(seconds)} ", printed)
    assert "not within 12 steps" in printed
    assert "fail" not in printed
    accuracy = got["metrics"]["val/accuracy"]
    assert f"best {accuracy['best']:.5g} (epoch {accuracy['best_epoch']}), last {accuracy['last']:.5g}" in printed


@pytest.mark.parametrize(
    ("ends", "validated"),
    [
        ({"max_steps": 6}, [4, 6]),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, [3, 6, 8]),
        ({"epochs": 3, "check_val_every_n_epoch": 2}, [8, 12]),
        ({"max_steps": 3, "check_val_every_n_epoch": 2}, [3]),
    ],
    ids=["within an epoch", "between validations", "in an epoch without validation", "before the first validation"],
)
def test_the_last_step_is_validated(ends: dict[str, Any], validated: list[int], tmp_path: Path) -> None:
    fit(module(), data(), [RunSummary(), CostCounters()], tmp_path, **{"epochs": 2, **ends})
    got = summary(tmp_path)
    assert (got["status"], got["costs"]["optimizer_steps"]) == ("finished", validated[-1])
    logged = rows(tmp_path, having="val/loss")
    assert [row["cost/optimizer_steps"] for row in logged] == validated
    assert got["metrics"]["val/loss"]["last"] == logged[-1]["val/loss"]


def test_a_run_stopped_by_a_milestone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    milestones = GrokkingMilestones(stop_at="val_50")
    callbacks = [RunSummary(), milestones, RichProgressBar()]
    fit(module(), data(MemorisedSums), callbacks, tmp_path, epochs=100, enable_progress_bar=True)
    got = summary(tmp_path)
    epoch = milestones.reached["val_50"]["epoch"]
    assert (got["status"], got["epochs"]) == ("stopped early (milestone)", epoch)
    assert got["milestones"]["val_50"] == {
        **{"threshold": "val/accuracy >= 0.5", "epoch": epoch, "text": f"epoch {epoch}"},
        **{"optimizer_steps": 4 * epoch, "gradient_evaluations": 4 * epoch},
    }
    # Nothing of the bar comes after the table.
    assert capsys.readouterr().out.rstrip().endswith(f"┘\nrun folder: {tmp_path}")


class Interrupts(L.Callback):
    def __init__(self, exception: BaseException, at: str) -> None:
        self.exception, self.at = exception, at

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.at == "batch" and trainer.global_step == 6:
            raise self.exception

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.at == "setup":
            raise self.exception

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = self.at == "epoch"


@pytest.mark.parametrize("exception", [KeyboardInterrupt(), RuntimeError("the disk is gone")], ids=["ctrl-c", "error"])
def test_an_interrupted_run(exception: BaseException, tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    callbacks = [Interrupts(exception, at="batch"), RunSummary(), CostCounters()]
    try:
        # Lightning turns Ctrl-C into an exit, and ignores further ones.
        with pytest.raises(SystemExit if isinstance(exception, KeyboardInterrupt) else RuntimeError):
            fit(module(), data(), callbacks, tmp_path, epochs=4)
    finally:
        signal.signal(signal.SIGINT, handler)
    got = summary(tmp_path)
    assert (got["status"], got["epochs"], got["costs"]["optimizer_steps"]) == ("interrupted", 1, 6)


def test_a_run_that_another_callback_stops(tmp_path: Path) -> None:
    fit(module(), data(), [Interrupts(RuntimeError(), at="epoch"), RunSummary()], tmp_path, epochs=4)
    assert (summary(tmp_path)["status"], summary(tmp_path)["epochs"]) == ("stopped early", 1)


def test_an_error_before_fitting_has_no_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="no data"):
        fit(module(), data(), [Interrupts(RuntimeError("no data"), at="setup"), RunSummary()], tmp_path, epochs=1)
    assert not (tmp_path / "summary.json").exists()
    assert "Run" not in capsys.readouterr().out


def test_without_a_logger_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(module(), data(), [RunSummary()], None, epochs=1, default_root_dir=str(tmp_path))
    printed = capsys.readouterr().out
    assert "run folder: none" in printed and "Run finished after 1 epoch\n" in re.sub(" +\n", "\n", printed)
    assert list(tmp_path.iterdir()) == []


class ValidatesToNothing(ModularAddition):
    """Have a validation loss that is NaN in every epoch but the second."""

    def compute_loss(self, batch: Any, metrics: Any) -> Tensor:
        loss = super().compute_loss(batch, metrics)
        return loss if self.trainer.training or self.current_epoch == 1 else loss * torch.nan


@pytest.mark.parametrize(("epochs", "best", "best_epoch"), [(1, False, None), (3, True, 2)])
def test_numbers_that_are_not_finite(epochs: int, best: bool, best_epoch: int | None, tmp_path: Path) -> None:
    fit(module(kind=ValidatesToNothing), data(), [RunSummary()], tmp_path, epochs=epochs)
    loss = summary(tmp_path)["metrics"]["val/loss"]
    assert loss["last"] is None
    assert (loss["best"] is not None) is best
    if best:
        assert loss["best_epoch"] == best_epoch


def test_a_resumed_run_remembers_its_best(tmp_path: Path) -> None:
    saving = LastCheckpoint(dirpath=str(tmp_path))
    fit(module(), data(), [RunSummary(), saving], tmp_path / "a", 4, enable_checkpointing=True)
    path = str(tmp_path / "last.ckpt")
    fit(module(), data(), [RunSummary()], tmp_path / "b", 6, ckpt_path=path)
    assert summary(tmp_path / "b")["metrics"] == expected_metrics(tmp_path / "a", tmp_path / "b")
    before = torch.load(path, weights_only=True)["callbacks"]["RunSummary"]["wall_seconds"]
    assert 0 < before < summary(tmp_path / "b")["wall_seconds"]
