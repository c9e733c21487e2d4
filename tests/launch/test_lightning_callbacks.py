"""Lightning's callbacks work from the command line or are refused.

The error is one sentence with the reason.
"""

import json
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from analysis.rows import group
from analysis.runs import read
from analysis.settings import settings
from tests.helpers.commands import ADAMW, AGA, TINY, call, fit, metrics
from tests.helpers.marks import slow
from tests.helpers.resuming import checkpoint, differences
from tests.launch.test_ordinary_modules import options as ordinary_options
from tests.modules.small_task import SmallTask, make_optimizer
from tests.modules.small_task import fit as fit_module

MODULE = "lightning.pytorch.callbacks."
BOARD = "lightning.pytorch.loggers.TensorBoardLogger"
FULL_CHECKPOINTS = ("--checkpoint.save_weights_only", "false")


@pytest.mark.parametrize(
    ("name", "options", "status"),
    [
        slow("LearningRateMonitor", (), "finished"),
        slow("ModelSummary", (), "finished"),
        slow("TQDMProgressBar", (), "finished"),
        ("StochasticWeightAveraging", ("--trainer.callbacks.swa_lrs", 0.01), "finished"),
        slow("WeightAveraging", FULL_CHECKPOINTS, "finished"),
        slow("LambdaCallback", (), "finished"),
        ("Timer", ("--trainer.callbacks.duration", "{minutes: 10}"), "finished"),
        (
            "EarlyStopping",
            ("--trainer.callbacks.monitor", "train/loss", "--trainer.callbacks.stopping_threshold", 100.0),
            "stopped early",
        ),
    ],
)
def test_a_run_with_one_is_complete(name: str, options: tuple[object, ...], status: str, tmp_path: Path) -> None:
    folder = fit(tmp_path, *AGA, *TINY, f"--trainer.callbacks+={MODULE}{name}", *options)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == status
    assert (folder / "checkpoints/best.ckpt").exists()
    assert f"{MODULE}{name}" in (folder / "config.yaml").read_text()


