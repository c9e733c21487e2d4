r"""Train an ordinary LightningModule with second passes.

    python examples/lightning_module.py

One callback is added to the Trainer. The suite trains the same module as it is, and adds the callback itself:

    python train.py fit --model examples.lightning_module.Regression --data examples.lightning_module.RegressionData \
        --checkpoint.monitor val_loss --trainer.max_epochs 5
"""

from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ars2 import ARS2Neo, param_groups
from ars2.lightning import TwoPass


class Regression(L.LightningModule):
    def __init__(self, width: int = 64, lr: float = 3e-3, mode: str = "sync") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Linear(8, width), nn.BatchNorm1d(width), nn.GELU(), nn.Dropout(0.05), nn.Linear(width, 1)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.network(batch[0]), batch[1])
        self.log("train_loss", loss, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.network(batch[0]), batch[1]), prog_bar=True)

    def configure_optimizers(self) -> Any:
        groups = param_groups(self, policy="hidden")
        return ARS2Neo(groups, lr=self.hparams["lr"], mode=self.hparams["mode"], rho=0.05)


class RegressionData(L.LightningDataModule):
    def setup(self, stage: str) -> None:
        inputs = torch.randn(1024, 8, generator=torch.Generator().manual_seed(0))
        self.data = TensorDataset(inputs, inputs[:, :2].prod(dim=1, keepdim=True))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.utils.data.Subset(self.data, range(768)), batch_size=32, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.utils.data.Subset(self.data, range(768, 1024)), batch_size=256)


if __name__ == "__main__":
    L.seed_everything(0)
    trainer = L.Trainer(max_epochs=5, callbacks=[TwoPass()], gradient_clip_val=1.0, enable_checkpointing=False)
    trainer.fit(Regression(), RegressionData())
