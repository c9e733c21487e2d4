"""Generate the p*p sums of modular addition.

A random part is for training, the rest for validation.
"""

import random
import re
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from datamodules.batches import TensorBatches
from datamodules.saved_split import check_same_split


class ModularAdditionData(L.LightningDataModule):
    """Provide batches of sums, (tokens (batch, 3), answers (batch,)), both int64.

    The tokens are x, y and "=" (token p).

    Args:
        p: the modulus, at least 3.
        train_fraction: part of the p*p pairs for training, rounded down, in (0, 1).
        seed: of the split and of the training order.
        batch_size: examples in a training batch. The last short batch is used too.
        val_batch_size: examples in a validation batch.
        questions: sums such as ``"3+5"`` for ``predict``. ``None`` is ten of the validation pairs.

    Raises:
        ValueError: a value is out of range, or a question is not a sum of two numbers below ``p``.
    """

    task = "modular_addition"

    def __init__(
        self,
        p: int = 113,
        train_fraction: float = 0.3,
        seed: int = 42,
        batch_size: int = 512,
        val_batch_size: int = 4096,
        questions: list[str] | None = None,
    ) -> None:
        super().__init__()
        if p < 3:
            raise ValueError(f"p must be at least 3, got {p}")
        if not 0 < int(train_fraction * p * p) < p * p:
            raise ValueError(f"train_fraction must leave pairs on both sides of the split, got {train_fraction}")
        self.p, self.train_fraction, self.seed = p, train_fraction, seed
        self.batch_size, self.val_batch_size = batch_size, val_batch_size
        # Python's shuffle gives the split of Nanda et al.'s code, which later grokking experiments use too.
        pairs = [(x, y) for x in range(p) for y in range(p)]
        random.Random(seed).shuffle(pairs)
        self.train_pairs, self.val_pairs = torch.tensor(pairs).tensor_split([int(train_fraction * p * p)])
        self.asked = self.val_pairs[:10] if questions is None else torch.tensor([self._parse(q) for q in questions])

    def state_dict(self) -> dict[str, Any]:
        """Return the options of the split for a checkpoint."""
        return {"p": self.p, "train_fraction": self.train_fraction, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint was trained on this split.

        Raises:
            ValueError: it was trained on another one.
        """
        if self.trainer is None or self.trainer.state.fn != "predict":
            check_same_split(state_dict, self.state_dict())

    def _parse(self, question: str) -> tuple[int, int]:
        match = re.fullmatch(r"\s*(\d+)\s*\+\s*(\d+)\s*=?\s*", question)
        if match is None or max(int(match[1]), int(match[2])) >= self.p:
            raise ValueError(f"a question must be a sum of numbers below p = {self.p}, such as '3+5', got {question!r}")
        return int(match[1]), int(match[2])

    def _examples(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        equals = torch.full((len(pairs), 1), self.p)
        return torch.cat([pairs, equals], dim=1), pairs.sum(1) % self.p

    def train_dataloader(self) -> TensorBatches:
        """Return the training pairs, shuffled in each epoch."""
        return TensorBatches(self._examples(self.train_pairs), self.batch_size, self.seed)

    def val_dataloader(self) -> TensorBatches:
        """Return the validation pairs, in a fixed order."""
        return TensorBatches(self._examples(self.val_pairs), self.val_batch_size, None)

    def test_dataloader(self) -> TensorBatches:
        """Return the validation pairs.

        The task has no third split.
        """
        return self.val_dataloader()

    def predict_dataloader(self) -> TensorBatches:
        """Return the questions in their order.

        Every process gets all of them.
        """
        return TensorBatches(self._examples(self.asked), self.val_batch_size, None, shared=False)
