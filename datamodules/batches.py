"""Batches from tensors in memory: whole batches by index, a seeded order, and resuming in the middle of an epoch."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """Return this process' rank and the number of processes that train together."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def device_of(data: L.LightningDataModule, on_device: bool) -> torch.device:
    """Return where the tensors of ``data`` are to be kept: the device that trains if ``on_device``, else the host."""
    if on_device and data.trainer is not None:
        return data.trainer.strategy.root_device
    return torch.device("cpu")


def share(examples: int) -> slice:
    """Return which of a batch's examples are this process': a run of them, as long as the others' or one longer."""
    rank, ranks = world()
    each, more = divmod(examples, ranks)
    start = rank * each + min(rank, more)
    return slice(start, start + each + (rank < more))


class TensorBatches:
    """A loader over tensors that share their first dimension.

    The order of an epoch follows from ``seed`` and the epoch's number alone. Lightning tells the number through
    :meth:`set_epoch` and saves ``state_dict`` in its checkpoints, so a run resumes with the batch after the last one
    it trained on. Without Lightning every iteration is the next epoch.

    Where several processes train together, each is given its part of every batch: one after the other, sizes differing
    by at most one. No part of a shuffled batch is empty: a last short one with fewer examples than processes joins the
    batch before it. In the given order, which is for evaluation, the last processes' parts may be empty, so that every
    example is evaluated once and every process is given equally many batches.

    Args:
        tensors: each of shape (examples, ...), on one device.
        batch_size: examples to a batch, of all processes together.
        seed: of the order; ``None`` keeps the given order in every epoch.
        drop_last: whether a last short batch is left out; of a shuffled epoch it holds other examples each time.
        shared: whether several processes share every batch; if not, each is given all of it.

    Attributes:
        share_weight: the examples that this process was given of the last batch, relative to an even share of it.

    Raises:
        ValueError: no examples, none left, ``batch_size`` below 1, or a shuffled batch that is too small for the number
            of processes.
    """

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        batch_size: int,
        seed: int | None,
        drop_last: bool = False,
        shared: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if len(tensors[0]) == 0:
            raise ValueError("there are no examples to make batches of")
        if drop_last and len(tensors[0]) < batch_size:
            raise ValueError(f"there are {len(tensors[0])} examples, too few for one batch of {batch_size}")
        self.tensors, self.batch_size, self.seed = tensors, batch_size, seed
        self.drop_last, self.shared = drop_last, shared
        self.share_weight = 1.0
        # Lightning looks for set_epoch here; a loader with an attribute called sampler it takes for a DataLoader.
        self.batch_sampler = SimpleNamespace(sampler=self)
        self.epoch, self.done = -1, 0
        self._resuming = False
        self._announced: int | None = None

    def __len__(self) -> int:
        return len(self._bounds()) - 1

    def _bounds(self) -> list[int]:
        """Return where each batch of an epoch's order begins, and the end of the last one."""
        examples, ranks = len(self.tensors[0]), 1 if self.seed is None or not self.shared else world()[1]
        if min(self.batch_size, examples) < ranks:
            raise ValueError(
                f"a batch of {min(self.batch_size, examples)} cannot be shared among {ranks} processes:"
                " raise batch_size to their number at least"
            )
        bounds = [*range(0, examples, self.batch_size), examples]
        last = bounds[-1] - bounds[-2]
        if self.drop_last and last < self.batch_size:
            del bounds[-1]
        elif len(bounds) > 2 and last < ranks:
            del bounds[-2]
        return bounds

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        goes_on = self._resuming and self.done < len(self) and self._announced in (None, self.epoch)
        if not goes_on:
            self.epoch, self.done = self.epoch + 1 if self._announced is None else self._announced, 0
        self._resuming, self._announced = False, None
        # Moved once an epoch: an index on the host would be sent to the device, and waited for, with every batch.
        order, bounds = self._order().to(self.tensors[0].device), self._bounds()
        while self.done < len(bounds) - 1:
            self.done += 1
            batch = order[bounds[self.done - 1] : bounds[self.done]]
            mine = share(len(batch)) if self.shared else slice(0, len(batch))
            self.share_weight = (mine.stop - mine.start) * (world()[1] if self.shared else 1) / len(batch)
            yield self._batch(batch, mine)

    def _batch(self, examples: Tensor, mine: slice) -> tuple[Tensor, ...]:
        """Return this process' part of the ``done``-th batch of the epoch, whose numbers are ``examples``."""
        return tuple(tensor[examples[mine]] for tensor in self.tensors)

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
