"""Provide one network and one dataset, so that you can compare the loops."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

MICRO_BATCHES, MICRO_BATCH = 10, 32


def network() -> nn.Sequential:
    """Return a small network with BatchNorm and dropout."""
    first = (nn.Linear(16, 64, bias=False), nn.BatchNorm1d(64), nn.GELU(), nn.Dropout(0.1))
    return nn.Sequential(*first, nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))


def loader() -> DataLoader[Any]:
    """Return the micro-batches of an epoch. The first two inputs make the target."""
    inputs = torch.randn(MICRO_BATCHES * MICRO_BATCH, 16, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(inputs, inputs[:, :2].prod(dim=1, keepdim=True)), MICRO_BATCH)


def windows(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield the micro-batches of each step. The last step may have fewer."""
    iterator = iter(batches)
    while window := list(islice(iterator, size)):
        yield window
