import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks.model_checkpoint import warning_cache
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks.best_checkpoint import BestCheckpoint
from callbacks.ordinary_module import OrdinaryModule
from modules.modular_addition import ModularAddition
from tests.callbacks.fits import data, fit, module
from tests.helpers.commands import AGA, TINY, call
from tests.helpers.commands import fit as run
from tests.launch.lit import LitAddition

EVERY = {"save_top_k": -1, "filename": "{step}", "auto_insert_metric_name": False}


def steps(folder: Path) -> list[int]:
    """Return the optimizer steps of the checkpoints in ``folder``, from their names."""
    found = {int(path.stem): torch.load(path, weights_only=True)["global_step"] for path in folder.glob("*.ckpt")}
    assert all(name == step for name, step in found.items())
    return sorted(found)


def saved(folder: Path, model: Any = None, epochs: int = 2, **options: Any) -> list[int]:
    checkpoint = BestCheckpoint(str(folder / "saved"), **{**EVERY, **options})
    fit(model or module(), data(), [checkpoint], None, epochs, enable_checkpointing=True)
    return steps(folder / "saved")


def test_every_n_steps_saves_without_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert saved(tmp_path, every_n_train_steps=3) == [3, 6]
    assert not [warning for warning in caught if "ModelCheckpoint" in str(warning.message)]


@pytest.mark.parametrize(("options", "best_step"), [({"check_val_every_n_epoch": 2}, 8), ({"max_steps": 2}, None)])
def test_an_epoch_without_validation_has_no_best_and_no_warning(
    options: dict[str, Any], best_step: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warning_cache.clear()  # of the warnings of other tests
    named = {"filename": "{step}", "auto_insert_metric_name": False, "save_on_train_epoch_end": True}
    checkpoint = BestCheckpoint(str(tmp_path), monitor="val/accuracy", mode="max", **named)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module(), data(), [checkpoint], None, 3, enable_checkpointing=True, **options)
    assert not [warning for warning in caught if "val/accuracy" in str(warning.message)]
    assert steps(tmp_path) == ([] if best_step is None else [best_step])
    reported_at_the_end = "no best checkpoint: val/accuracy was not logged" in capsys.readouterr().out
    assert reported_at_the_end == (best_step is None)


def test_a_metric_that_no_validation_logs_is_an_error(tmp_path: Path) -> None:
    checkpoint = BestCheckpoint(str(tmp_path), monitor="val/accurasy")
    with pytest.raises(MisconfigurationException, match="could not find the monitored key"):
        fit(module(), data(), [checkpoint], None, 3, enable_checkpointing=True, check_val_every_n_epoch=2)


@pytest.mark.parametrize("name", ["val/loss", "val_loss"])
def test_a_metric_of_a_missing_validation_is_an_error_before_training(name: str, tmp_path: Path) -> None:
    class Unvalidated(LitAddition):
        validation_step = L.LightningModule.validation_step

    checkpoint = BestCheckpoint(str(tmp_path), monitor=name)
    message = f"checkpoint.monitor is {name}, but there is no validation: add validation_step"
    with pytest.raises(ValueError, match=message):
        fit(Unvalidated(), data(), [OrdinaryModule(), checkpoint], None, 1, enable_checkpointing=True)


def test_a_time_interval_saves(tmp_path: Path) -> None:
    assert saved(tmp_path, train_time_interval=timedelta(0)) == list(range(1, 9))
    assert saved(tmp_path / "never", train_time_interval=timedelta(days=1)) == []


@pytest.mark.parametrize("when", [True, False, None])
def test_epochs_are_saved_at_either_end(when: bool | None, tmp_path: Path) -> None:
    assert saved(tmp_path, epochs=4, every_n_epochs=2, save_on_train_epoch_end=when) == [8, 16]


@pytest.mark.parametrize("when", [True, False])
def test_a_save_before_the_first_validation_is_made_after_it(when: bool, tmp_path: Path) -> None:
    options = {"monitor": "val/loss", "every_n_train_steps": 3, "save_on_train_epoch_end": when}
    assert saved(tmp_path, epochs=1, **options) == [4]


@pytest.mark.parametrize("options", [{"every_n_train_steps": 1}, {"train_time_interval": timedelta(0)}])
def test_nothing_is_saved_in_the_middle_of_an_accumulated_step(options: dict[str, Any], tmp_path: Path) -> None:
    class Watching(ModularAddition):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            assert self.between_steps
            super().on_save_checkpoint(checkpoint)

    assert saved(tmp_path, module(kind=Watching, accumulate_grad_batches=3), **options) == [1, 2, 3, 4]


def test_an_exception_is_saved_beside_the_best(tmp_path: Path) -> None:
    class Fails(ModularAddition):
        def training_step(self, batch: Any, batch_index: int) -> torch.Tensor:
            if self.current_epoch == 1 and batch_index == 1:
                raise RuntimeError("no step")
            return super().training_step(batch, batch_index)

    checkpoint = BestCheckpoint(str(tmp_path), "best", "val/loss", save_on_exception=True, enable_version_counter=False)
    with pytest.raises(RuntimeError, match="no step"):
        fit(module(kind=Fails), data(), [checkpoint], None, 2, enable_checkpointing=True)
    at = {path.name: torch.load(path, weights_only=True)["global_step"] for path in tmp_path.iterdir()}
    assert at == {"best.ckpt": 4, "exception.ckpt": 5}


def test_resumes_from_a_checkpoint_of_the_callback_of_lightning(tmp_path: Path) -> None:
    options: dict[str, Any] = {"filename": "best", "monitor": "val/loss"}
    old = ModelCheckpoint(str(tmp_path), **options)
    assert BestCheckpoint(str(tmp_path), **options).state_key == old.state_key


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--checkpoint.save_top_k", "2"], "checkpoint.filename best-{epoch}"),
        (["--checkpoint.save_last", "true"], "checkpoint.save_last"),
        (
            ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.train_time_interval=00:01:00"],
            "--checkpoint.train_time_interval",
        ),
    ],
)
def test_options_that_would_do_nothing_or_harm_are_refused(options: list[str], named: str, tmp_path: Path) -> None:
    assert named in call("fit", *AGA, *TINY, *options, "--runs", tmp_path).error
    assert not list(tmp_path.glob("*/*"))


def test_the_command_line_has_it(tmp_path: Path) -> None:
    options = ("--checkpoint.train_time_interval", "00:00:00", "--checkpoint.monitor", "null")
    names = ("--checkpoint.filename", "{step}", "--checkpoint.save_top_k", "-1")
    folder = run(tmp_path, *AGA, *TINY, *options, *names)
    assert [path.stem for path in sorted((folder / "checkpoints").glob("step*"))] == [
        f"step={step}" for step in range(1, 5)
    ]
