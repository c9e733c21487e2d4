import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.cost_counters import CostCounters
from callbacks.last_checkpoint import LastCheckpoint
from datamodules.batches import TensorBatches
from datamodules.modular_addition import ModularAdditionData
from modules.modular_addition import ModularAddition
from tests.callbacks.fits import adamw, ars2, data, fit, module, rows

COSTS = {"cost/optimizer_steps", "cost/gradient_evaluations", "cost/examples", "cost/training_seconds"}


def test_every_row_has_the_costs(tmp_path: Path) -> None:
    fit(module(ars2("sync")), data(), [CostCounters()], tmp_path, epochs=3, num_sanity_val_steps=2)
    logged = rows(tmp_path)
    assert len(logged) == 6
    for row in logged:
        epochs = row["epoch"] + 1
        counts = row["cost/optimizer_steps"], row["cost/gradient_evaluations"], row["cost/examples"]
        assert counts == (4 * epochs, 8 * epochs, 29 * epochs)
    seconds = [row["cost/training_seconds"] for row in logged]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_accumulation_counts_updates_and_all_examples(tmp_path: Path) -> None:
    fit(module(adamw, accumulate_grad_batches=3), data(), [CostCounters()], tmp_path, epochs=2)
    last = rows(tmp_path)[-1]
    counts = last["cost/optimizer_steps"], last["cost/gradient_evaluations"], last["cost/examples"]
    assert counts == (4, 4, 58)


def test_large_counts_are_logged_to_the_unit(tmp_path: Path) -> None:
    counters = CostCounters()
    counters.load_state_dict({"examples": 2**24, "training_seconds": 0.0})
    fit(module(), data(), [counters], tmp_path, epochs=1)
    # Odd above 2**24: single precision would round it.
    assert {row["cost/examples"] for row in rows(tmp_path)} == {2**24 + 29}


class SlowOutsideTraining(ModularAddition):
    """Takes its time to validate and to save."""

    def validation_step(self, batch: Any, batch_index: int) -> None:
        time.sleep(0.2)
        super().validation_step(batch, batch_index)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        time.sleep(0.2)
        super().on_save_checkpoint(checkpoint)


class SlowToCome(ModularAdditionData):
    """Training batches come after a while."""

    def train_dataloader(self) -> TensorBatches:
        class Batches(TensorBatches):
            def __iter__(self) -> Any:
                for batch in super().__iter__():
                    time.sleep(0.02)
                    yield batch

        whole = super().train_dataloader()
        return Batches(whole.tensors, whole.batch_size, whole.seed)


# Lightning's advice on saving within an epoch is for another kind of training step.
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_seconds_include_waiting_for_data_but_not_evaluation_and_saving(tmp_path: Path) -> None:
    counters, folder = CostCounters(), str(tmp_path / "saved")
    saving = [LastCheckpoint(1, folder), ModelCheckpoint(folder, every_n_train_steps=5, filename="step")]
    model = module(kind=SlowOutsideTraining)
    begin = time.perf_counter()
    trainer = fit(
        *(model, data(SlowToCome), [counters, *saving], tmp_path, 2),
        enable_checkpointing=True,
        num_sanity_val_steps=1,
    )
    wall = time.perf_counter() - begin
    # Eight batches to wait for, one of them while a save stopped the clock; three validations and three saves.
    assert 7 * 0.02 <= counters.training_seconds <= wall - 6 * 0.2
    logged = rows(tmp_path)[-1]["cost/training_seconds"]
    assert logged == counters.training_seconds == counters.costs(trainer, model)["cost/training_seconds"]


def test_the_clock_stops_at_an_epochs_end_without_validation(tmp_path: Path) -> None:
    counters, saving = CostCounters(), LastCheckpoint(1, str(tmp_path / "saved"))
    model = module(kind=SlowOutsideTraining)
    trainer = fit(model, data(), [counters, saving], tmp_path, 2, enable_checkpointing=True, limit_val_batches=0)
    logged = rows(tmp_path)[-1]["cost/training_seconds"]
    assert logged == counters.costs(trainer, model)["cost/training_seconds"] > 0


def test_resumed_costs_go_on(tmp_path: Path) -> None:
    saving = LastCheckpoint(every_n_epochs=1, dirpath=str(tmp_path / "saved"))
    fit(module(ars2("sync")), data(), [CostCounters(), saving], tmp_path / "a", 2, enable_checkpointing=True)
    path = str(tmp_path / "saved" / "last.ckpt")
    before = torch.load(path, weights_only=True)["callbacks"]["CostCounters"]
    assert before["training_seconds"] == rows(tmp_path / "a")[-1]["cost/training_seconds"]
    fit(module(ars2("sync")), data(), [CostCounters()], tmp_path / "b", 3, ckpt_path=path)
    first = rows(tmp_path / "b")[0]
    assert first.keys() >= COSTS
    assert first["cost/examples"] == 3 * 29
    assert first["cost/gradient_evaluations"] == 3 * 8
    assert first["cost/training_seconds"] > before["training_seconds"]
