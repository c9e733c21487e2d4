"""Batches from tensors in memory: whole batches by index, a seeded order, and resuming in the middle of an epoch."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class TensorBatches:
    """A loader over tensors that share their first dimension; the last short batch is kept.

    The order of an epoch follows from ``seed`` and the epoch's number alone. Lightning tells the number through
    :meth:`set_epoch` and saves ``state_dict`` in its checkpoints, so a run resumes with the batch after the last one
    it trained on. Without Lightning every iteration is the next epoch.

    Args:
        tensors: each of shape (examples, ...).
        batch_size: examples to a batch.
        seed: of the order; ``None`` keeps the given order in every epoch.

    Raises:
        ValueError: no examples, or ``batch_size`` below 1.
    """

    def __init__(self, tensors: tuple[Tensor, ...], batch_size: int, seed: int | None) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if len(tensors[0]) == 0:
            raise ValueError("there are no examples to make batches of")
        self.tensors, self.batch_size, self.seed = tensors, batch_size, seed
        # Lightning looks for set_epoch here; a loader with an attribute called sampler it takes for a DataLoader.
        self.batch_sampler = SimpleNamespace(sampler=self)
        self.epoch, self.done = -1, 0
        self._resuming = False
        self._announced: int | None = None

    def __len__(self) -> int:
        return -(-len(self.tensors[0]) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        goes_on = self._resuming and self.done < len(self) and self._announced in (None, self.epoch)
        if not goes_on:
            self.epoch, self.done = self.epoch + 1 if self._announced is None else self._announced, 0
        self._resuming, self._announced = False, None
        batches = self._order().split(self.batch_size)
        while self.done < len(batches):
            self.done += 1
            yield self._batch(batches[self.done - 1])

    def _batch(self, examples: Tensor) -> tuple[Tensor, ...]:
        """Return the batch of the examples of these numbers (batch,); the ``done``-th of the epoch ``epoch``."""
        return tuple(tensor[examples] for tensor in self.tensors)

    def _order(self) -> Tensor:
        examples = len(self.tensors[0])
        if self.seed is None:
            return torch.arange(examples)
        # Mixed so that neighbouring seeds and epochs share no permutation.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        return torch.randperm(examples, generator=generator)

    def set_epoch(self, epoch: int) -> None:
        """Tell the number of the epoch that the next iteration begins, or goes on with."""
        self._announced = epoch

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch and how many of its batches were handed out."""
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch where ``state`` was taken; at an epoch's end with the next epoch."""
        self.epoch, self.done, self._resuming = state["epoch"], state["done"], True
