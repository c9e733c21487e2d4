"""Refuse data loaders that cannot be trained on, and report what they cannot do."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from experiment.distributed import gather_per_rank
from experiment.library_internals import is_within_epoch

RESUMABLE = "TensorBatches or DatasetBatches of datamodules.batches, or add state_dict(), load_state_dict(), __len__()"


class LoaderChecks(L.Callback):
    """Check the loaders of a run for what would go wrong without an error.

    A loader must start anew in every epoch and have batches. Several processes must not get the same batches. A
    resumed run reports if its training loader cannot continue in the middle of an epoch.
    """

    changes_training = False

    def __init__(self) -> None:
        self._batches: int | None = None  # made before this epoch
        self._compared = False

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        check_loader(trainer.val_dataloaders, f"{_source(trainer)}.val_dataloader()")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loader = trainer.train_dataloader
        check_loader(loader, f"{_source(trainer)}.train_dataloader()")
        middle = trainer.fit_loop.epoch_loop.batch_progress.current.ready > 0 and is_within_epoch(trainer)
        if middle and trainer.is_global_zero and (change := _change_on_resuming(CombinedLoader(loader).flattened)):
            print(f"epoch {trainer.current_epoch + 1} is not resumed exactly: {change}")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._compared:
            return
        self._compared = True
        replicas = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
        if replicas == 1 or replicas != trainer.world_size:  # tensor parallelism needs the same batch
            return
        digests = gather_per_rank(trainer, _digest(batch))
        if digests[0] is not None and len(set(digests)) == 1:
            raise ValueError(
                f"all {replicas} processes got the same first batch from {_source(trainer)}.train_dataloader(), so"
                " they would repeat each other's work: return datamodules.batches.TensorBatches, or a DataLoader of"
                " a map-style Dataset, which are shared among processes, or read another part of the data in each"
                " (torch.distributed.get_rank())"
            )

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._batches = trainer.fit_loop.total_batch_idx

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._batches == trainer.fit_loop.total_batch_idx:
            raise ValueError(
                f"epoch {trainer.current_epoch + 1} had no batches: {_source(trainer)}.train_dataloader() must return"
                " a loader that starts anew in every epoch"
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning skips training without a word.
        if trainer.fit_loop.max_batches == 0 and trainer.limit_train_batches != 0:
            raise ValueError(f"{_source(trainer)}.train_dataloader() has no batches: it needs at least one")


def check_loader(loader: Any, where: str) -> None:
    """Check that a loader is an object that gives batches in every epoch.

    Args:
        loader: or a collection of loaders, as Lightning takes them.
        where: it comes from, for messages.

    Raises:
        ValueError: it is not.
    """
    if isinstance(loader, Iterator):
        raise ValueError(
            f"{where} returned a {type(loader).__name__}, which ends after one epoch: return an object that starts anew"
            " in every epoch, such as torch's DataLoader"
        )
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise ValueError(
            f"{where} returned a dataset, which has no batches: return DataLoader({type(loader).__name__}(...),"
            " batch_size=...)"
        )
    if _has_tensors(loader):
        raise ValueError(
            f"{where} returned a {type(loader).__name__} of tensors, which Lightning takes for several loaders: return"
            " one loader, such as DataLoader(batches, batch_size=None) for a list of batches"
        )


def _has_tensors(part: Any) -> bool:
    parts = part.values() if isinstance(part, Mapping) else part if isinstance(part, (list, tuple)) else ()
    return isinstance(part, Tensor) or any(map(_has_tensors, parts))


def _change_on_resuming(loaders: list[Any]) -> str:
    """Return the effect of resuming within an epoch, or "" if resuming is exact."""
    stateful = all(hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict") for loader in loaders)
    sized = all(sized_len(loader) is not None for loader in loaders)
    if stateful and sized:
        return ""
    if stateful:
        return (
            "one batch is left out, because Lightning reads a loader without __len__() one batch ahead; add __len__()"
        )
    effect = (
        "the batches left are drawn from its start again, so that some examples come twice and others not at all"
        if sized
        else "it starts anew, so that the batches before the stop come twice"
    )
    return f"the training loader cannot continue in its middle, and {effect}; use {RESUMABLE}"


def _source(trainer: L.Trainer) -> str:
    data: Any = getattr(trainer, "datamodule", None)
    return type(trainer.lightning_module if data is None else data).__name__


def _digest(batch: Any) -> str | None:
    """Return a digest of the tensors in a batch; ``None`` if it has none."""
    tensors: list[Tensor] = []
    apply_to_collection(batch, Tensor, tensors.append)
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest() if tensors else None