class Locked(L.Callback):
    """Have a part that cannot be copied, as loggers and launchers have."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


def test_the_best_checkpoint_has_the_average_that_was_validated_and_is_tested(tmp_path: Path) -> None:
    one_epoch = (*AGA, *TINY, "--trainer.max_epochs", 1, f"--trainer.callbacks+={__name__}.Locked")
    average = (f"--trainer.callbacks+={MODULE}EMAWeightAveraging", "--trainer.callbacks.decay", 0.5)
    folder = fit(tmp_path, *one_epoch, *average, *FULL_CHECKPOINTS, "--test_best", "true")
    saved = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)
    name = "network.query"
    assert not torch.equal(saved["state_dict"][name], saved["current_model_state"][name])
    # This task's test data are its validation data.
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["test"]["test/loss"] == pytest.approx(summary["metrics"]["val/loss"]["best"], rel=1e-6)
    error = call("fit", *one_epoch, *average, "--runs", tmp_path / "others").error
    assert "EMAWeightAveraging saves its average only in full checkpoints" in error
    assert "--checkpoint.save_weights_only false" in error


def test_weights_without_the_average_are_refused_for_an_ordinary_module_too(tmp_path: Path) -> None:
    average = f"--trainer.callbacks+={MODULE}EMAWeightAveraging"
    error = call("fit", *ordinary_options("LitAddition", average), "--runs", tmp_path).error
    assert "EMAWeightAveraging saves its average only in full checkpoints" in error
    folder = fit(
        tmp_path, *ordinary_options("LitAddition", average, "--trainer.callbacks.decay", "0.5"), *FULL_CHECKPOINTS
    )
    saved = checkpoint(folder, "best")
    assert any(not torch.equal(saved["current_model_state"][name], t) for name, t in saved["state_dict"].items())


EMA = ("--config", "configs/overlays/ema.yaml", "--trainer.callbacks.decay", 0.5)


@pytest.mark.parametrize("config", [AGA, slow(("--config", "configs/grok_sync.yaml"))])
def test_a_run_with_an_average_resumes_exactly_after_its_end(config: tuple[str, ...], tmp_path: Path) -> None:
    options = (*config, *TINY, *EMA)
    uninterrupted = fit(tmp_path / "uninterrupted", *options, "--trainer.max_epochs", 3)
    # Training has ended here, and the weights of the module are the average.
    ended = fit(tmp_path / "ended", *options) / "checkpoints/last.ckpt"
    continued = fit(tmp_path / "continued", *options, "--trainer.max_epochs", 3, "--ckpt_path", ended)
    last, expected = (checkpoint(folder) for folder in (continued, uninterrupted))
    assert not torch.equal(last["state_dict"]["network.query"], last["current_model_state"]["network.query"])
    for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
        assert list(differences(last[key], expected[key])) == [], key


def test_a_report_tells_a_run_with_an_average_apart(tmp_path: Path) -> None:
    for options in ((), EMA):
        fit(tmp_path / "runs", *AGA, *TINY, *options)
    runs, problems = read([tmp_path / "runs"])
    (table,) = group(runs)
    assert len(runs) == 2 and not problems
    assert {row.label for row in table.rows} == {"grok_aga", "grok_aga, EMAWeightAveraging"}
    text = settings(table)
    assert text is not None
    assert "EMAWeightAveraging (use_buffers True, decay 0.5, update_every_n_steps 1)" in text.markdown()


@pytest.mark.parametrize("config", [AGA, slow(ADAMW)])
def test_callbacks_and_loggers_that_only_watch_change_nothing(config: tuple[str, ...], tmp_path: Path) -> None:
    plain = fit(tmp_path / "plain", *config, *TINY)
    callbacks = [
        {"class_path": f"{MODULE}LearningRateMonitor", "init_args": {"logging_interval": "step"}},
        {"class_path": f"{MODULE}DeviceStatsMonitor", "init_args": {"cpu_stats": True}},
        {"class_path": f"{MODULE}RichModelSummary"},
        {"class_path": f"{MODULE}ModelCheckpoint", "init_args": {"monitor": "val/loss", "filename": "lowest"}},
    ]
    options = ("--trainer.callbacks+", json.dumps(callbacks), "--trainer.log_every_n_steps", 1)
    board = ("--trainer.logger", BOARD, "--trainer.logger.save_dir", tmp_path / "board")
    watched = fit(tmp_path / "watched", *config, *TINY, *options, *board, pictures=True)
    for name in ("last", "best"):
        found, expected = (checkpoint(folder, name) for folder in (watched, plain))
        for key in expected.keys() - {"callbacks", "log", "costs"}:
            assert list(differences(found[key], expected[key])) == [], key
    files = {path.relative_to(plain) for path in plain.rglob("*")}
    assert {path.relative_to(watched) for path in watched.rglob("*")} - files == {
        *(Path("checkpoints/lowest.ckpt"), Path("pictures"), Path("pictures/curves.png")),
    }
    kept = [{key: value for key, value in row.items() if key in expected_columns(plain)} for row in metrics(watched)]
    assert [row for row in kept if row.keys() - {"step", "epoch"}] == metrics(plain)
    assert [*(tmp_path / "board").rglob("events.out.tfevents.*")]


def expected_columns(folder: Path) -> set[str]:
    return {key for row in metrics(folder) for key in row}


def test_other_loggers_stand_beside_the_log_of_the_run(tmp_path: Path) -> None:
    one = (f"--trainer.logger+={BOARD}", "--trainer.logger.save_dir", tmp_path / "board")
    another = ("--trainer.logger+=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", tmp_path / "csv")
    folder = fit(tmp_path / "runs", *AGA, *TINY, *one, *another)
    for name in ("metrics.csv", "summary.json", "config.yaml", "protocol.yaml", "checkpoints/last.ckpt"):
        assert (folder / name).exists(), name
    assert [*(tmp_path / "csv").rglob("metrics.csv")] and [*(tmp_path / "board").rglob("events.out.tfevents.*")]


@pytest.mark.parametrize(("name", "package"), [("MLFlowLogger", "mlflow"), ("CometLogger", "comet-ml")])
def test_a_logger_without_its_package_says_what_to_install(name: str, package: str, tmp_path: Path) -> None:
    error = call("fit", *AGA, *TINY, "--trainer.logger", f"lightning.pytorch.loggers.{name}", "--runs", tmp_path).error
    assert f"loggers.{name} needs a package that is not installed: pip install '{package}>=" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            (f"--trainer.callbacks+={MODULE}ModelCheckpoint", "--trainer.callbacks.save_last", "true"),
            "remove save_last",
        ),
        (
            (f"--trainer.callbacks+={MODULE}OnExceptionCheckpoint", "--trainer.callbacks.dirpath", "anywhere"),
            "--checkpoint.save_on_exception true",
        ),
        ((f"--trainer.callbacks+={MODULE}LearningRateFinder",), "sweep.py"),
        (("--trainer.barebones", "true"), "in Python, with L.Trainer(barebones=True)"),
        (
            ("--model.scheduler", "transformers.get_cosine_schedule_with_warmup"),
            "scheduler: transformers.get_cosine_schedule_with_warmup does not declare that it returns a scheduler",
        ),
        (
            ("--model.scheduler", "torch.optim.lr_scheduler.ReduceLROnPlateau"),
            "lightning.pytorch.cli.ReduceLROnPlateau",
        ),
    ],
)
def test_what_a_run_folder_cannot_have_is_one_sentence(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    assert message in call("fit", *AGA, *TINY, *options, "--runs", tmp_path).error


class WarmUp(SequentialLR):
    """Rise linearly, then fall as a cosine."""

    def __init__(self, optimizer: Optimizer, rise: int, steps: int) -> None:
        parts = [LinearLR(optimizer, 1 / rise, total_iters=rise), CosineAnnealingLR(optimizer, steps - rise)]
        super().__init__(optimizer, parts, [rise])


def from_transformers(optimizer: Optimizer) -> LRScheduler:
    """Return a schedule of transformers, from a function without annotations."""
    schedule: LRScheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 2, 4)
    return schedule


@pytest.mark.parametrize(
    "options",
    [
        slow(("OneCycleLR", "--model.scheduler.max_lr", 0.1, "--model.scheduler.total_steps", 9)),
        (f"{__name__}.WarmUp", "--model.scheduler.rise", 2, "--model.scheduler.steps", 5),
        (f"{__name__}.from_transformers",),
    ],
)
def test_a_scheduler_by_class_path_changes_the_learning_rate(options: Any, tmp_path: Path) -> None:
    monitor = (f"--trainer.callbacks+={MODULE}LearningRateMonitor", "--trainer.log_every_n_steps", 1)
    given = ("--model.scheduler", *options, "--model.scheduler_interval", "step")
    folder = fit(tmp_path, *AGA, *TINY, *monitor, *given)
    rates = [row["lr-ARS2Neo/pg1"] for row in metrics(folder) if "lr-ARS2Neo/pg1" in row]
    assert len(rates) == 4 and len(set(rates)) >= 3


PLATEAU = (
    *("--model.scheduler", "lightning.pytorch.cli.ReduceLROnPlateau", "--model.scheduler.monitor", "val/loss"),
    *("--model.scheduler.threshold", 0.9, "--model.scheduler.patience", 0),  # nothing is good enough
)


def learning_rate(folder: Path) -> float:
    (state,) = checkpoint(folder)["optimizer_states"]
    return float(state["param_groups"][0]["lr"])


def test_a_plateau_by_class_path_lowers_the_learning_rate(tmp_path: Path) -> None:
    assert learning_rate(fit(tmp_path, *AGA, *TINY, *PLATEAU)) == pytest.approx(1e-3 / 10)


@pytest.mark.slow
def test_a_plateau_by_class_path_resumes_exactly(tmp_path: Path) -> None:
    options = (*AGA, *TINY, *PLATEAU)
    uninterrupted = fit(tmp_path / "uninterrupted", *options, "--trainer.max_epochs", 3)
    begun = fit(tmp_path / "begun", *options) / "checkpoints/last.ckpt"
    resumed = fit(tmp_path / "resumed", *options, "--trainer.max_epochs", 3, "--ckpt_path", begun)
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert list(differences(checkpoint(resumed)[key], checkpoint(uninterrupted)[key])) == [], key
    assert learning_rate(resumed) == pytest.approx(1e-3 / 100)


def test_an_average_that_would_be_trained_on_is_refused() -> None:
    callback = StochasticWeightAveraging(swa_lrs=0.01)
    with pytest.raises(ValueError, match="one more epoch to update the statistics of BatchNorm"):
        fit_module(SmallTask(optimizer=make_optimizer("adamw")), callbacks=[callback])  # type: ignore[arg-type]


def test_a_batch_size_that_would_replace_the_method_is_refused(tmp_path: Path) -> None:
    error = call("fit", *AGA, *TINY, f"--trainer.callbacks+={MODULE}BatchSizeFinder", "--runs", tmp_path).error
    assert "replace the method batch_size() of ModularAddition" in error
