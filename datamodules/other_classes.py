"""Provide images that a run on CIFAR-10 leaves unused, of chosen classes."""

from typing import Any

import lightning.pytorch as L
from torch import Tensor

from datamodules.augmentation import ImageBatches
from datamodules.cifar10 import CLASSES, CIFAR10Data


class OtherClasses(L.LightningDataModule):
    """Provide images that CIFAR10Data leaves unused in a run, of chosen classes.

    It is the other data of :class:`callbacks.forgetting_probe.ForgettingProbe`, and reads files, batch sizes and
    augmentation from the run's data module. It trains on the images of these classes that the run neither trains on nor
    holds out, and validates on their test images. The run itself trains on all ten classes.

    Args:
        classes: numbers of the classes, from 0 to 9.

    Raises:
        ValueError: no class or an unknown one, the run has another data module, or it uses every training image.
    """

    def __init__(self, classes: tuple[int, ...] = (5, 6, 7, 8, 9)) -> None:
        super().__init__()
        if not classes or not set(classes) <= set(range(len(CLASSES))):
            raise ValueError(f"classes must be numbers from 0 to {len(CLASSES) - 1}, got {list(classes)}")
        self.classes = classes
        self.train_set: tuple[Tensor, Tensor]
        self.val_set: tuple[Tensor, Tensor]

    def setup(self, stage: str) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, CIFAR10Data):
            raise ValueError("OtherClasses are those of CIFAR10Data, which is not the data of this run: use other data")
        self.data = data
        self.train_set, self.val_set = self._chosen(*data.unused()), self._chosen(*data.test_set)
        if len(self.train_set[0]) == 0:
            raise ValueError("OtherClasses has no image left to train on: lower data.train_examples")

    def _chosen(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        chosen = labels.unsqueeze(1).eq(labels.new_tensor(self.classes)).any(1)
        return images[chosen], labels[chosen]

    def train_dataloader(self) -> ImageBatches:
        """Return the left-out images of the classes, shuffled and augmented."""
        return self.data.batches(*self.train_set, training=True)

    def val_dataloader(self) -> ImageBatches:
        """Return the test images of the classes, in a fixed order."""
        return self.data.batches(*self.val_set)
