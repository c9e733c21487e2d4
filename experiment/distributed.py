"""Which of a run's processes this is, and how the first one tells the others what it has decided.

Either Lightning starts the others, with the environment of the first; or torchrun or srun start all of them alike, and
then they must not each find a folder of their own.
"""

import functools
import json
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

if TYPE_CHECKING:
    import lightning.pytorch as L


def _started_alike() -> tuple[int, int] | None:
    """Return rank and number of processes where torchrun or srun has started several."""
    if TorchElasticEnvironment.detect():
        found = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    elif SLURMEnvironment.detect() and "SLURM_PROCID" in os.environ:
        found = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    else:
        return None
    return found if found[1] > 1 else None


def is_first() -> bool:
    """Say whether this process is the one that makes the run's folder and speaks for the others."""
    alike = _started_alike()
    return (int(os.environ.get("LOCAL_RANK", 0)) if alike is None else alike[0]) == 0


def from_first(name: str, decide: Callable[[], Any]) -> Any:
    """Return what ``decide`` returns in the first process, where alone it is called, in all that were started alike.

    Args:
        name: of the decision; every process comes to it once.
        decide: returns what JSON can hold.

    Raises:
        ValueError: in the others, what ``decide`` raised in the first.
    """
    alike = _started_alike()
    if alike is None:
        return decide()
    store = _store(*alike)
    if alike[0] == 0:
        try:
            decided = decide()
        except Exception as error:
            store.set(name, json.dumps({"error": str(error)}))
            raise
        store.set(name, json.dumps({"decided": decided}))
        return decided
    said = json.loads(store.get(name))
    if "error" in said:
        raise ValueError(said["error"])
    return said["decided"]


@functools.cache
def _store(rank: int, processes: int) -> torch.distributed.Store:
    """Return the store at the address where the processes meet later too, to train."""
    if not TorchElasticEnvironment.detect():
        environment = SLURMEnvironment()
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    store, _, _ = next(torch.distributed.rendezvous("env://", rank, processes))
    return torch.distributed.PrefixStore("ars2", store)


def gather_per_rank(trainer: "L.Trainer", value: Any) -> list[Any]:
    """Return the ``value`` of every rank, by rank, on every rank; a collective call."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def local_share(trainer: "L.Trainer", values: Sequence[Any]) -> Any | None:
    """Return this rank's entry of what :func:`gather_per_rank` returned.

    The result is ``None`` if the values were gathered from another number of ranks.
    """
    return values[trainer.global_rank] if len(values) == trainer.world_size else None
