"""Under Lightning's automatic optimization, whose step(closure) evaluates the last batch of a window alone."""

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ars2 import ARS2Neo
from tests.ars2.training import copies, worst_difference


class Plain(L.LightningModule):
    """A module as in any tutorial."""

    def __init__(self, mode: Literal["base", "sync"]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mode = mode
        self.network = nn.Linear(3, 2)

    def training_step(self, batch: tuple[Tensor], batch_index: int) -> Tensor:
        loss: Tensor = self.network(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> ARS2Neo:
        groups: list[dict[str, Any]] = [
            {"params": [self.network.weight]},
            {"params": [self.network.bias], "track": "vector"},
        ]
        return ARS2Neo(groups, mode=self.mode, ns_dtype="float32")


DATA = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


def fit(module: Plain, folder: Path, **options: Any) -> None:
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, DataLoader(TensorDataset(DATA), batch_size=2))


def test_two_passes_over_accumulated_batches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Lightning's accumulate_grad_batches does neither"):
        fit(Plain("sync"), tmp_path, accumulate_grad_batches=2)


def test_one_pass_over_accumulated_batches_is_the_step_of_their_mean(tmp_path: Path) -> None:
    module, by_hand = Plain("base"), Plain("base")
    fit(module, tmp_path, accumulate_grad_batches=2)
    optimizer = by_hand.configure_optimizers()
    for window in DATA.split(4):
        optimizer.zero_grad()
        by_hand.training_step((window,), 0).backward()
        optimizer.step()
    assert worst_difference(copies(module.parameters()), copies(by_hand.parameters())) < 1e-6


def test_two_passes_over_single_batches_are_those_of_a_loop(tmp_path: Path) -> None:
    module, by_hand = Plain("sync"), Plain("sync")
    fit(module, tmp_path)
    optimizer = by_hand.configure_optimizers()
    for batch in DATA.split(2):

        def closure(batch: Tensor = batch) -> None:
            optimizer.zero_grad()
            by_hand.training_step((batch,), 0).backward()

        optimizer.step(closure)
    assert worst_difference(copies(module.parameters()), copies(by_hand.parameters())) == 0
