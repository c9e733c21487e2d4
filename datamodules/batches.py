"""Form batches from tensors in memory, or from a dataset.

Batches are selected by index, in a seeded order. Loaders resume in the middle of an epoch.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader


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

    empty_shares = True  # whether the share of a process may be empty in the given order

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
        may_be_empty = self.seed is None and self.empty_shares
        examples, ranks = len(self.tensors[0]), 1 if may_be_empty or not self.shared else world()[1]
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

    def __iter__(self) -> Iterator[Any]:
        order, bounds = self._begin()
        while self.done < len(bounds) - 1:
            yield self._batch(*self._next(order, bounds))

    def _begin(self) -> tuple[Tensor, list[int]]:
        """Begin or resume an epoch, and return its order and bounds."""
        resumes = self._resuming and self.done < len(self) and self._announced in (None, self.epoch)
        if not resumes:
            self.epoch, self.done = self.epoch + 1 if self._announced is None else self._announced, 0
        self._resuming, self._announced = False, None
        # Moved once an epoch, because an index on the host would synchronise with the device in every batch.
        return self._order().to(self.tensors[0].device), self._bounds()

    def _next(self, order: Tensor, bounds: list[int]) -> tuple[Tensor, slice]:
        """Count the next batch, and return its examples and the slice of this process."""
        self.done += 1
        batch = order[bounds[self.done - 1] : bounds[self.done]]
        local = share(len(batch)) if self.shared else slice(0, len(batch))
        self.share_weight = (local.stop - local.start) * (world()[1] if self.shared else 1) / len(batch)
        return batch, local

    def _batch(self, examples: Tensor, local: slice) -> tuple[Tensor, ...]:
        """Return this process' part of a batch.

        ``examples`` are the numbers of the examples of the batch, and ``local`` is the slice of this process.
        """
        return tuple(tensor[examples[local]] for tensor in self.tensors)

    def _order(self) -> Tensor:
        examples = len(self.tensors[0])
        return torch.arange(examples) if self.seed is None else torch.randperm(examples, generator=self._generator())

    def _generator(self) -> torch.Generator:
        # Mixed so that neighbouring seeds and epochs share no permutation.
        return torch.Generator().manual_seed(((self.seed or 0) * 1_000_003 + self.epoch) % 2**63)

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


class DatasetBatches(TensorBatches):
    """Load batches of a map-style dataset by torch's ``DataLoader``.

    The dataset may be images in files. The order of an epoch, its shares and how it resumes are those of
    :class:`TensorBatches`. No share is empty. Random numbers that the dataset draws in worker processes differ after
    resuming in the middle of an epoch.

    Args:
        dataset: has a length, and an example for each number below it.
        batch_size, seed, drop_last, shared: see :class:`TensorBatches`.
        options: of torch's ``DataLoader``, such as ``num_workers`` and ``collate_fn``.
    """

    empty_shares = False

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        seed: int | None,
        drop_last: bool = False,
        shared: bool = True,
        **options: Any,
    ) -> None:
        super().__init__((torch.arange(len(dataset)),), batch_size, seed, drop_last, shared)
        self.dataset, self.options = dataset, options

    def __iter__(self) -> Iterator[Any]:
        order, bounds = self._begin()
        done = self.done
        parts = [self._next(order, bounds) for _ in range(done, len(bounds) - 1)]
        self.done = done  # workers read ahead, and only delivered batches count
        numbers = [batch[local].tolist() for batch, local in parts]
        # The loader would draw from the global generator, also when it resumes.
        for batch in DataLoader(self.dataset, batch_sampler=numbers, generator=self._generator(), **self.options):
            self._next(order, bounds)
            yield batch
