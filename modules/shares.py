"""What every process of a run keeps for itself, in one checkpoint."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as L
import torch


def of_all(trainer: L.Trainer, mine: Any) -> list[Any]:
    """Return what each process gave as ``mine``, by rank, in every process; all of them must ask."""
    if trainer.world_size == 1:
        return [mine]
    shares: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(shares, mine)
    return shares


def own(trainer: L.Trainer, shares: Sequence[Any]) -> Any | None:
    """Return this process' part of what :func:`of_all` returned; ``None`` if it was of another number of processes."""
    return shares[trainer.global_rank] if len(shares) == trainer.world_size else None
