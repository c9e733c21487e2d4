"""Validate, test and predict with untrained networks.

One process does it, or several under a strategy.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from datamodules.cifar10 import CIFAR10Data
from datamodules.modular_addition import ModularAdditionData
from datamodules.wikitext2 import WikiText2Data
from modules.image_classifier import ImageClassifier
from modules.modular_addition import ModularAddition
from tests.datamodules.tiny_cifar10 import images
from tests.modules import language
from tests.modules.small_task import make_optimizer


class FewImages(CIFAR10Data):
    """Have 27 images, which are not read from files."""

    def prepare_data(self) -> None:
        pass

    def setup(self, stage: str) -> None:
        pixels, labels = images(27, 0)
        self.val_set = self.test_set = pixels.view(-1, 3, 32, 32), torch.tensor(labels)


class SomeTokens(WikiText2Data):
    """Have the first tokens of the text only.

    Args:
        limit: how many tokens of each split there are.
    """

    def __init__(self, limit: int, **options: Any) -> None:
        super().__init__(**options)
        self.limit = limit

    def _rows(self, split: Any) -> Any:
        return super()._rows(split._replace(tokens=split.tokens[: self.limit]))


def cases(folder: Path) -> dict[str, tuple[Any, L.LightningDataModule]]:
    """Return modules and data that two processes cannot share evenly.

    Of some batches one process has nothing.
    """
    torch.manual_seed(0)
    text: dict[str, Any] = {"root": str(folder / "text"), "cache": str(folder / "cache"), "vocabulary": 320}
    text |= {"context": 16, "batch_size": 2}
    sums = ModularAddition(p=11, width=16, heads=2, mlp_width=16, optimizer=make_optimizer("adamw"))
    return {
        "language": (language.model(), language.data(folder, val_batch_size=3)),
        # The rows of packed text fill their batches.
        "packed": (language.model(), language.data(folder, protocol="packed", val_batch_size=1)),
        # A row for the first process alone, then a shorter one; and one shorter row.
        "two rows": (language.model(), SomeTokens(25, **text)),
        "a rest": (language.model(), SomeTokens(9, **text)),
        # 84 pairs: the last batch has one.
        "sums": (sums, ModularAdditionData(p=11, train_fraction=0.3, val_batch_size=83)),
        "images": (ImageClassifier(width=2, optimizer=make_optimizer("adamw")), FewImages(val_batch_size=13)),
    }


def evaluate(
    folder: Path, without: tuple[str, ...] = (), ranks: int = 1, strategy: Callable[[int], Any] = lambda ranks: "auto"
) -> dict[str, Any]:
    """Return metrics of validation and test, and predictions, by label."""
    found = {}
    for label, (module, data) in cases(folder).items():
        if label in without:
            continue
        trainer = language.trainer(
            devices=ranks, strategy=strategy(ranks), use_distributed_sampler=False, default_root_dir=folder
        )
        (validated,) = trainer.validate(module, data, verbose=False)
        (tested,) = trainer.test(module, data, verbose=False)
        found[label] = {"metrics": {**validated, **tested}, "lines": trainer.predict(module, data)}
    return found
