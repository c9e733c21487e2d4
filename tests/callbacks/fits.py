"""Fit modular addition for a short time, and read what was logged."""

import csv
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import CSVLogger

from ars2 import ARS2Neo
from ars2.ars2_neo import Mode
from datamodules.batches import TensorBatches
from datamodules.modular_addition import ModularAdditionData
from modules.modular_addition import ModularAddition

adamw = functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0)


def ars2(mode: Mode, **options: Any) -> Callable[..., ARS2Neo]:
    return functools.partial(ARS2Neo, mode=mode, lr=3e-3, **options)


class MemorisedSums(ModularAdditionData):
    """Validate on the training pairs, so that tiny networks pass every threshold."""

    def val_dataloader(self) -> TensorBatches:
        return TensorBatches(self._examples(self.train_pairs), self.val_batch_size, None)


def module(optimizer: Any = adamw, kind: type[ModularAddition] = ModularAddition, **options: Any) -> ModularAddition:
    torch.manual_seed(0)
    return kind(p=7, width=16, heads=2, mlp_width=32, optimizer=optimizer, **options)


def data(kind: type[ModularAdditionData] = ModularAdditionData, batch_size: int = 8) -> ModularAdditionData:
    """Return 49 sums, 29 of them to train on.

    At 8 a batch these are three full batches and one of 5.
    """
    return kind(p=7, train_fraction=0.6, batch_size=batch_size)


def fit(
    model: L.LightningModule,
    sums: L.LightningDataModule,
    callbacks: list[Any],
    folder: Path | None,
    epochs: int,
    ckpt_path: str | None = None,
    **options: Any,
) -> L.Trainer:
    """Fit on the CPU; ``folder`` becomes the run folder, ``None`` logs nowhere."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=CSVLogger(str(folder.parent), name="", version=folder.name) if folder is not None else False,
        callbacks=callbacks,
        **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, **options},
    )
    trainer.fit(model, sums, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def rows(folder: Path, having: str = "step") -> list[dict[str, float]]:
    """Return the logged rows with a value for ``having``, without empty columns."""
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        filled = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in filled if having in row]


@contextmanager
def restored(model: L.LightningModule) -> Iterator[None]:
    """Check that a block leaves parameters, buffers and gradients bit for bit."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters())


def values_of_a_test(model: L.LightningModule, callback: L.Callback, source: Any = None) -> dict[str, float]:
    """Test a module with a callback; return the values that summaries read."""
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.test(model, data() if source is None else source, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}
