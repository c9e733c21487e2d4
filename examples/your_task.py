"""Define a task in one file, with its network, loss, metrics and data.

    python train.py fit --config examples/your_task.yaml
    python train.py fit --config examples/your_task.yaml --seed_everything 1 --data.seed 1
    python train.py test --config examples/your_task.yaml --ckpt_path best
    python train.py predict --config examples/your_task.yaml --ckpt_path best --data.questions "[0, 7, 42]"
    python sweep.py examples/your_task_sweep.yaml --folder runs/digits_sweep
    python compare.py runs/digits_sweep

Nothing is registered: the config names both classes by their import path, and every argument of theirs is an option,
such as --model.width 32. The data needs scikit-learn (pip install scikit-learn). docs/your_own_task.md explains this
file.
"""

from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from datamodules.batches import TensorBatches
from modules.metrics import Metrics
from modules.two_pass import TwoPassModule

Batch = tuple[Tensor, Tensor]


class Digits(L.LightningDataModule):
    """Load the 1,797 handwritten digits of scikit-learn.

    Batches are images (batch, 8, 8) and labels (batch,).

    Args:
        seed: of the training order. The split is the same for every seed.
        batch_size: images in a training batch.
        questions: numbers of test images for ``predict``.

    Raises:
        ValueError: scikit-learn is not installed, or a question is not the number of a test image.
    """

    task = "digits"  # the name of the task in reports

    def __init__(self, seed: int = 0, batch_size: int = 64, questions: list[int] | None = None) -> None:
        super().__init__()
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise ValueError("Digits needs the package scikit-learn: install it (pip install scikit-learn)") from error
        loaded = load_digits()
        images, labels = torch.tensor(loaded.images, dtype=torch.float32) / 16, torch.tensor(loaded.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        self.train, self.val, self.test = ((images[part], labels[part]) for part in order.split([1197, 300, 300]))
        self.seed, self.batch_size, self.questions = seed, batch_size, questions or [0, 1, 2]
        if not all(0 <= number < 300 for number in self.questions):
            raise ValueError(f"data.questions must be numbers from 0 to 299, got {self.questions}")

    def train_dataloader(self) -> TensorBatches:
        return TensorBatches(self.train, self.batch_size, self.seed)

    def val_dataloader(self) -> TensorBatches:
        return TensorBatches(self.val, 300, None)  # None keeps the order

    def test_dataloader(self) -> TensorBatches:
        return TensorBatches(self.test, 300, None)

    def predict_dataloader(self) -> TensorBatches:
        images, labels = self.test
        return TensorBatches((images[self.questions], labels[self.questions]), 300, None, shared=False)


class DigitClassifier(TwoPassModule):
    """Classify images with one hidden layer.

    Args:
        width: of the hidden layer.
        options: of the training step, such as the optimizer, see :class:`modules.two_pass.TwoPassModule`.
    """

    def __init__(self, width: int = 64, **options: Any) -> None:
        super().__init__(**options)
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        self.set_metrics({"accuracy": MulticlassAccuracy(10, average="micro")})

    def compute_loss(self, batch: Batch, metrics: Metrics | None) -> Tensor:
        images, labels = batch
        logits = self.network(images)
        if metrics is not None:  # there are none in a second pass
            metrics["accuracy"].update(logits.detach(), labels)
        return nn.functional.cross_entropy(logits, labels)

    def predict_step(self, batch: Batch, batch_index: int) -> list[str]:
        images, labels = batch
        guesses = self.network(images).argmax(dim=1)
        pairs = zip(guesses.tolist(), labels.tolist(), strict=True)
        return [f"{guess}: {'right' if guess == label else f'wrong, it is {label}'}" for guess, label in pairs]
