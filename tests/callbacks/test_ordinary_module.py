"""An ordinary module's batches are counted, and its training loss is logged."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.cost_counters import CostCounters
from callbacks.ordinary_module import OrdinaryModule
from tests.callbacks.fits import data, fit, rows
from tests.launch.lit import LitAddition


class Unmeasured(L.LightningModule):
    """Train on batches that contain objects in place of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(torch.tensor([[float(item.value)] for item in batch])).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Measured(Unmeasured):
    def batch_size(self, batch: Any) -> int:
        return len(batch)


class Objects(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader([SimpleNamespace(value=value) for value in range(6)], 4, collate_fn=list)  # type: ignore[arg-type]


def test_batches_without_tensors_are_counted_by_the_module(tmp_path: Path) -> None:
    counters = CostCounters()
    fit(Measured(), Objects(), [OrdinaryModule(), counters], tmp_path / "run", 2)
    assert counters.state_dict()["examples"] == 12
    for callbacks in ([OrdinaryModule()], [OrdinaryModule(), CostCounters()]):
        with pytest.raises(ValueError, match=r"a list, is not known, .* add the method batch_size\(batch\) to Unm"):
            fit(Unmeasured(), Objects(), callbacks, None, 1)


class WithoutSomeLosses(LitAddition):
    """Skip every batch but the first of each epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if batch_idx == 0 else None


def test_batches_without_a_loss_are_not_in_the_mean(tmp_path: Path) -> None:
    fit(WithoutSomeLosses(), data(), [OrdinaryModule()], tmp_path / "run", 2)
    logged = rows(tmp_path / "run", "train/loss")
    assert len(logged) == 2
    assert [row["train/loss"] for row in logged] == pytest.approx([row["epoch_loss"] for row in logged])


def test_early_stopping_reads_the_training_loss_of_the_epoch(tmp_path: Path) -> None:
    stopping = EarlyStopping("train/loss", min_delta=100.0, patience=1, check_on_train_epoch_end=True)
    trainer = fit(LitAddition(), data(), [stopping, OrdinaryModule()], tmp_path / "run", 3)
    assert trainer.current_epoch == 2  # the second epoch is not better by 100
    assert float(stopping.best_score) == pytest.approx(rows(tmp_path / "run", "train/loss")[0]["epoch_loss"])


def test_a_checkpoint_that_is_older_than_the_sums_is_loaded() -> None:
    module = OrdinaryModule()
    module.load_state_dict({"gradient_evaluations": 3})
    assert module.state_dict() == {"gradient_evaluations": 3, "loss": 0.0, "examples": 0}
