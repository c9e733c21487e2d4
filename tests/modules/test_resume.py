"""A stopped and resumed run equals an uninterrupted one to the bit."""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from datamodules.modular_addition import ModularAdditionData
from modules.modular_addition import ModularAddition
from tests.modules.small_task import CORE, assert_equal_states, make_optimizer, state_of


class Recorder(L.Callback):
    """Record every epoch's metrics, and save a checkpoint after given steps."""

    def __init__(self, save_at: int | None = None, path: Path | None = None) -> None:
        self.save_at, self.path = save_at, path
        self.metrics: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.save_at and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        values = {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.metrics[trainer.current_epoch] = values

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.path is not None and not self.path.exists():
            trainer.save_checkpoint(self.path)


def train(name: str, epochs: int, recorder: Recorder, ckpt_path: Path | None = None) -> ModularAddition:
    torch.manual_seed(0)
    module = ModularAddition(
        p=11,
        width=16,
        heads=2,
        mlp_width=16,
        optimizer=make_optimizer(name),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40),
        scheduler_interval="step",
    )
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[recorder],
    )
    trainer.fit(module, ModularAdditionData(p=11, batch_size=8), ckpt_path=ckpt_path, weights_only=True)
    return module


@pytest.mark.parametrize("name", CORE)
def test_resuming_at_an_epochs_end_changes_nothing(name: str, tmp_path: Path) -> None:
    uninterrupted, first, second = Recorder(), Recorder(path=tmp_path / "half.ckpt"), Recorder()
    expected = train(name, 4, uninterrupted)
    train(name, 2, first)
    torch.manual_seed(99)  # resuming does not depend on the state of the process
    resumed = train(name, 4, second, first.path)
    assert_equal_states(state_of(resumed), state_of(expected))
    assert resumed.gradient_evaluations == expected.gradient_evaluations
    assert {**first.metrics, **second.metrics} == uninterrupted.metrics


@pytest.mark.parametrize(("name", "other"), [("base", "adamw"), ("adamw", "muon")])
def test_resuming_under_another_optimizer_is_refused(name: str, other: str, tmp_path: Path) -> None:
    first = Recorder(path=tmp_path / "run.ckpt")
    train(name, 1, first)
    with pytest.raises(ValueError, match="cannot be resumed with"):
        train(other, 2, Recorder(), first.path)


@pytest.mark.parametrize("name", ["adamw", "aga", "momentum"])
def test_resuming_in_the_middle_of_an_epoch_starts_with_the_next_batch(name: str, tmp_path: Path) -> None:
    expected = train(name, 3, Recorder())
    first = Recorder(save_at=7, path=tmp_path / "middle.ckpt")  # five batches an epoch
    train(name, 3, first)
    resumed = train(name, 3, Recorder(), first.path)
    assert_equal_states(state_of(resumed), state_of(expected))
