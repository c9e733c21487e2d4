"""Find this process' rank, and let rank zero decide for all processes.

Either Lightning starts the other processes, which inherit the environment of the first one; or torchrun or srun start
all of them alike, and then only rank zero may create the run's folder.
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


def _rank_and_size() -> tuple[int, int] | None:
    """Return rank and number of processes where torchrun or srun has started several."""
    if TorchElasticEnvironment.detect():
        found = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    elif SLURMEnvironment.detect() and "SLURM_PROCID" in os.environ:
        found = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    else:
        return None
    return found if found[1] > 1 else None


def launched_rank() -> int:
    """Return this process' rank as its launcher states it, without a process group."""
    started = _rank_and_size()
    return int(os.environ.get("LOCAL_RANK", 0)) if started is None else started[0]


def is_rank_zero() -> bool:
    """Return whether this process creates the run's folder and prints for all."""
    return launched_rank() == 0


def broadcast_from_rank_zero(name: str, decide: Callable[[], Any]) -> Any:
    """Return rank zero's decision in all processes that were started alike.

    Only rank zero calls ``decide``. Where the processes were not started alike, each decides for itself.

    Args:
        name: of the decision, which every process must make exactly once.
        decide: returns a value that JSON can represent.

    Raises:
        ValueError: in the other processes, with the message of what ``decide`` raised in rank zero.
    """
    started = _rank_and_size()
    if started is None:
        return decide()
    store = _store(*started)
    if started[0] == 0:
        try:
            decided = decide()
        except Exception as error:
            store.set(name, json.dumps({"error": str(error)}))
            raise
        store.set(name, json.dumps({"decided": decided}))
        return decided
    answer = json.loads(store.get(name))
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["decided"]


@functools.cache
def _store(rank: int, processes: int) -> torch.distributed.Store:
    """Return the store at the address where the processes meet again to train."""
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
