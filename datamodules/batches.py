"""Form batches from tensors in memory.

Batches are selected by index, in a seeded order. Loaders resume in the middle of an epoch.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """Return this process' rank and the number of processes."""
    distributed = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)


def device_of(data: L.LightningDataModule, on_device: bool) -> torch.device:
    """Return the device for the tensors of ``data``.

    It is the training device if ``on_device``, else the host.
    """
    if on_device and data.trainer is not None:
        return data.trainer.strategy.root_device
    return torch.device("cpu")


def share(examples: int) -> slice:
    """Return the slice of a batch for this process.

    The sizes of the slices differ by at most one.
    """
    rank, ranks = world()
    each, more = divmod(examples, ranks)
    start = rank * each + min(rank, more)
    return slice(start, start + each + (rank < more))


class TensorBatches:
    """Load batches from tensors that share their first dimension.

    The order of an epoch depends only on ``seed`` and the number of the epoch. Lightning sets the number through
    :meth:`set_epoch` and saves ``state_dict`` in its checkpoints, so a resumed run continues with the next batch.
    Without Lightning every iteration is the next epoch.

    Several processes share every batch, in consecutive slices whose sizes differ by at most one. In a shuffled epoch no
    slice is empty: a last batch with fewer examples than processes is merged into the one before. In the given order,
    which is for evaluation, the slices of the last processes may be empty. So every example is evaluated once, and
    every process has equally many batches.

    Args:
        tensors: each of shape (examples, ...), on one device.
        batch_size: examples in a batch, over all processes.
        seed: of the order. ``None`` keeps the given order in every epoch.
        drop_last: whether to drop a last short batch. It has other examples in each shuffled epoch.
        shared: whether several processes share every batch. If not, each gets all of it.

    Attributes:
        share_weight: size of this process' slice of the last batch, relative to the mean size.

    Raises:
        ValueError: no examples, none left, ``batch_size`` below 1, or a shuffled batch with fewer examples than
            processes.
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
            raise ValueError("there are no examples: pass tensors with at least one")
        if drop_last and len(tensors[0]) < batch_size:
            raise ValueError(f"there are {len(tensors[0])} examples, too few for one batch of {batch_size}: lower it")
        self.tensors, self.batch_size, self.seed = tensors, batch_size, seed
        self.drop_last, self.shared = drop_last, shared
        self.share_weight = 1.0
        # Lightning finds set_epoch here. It would take a loader with an attribute sampler for a DataLoader.
        self.batch_sampler = SimpleNamespace(sampler=self)
        self.epoch, self.done = -1, 0
        self._resuming = False
        self._announced: int | None = None

    def __len__(self) -> int:
        return len(self._bounds()) - 1

    def _bounds(self) -> list[int]:
        """Return the start of each batch in the order, and the end of the last one."""
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
        resumes = self._resuming and self.done < len(self) and self._announced in (None, self.epoch)
        if not resumes:
            self.epoch, self.done = self.epoch + 1 if self._announced is None else self._announced, 0
        self._resuming, self._announced = False, None
        # Moved once an epoch, because an index on the host would synchronise with the device in every batch.
        order, bounds = self._order().to(self.tensors[0].device), self._bounds()
        while self.done < len(bounds) - 1:
            self.done += 1
            batch = order[bounds[self.done - 1] : bounds[self.done]]
            local = share(len(batch)) if self.shared else slice(0, len(batch))
            self.share_weight = (local.stop - local.start) * (world()[1] if self.shared else 1) / len(batch)
            yield self._batch(batch, local)

    def _batch(self, examples: Tensor, local: slice) -> tuple[Tensor, ...]:
        """Return this process' part of a batch.

        ``examples`` are the numbers of the examples of the batch, and ``local`` is the slice of this process.
        """
        return tuple(tensor[examples[local]] for tensor in self.tensors)

    def _order(self) -> Tensor:
        examples = len(self.tensors[0])
        if self.seed is None:
            return torch.arange(examples)
        # Mixed so that neighbouring seeds and epochs share no permutation.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        return torch.randperm(examples, generator=generator)

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch that the next iteration starts or resumes."""
        self._announced = epoch

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch and its number of delivered batches."""
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume after the last batch of ``state``.

        At the end of an epoch, resume with the next epoch.
        """
        self.epoch, self.done, self._resuming = state["epoch"], state["done"], True
