r"""Define a task in one file, with its network, loss, metrics and data.

    python train.py fit --experiment spirals \
        --model examples.your_task.Spirals --data examples.your_task.SpiralData \
        --model.optimizer ars2.ARS2Neo --model.optimizer.lr 3e-3 --model.optimizer.mode base \
        --checkpoint.monitor val/accuracy --checkpoint.mode max --trainer.max_epochs 30

Nothing is registered: the command line imports classes by their path. Seeds, resuming, accumulation, clipping and
second passes come from TwoPassModule. Every argument of the two classes is an option, such as --model.width 32. Once
the options settle, put them into a YAML file as in configs/; --print_config prints it.
"""

import math
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from datamodules.batches import TensorBatches
from modules.metrics import Metrics
from modules.two_pass import TwoPassModule

ARMS = 3


class Spirals(TwoPassModule):
    """Classify points of the plane by the spiral arm on which they lie.

    Args:
        width: size of the hidden layers.
        options: options of the training step, such as the optimizer, see :class:`modules.two_pass.TwoPassModule`.
    """

    def __init__(self, width: int = 64, **options: Any) -> None:
        super().__init__(**options)
        self.network = nn.Sequential(
            nn.Linear(2, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, ARMS)
        )
        # Logged as train/accuracy, val/accuracy and test/accuracy; the mean loss is logged automatically.
        self.set_metrics({"accuracy": MulticlassAccuracy(ARMS, average="micro", validate_args=False)})

    def compute_loss(self, batch: tuple[Tensor, Tensor], metrics: Metrics | None) -> Tensor:
        """Return the mean loss of a batch; there are no metrics in a second pass."""
        points, arms = batch
        logits = self.network(points)
        if metrics is not None:
            metrics["accuracy"].update(logits.detach(), arms)
        return nn.functional.cross_entropy(logits, arms)


class SpiralData(L.LightningDataModule):
    """Provide points (batch, 2) and the arms on which they lie (batch,).

    Args:
        examples: number of training examples, and of validation examples.
        noise: standard deviation of a point's distance from its arm.
        seed: seed of the points and of the training order.
        batch_size: examples per batch.
    """

    task = "spirals"  # the name of the task in reports

    def __init__(self, examples: int = 960, noise: float = 0.05, seed: int = 0, batch_size: int = 64) -> None:
        super().__init__()
        self.seed, self.batch_size = seed, batch_size
        generator = torch.Generator().manual_seed(seed)
        arms = torch.arange(2 * examples) % ARMS
        radius = torch.rand(2 * examples, generator=generator).sqrt()
        angle = 2 * math.pi * (radius + arms / ARMS)
        points = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
        points += noise * torch.randn(points.shape, generator=generator)
        self.train_examples, self.val_examples = (
            (points[:examples], arms[:examples]),
            (points[examples:], arms[examples:]),
        )

    def train_dataloader(self) -> TensorBatches:
        """Return batches that are reshuffled every epoch.

        Any loader works. This one can also resume from the middle of an epoch."""
        return TensorBatches(self.train_examples, self.batch_size, self.seed)

    def val_dataloader(self) -> TensorBatches:
        """Return batches in a fixed order."""
        return TensorBatches(self.val_examples, 1024, None)

    def test_dataloader(self) -> TensorBatches:
        """Return the validation batches, because there is no third split."""
        return self.val_dataloader()
