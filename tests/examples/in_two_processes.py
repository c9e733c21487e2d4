"""Run the loops of Accelerate and Fabric as one of several processes."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from examples import accelerate_loop, fabric_loop
from tests.examples.by_hand import EPOCHS
from tests.helpers.launching import become


class ShardingAccelerator(Accelerator):
    """Shard with FSDP2 on CPUs, where Accelerate ignores the plugin and replicates."""

    def __init__(self, **options: Any) -> None:
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        super().__init__(fsdp_plugin=plugin, **options)
        assert self.distributed_type == DistributedType.MULTI_CPU
        self.state.fsdp_plugin = plugin
        AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP


def complete(param: Tensor) -> Tensor:
    return param.full_tensor() if isinstance(param, DTensor) else param.detach()


def train(loop: str, folder: Path, **options: Any) -> tuple[nn.Module, list[float]]:
    """Run a loop of the examples, here with Accelerate's replicas or shards."""
    if loop == "fabric":
        return fabric_loop.train(folder / "fabric.ckpt", EPOCHS, **options)
    AcceleratorState._reset_state()  # it keeps the precision and the kind of distribution
    accelerate_loop.Accelerator = ShardingAccelerator if loop == "fsdp2" else Accelerator
    model, losses = accelerate_loop.train(EPOCHS, **options)
    assert all(isinstance(param, DTensor) == (loop == "fsdp2") for param in model.parameters())
    return model, losses


def count_no_sync() -> list[None]:
    """Return a list that gets an item whenever DDP is about to leave out an exchange."""
    calls: list[None] = []
    no_sync = DistributedDataParallel.no_sync

    def counted(model: DistributedDataParallel) -> Any:
        calls.append(None)
        return no_sync(model)

    DistributedDataParallel.no_sync = counted
    return calls


def together(rank: int, ranks: int, port: int, folder: Path, runs: dict[str, dict[str, Any]]) -> None:
    """Run loops with options as one of several processes."""
    become(rank, ranks, port)
    # As "fabric run --devices 2 --strategy ddp" sets them.
    os.environ |= {"LT_CLI_USED": "1", "LT_ACCELERATOR": "cpu", "LT_DEVICES": str(ranks), "LT_STRATEGY": "ddp"}
    results, calls = {}, count_no_sync()
    for loop, options in runs.items():
        calls.clear()
        model, losses = train(loop, folder, **options)
        params = {name: complete(param) for name, param in model.named_parameters()}
        results[loop] = {"params": params, "losses": losses, "unexchanged": len(calls)}
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
