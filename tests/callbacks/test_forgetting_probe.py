import copy
import math
from collections.abc import Iterable
from itertools import chain, islice, repeat
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from callbacks.forgetting_probe import ForgettingProbe
from datamodules.batches import TensorBatches
from tests.callbacks.fits import adamw, restored, values_of_a_test
from tests.modules.small_task import SmallTask, batches

KEYS = {"loss_before", "loss_after", "new_loss_before", "new_loss_after", "probe_seconds"}


class OtherImages(L.LightningDataModule):
    """Provide images of another mean, all of the third class."""

    tensors = 1 + torch.randn(10, 2, 4, 4, generator=torch.Generator().manual_seed(8)), torch.full((10,), 2)

    def train_dataloader(self) -> Any:
        return TensorBatches(self.tensors, 4, seed=3)

    def val_dataloader(self) -> TensorBatches:
        return TensorBatches(self.tensors, 5, None)


class NoImages(OtherImages):
    def train_dataloader(self) -> Any:
        return []


def mean_loss(network: torch.nn.Module, examples: Iterable[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        images, labels = (torch.cat(parts) for parts in zip(*examples, strict=True))
        return cross_entropy(network.eval()(images), labels).item()


def test_the_values_are_those_of_a_plain_loop() -> None:
    """Compare with a copy of a network that has BatchNorm and dropout."""
    model = SmallTask(0.3, optimizer=adamw)
    network, other = copy.deepcopy(model.network), OtherImages()
    row = values_of_a_test(model, ForgettingProbe(other, steps=7, lr=0.01, weight_decay=0.1, seed=2), batches())
    tests, news = list(batches()), list(other.val_dataloader())
    assert row["forgetting/loss_before"] == pytest.approx(mean_loss(network, tests), rel=1e-5)
    assert row["forgetting/new_loss_before"] == pytest.approx(mean_loss(network, news), rel=1e-5)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=0.1)
    torch.manual_seed(2)
    network.train()
    # Three batches are an epoch, and each epoch has another order.
    for images, labels in islice(chain.from_iterable(repeat(other.train_dataloader())), 7):
        optimizer.zero_grad()
        cross_entropy(network(images), labels).backward()
        optimizer.step()
    assert row["forgetting/loss_after"] == pytest.approx(mean_loss(network, tests), rel=1e-5)
    assert row["forgetting/new_loss_after"] == pytest.approx(mean_loss(network, news), rel=1e-5)
    assert row["forgetting/new_loss_after"] < row["forgetting/new_loss_before"]
    assert set(row) == {"test/loss", *(f"forgetting/{key}" for key in KEYS)}


class Failing(SmallTask):
    """Fail in the third update, as for lack of memory."""

    updates = 0

    def compute_loss(self, batch: Any, metrics: Any) -> Tensor:
        self.updates += self.training
        if self.updates == 3:
            raise RuntimeError("out of memory")
        return super().compute_loss(batch, metrics)


@pytest.mark.parametrize("kind", [SmallTask, Failing])
def test_the_network_is_restored_bit_for_bit(kind: type[SmallTask]) -> None:
    model = kind(0.3, optimizer=adamw)
    L.seed_everything(3)
    states = torch.get_rng_state().tolist()
    with restored(model):
        if kind is Failing:
            with pytest.raises(RuntimeError, match=r"^out of memory$"):
                values_of_a_test(model, ForgettingProbe(OtherImages(), steps=5), batches())
            assert not model.network.training
        else:
            values_of_a_test(model, ForgettingProbe(OtherImages(), steps=5), batches())
            assert torch.get_rng_state().tolist() == states


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batches": 0}, "batches must be at least 1, got 0"),
        ({"lr": 0.0}, r"lr must be above 0, got 0\.0"),
        ({"lr": math.nan}, "lr must be above 0, got nan"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ForgettingProbe(OtherImages(), **options)


def test_other_data_without_batches_and_several_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="the other data of ForgettingProbe has no batches to train on"):
        values_of_a_test(SmallTask(optimizer=adamw), ForgettingProbe(NoImages()), batches())
    several = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="ForgettingProbe works on one device, not with DDPStrategy"):
        ForgettingProbe(OtherImages()).setup(several, SmallTask(optimizer=adamw), "fit")
