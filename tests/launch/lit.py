"""Define ordinary LightningModules, as in tutorials, for the command line."""

import math
from typing import Any

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from ars2 import ARS2Neo, param_groups
from datamodules.modular_addition import ModularAdditionData


class LitAddition(L.LightningModule):
    """Learn modular addition modulo 7."""

    def __init__(self, width: int = 16, lr: float = 3e-3, mode: str = "sync") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(
            nn.Linear(14, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 7)
        )

    def forward(self, pairs: Tensor) -> Tensor:
        logits: Tensor = self.layers(F.one_hot(pairs[:, :2], 7).flatten(1).float())
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("epoch_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        self.log("val_accuracy", (logits.argmax(1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        mode = self.hparams["mode"]
        return ARS2Neo(param_groups(self), lr=self.hparams["lr"], mode=mode, k=3 if mode == "aga" else 0, rho=0.05)


class WithOptimizer(LitAddition):
    """Take the optimizer from the config."""

    def __init__(self, optimizer: OptimizerCallable) -> None:
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class Manual(LitAddition):
    """Make the steps in ``training_step``."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Diverging(LitAddition):
    """Have a loss that is not finite."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * torch.tensor(math.nan)


class Pops(LitAddition):
    """Take the tensors out of a batch that is a dictionary."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        pairs, sums = (batch.pop("pairs"), batch.pop("sums")) if isinstance(batch, dict) else batch
        return F.cross_entropy(self(pairs), sums)


class ByName(ModularAdditionData):
    """Provide training batches that are dictionaries."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        training = self.trainer is not None and self.trainer.training
        return {"pairs": batch[0], "sums": batch[1]} if training else batch
