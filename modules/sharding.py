"""Shard a network's parameters over processes with FSDP2."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from experiment.library_internals import NormBase


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of a network.

    They are the members of its outermost ModuleList and Sequential modules.
    """
    for child in network.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            yield from (member for member in child if any(True for _ in member.parameters()))
        else:
            yield from blocks(child)


def shard(module: nn.Module, methods: Sequence[str], mesh: Any) -> None:
    """Shard the parameters of ``module`` over the processes of ``mesh``, in place.

    A second call does nothing. Each block is gathered when it runs. Parameters outside of blocks are gathered while one
    of ``methods`` runs. Parameters and their gradients become DTensors.

    Args:
        module: all its parameters are trained.
        methods: names of the methods of ``module`` that use its parameters.
        mesh: of the strategy, with dimensions ``data_parallel`` and ``tensor_parallel``.

    Raises:
        ValueError: the mesh is tensor-parallel, or a BatchNorm would see only the examples of its process.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    if isinstance(module, FSDPModule):
        return
    if mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            "tensor parallelism is not supported: set the strategy's data_parallel_size to the number of processes and"
            " its tensor_parallel_size to 1"
        )
    if any(isinstance(part, NormBase) and part.track_running_stats for part in module.modules()):
        raise ValueError(
            "a network with BatchNorm cannot be sharded: every process would normalise by its part of the batch:"
            " use strategy ddp with sync_batchnorm"
        )
    for part in (*blocks(module), module):
        fully_shard(part, mesh=mesh["data_parallel"])
    for method in methods:
        register_fsdp_forward_method(module, method)
