"""Describe which process has which rows, and exchange what a step needs.

A step works on local tensors in two phases: sums over the entries of each tensor, which the layout reduces, then the
work that depends on them. The layouts are one process (:class:`Local`), processes with replicas (DDP,
:class:`Replicated`), and processes that have some rows of each parameter (FSDP2's fully_shard, :class:`Sharded`). In
the latter two each matrix is orthogonalised by one rank. Nothing here synchronises with the host.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ars2 import kernels
from ars2.kernels import Tensors

Shapes = Sequence[torch.Size]
Orthogonalize = Callable[[list[Tensor]], Sequence[Tensor]]


class Local:
    """Describe a process that has all parameters and shares them with none."""

    def reduce_(self, sums: Tensor) -> None:
        """Add up sums over local entries, in place, so that they are over all entries."""

    def agree_(self, numbers: Tensor) -> None:
        """Make numbers that all processes compute equal on them, bit for bit."""

    def norms(self, tensors: Tensors) -> list[Tensor]:
        """Return the Frobenius norms of complete tensors, from the local ones."""
        return list(torch._foreach_norm(tensors))

    def orthogonalize(
        self, directions: Tensors, shapes: Shapes, stacked: Shapes, orthogonalize: Orthogonalize, dtype: torch.dtype
    ) -> list[Tensor]:
        """Return the orthogonal factor of each direction, in its shape.

        Args:
            directions: local tensors.
            shapes: of the complete tensors.
            stacked: these shapes as (matrices, rows, cols).
            orthogonalize: maps a list of stacks to their orthogonal factors.
            dtype: of these factors.
        """
        stacks = [d.reshape(shape) for d, shape in zip(directions, stacked, strict=True)]
        return [f.reshape(d.shape) for f, d in zip(orthogonalize(stacks), directions, strict=True)]


class Replicated(Local):
    """Describe processes with replicas of all parameters, as under DDP.

    Args:
        group: of the processes.
        dtype: in which orthogonal factors are gathered; ``None`` is theirs.
    """

    def __init__(self, group: dist.ProcessGroup, dtype: torch.dtype | None = None) -> None:
        self.group, self.dtype = group, dtype

    def agree_(self, numbers: Tensor) -> None:
        # Kernels may round differently on each rank. All ranks must agree, or the next collective deadlocks.
        dist.broadcast(numbers, group=self.group, group_src=0)

    def orthogonalize(
        self, directions: Tensors, shapes: Shapes, stacked: Shapes, orthogonalize: Orthogonalize, dtype: torch.dtype
    ) -> list[Tensor]:
        # One all-gather. The results are identical on all ranks, bit for bit.
        ranks, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        owned = assign_to_ranks([newton_schulz_cost(*shape) for shape in stacked], ranks)
        factors = orthogonalize([directions[i].reshape(stacked[i]) for i in owned[rank]])
        numels = [sum(directions[i].numel() for i in indices) for indices in owned]
        # gloo gathers only tensors of equal length.
        sent = torch.zeros(max(numels), dtype=self.dtype or dtype, device=directions[0].device)
        if owned[rank]:
            torch.cat([factor.flatten().to(sent.dtype) for factor in factors], out=sent[: numels[rank]])
        received = [torch.empty_like(sent) for _ in range(ranks)]
        dist.all_gather(received, sent, group=self.group)
        results = list(directions)
        for indices, part, numel in zip(owned, received, numels, strict=True):
            for i, factor in zip(indices, part[:numel].split([directions[i].numel() for i in indices]), strict=True):
                results[i] = factor.view(directions[i].shape)
        return results


class Sharded(Local):
    """Describe processes with some rows of each parameter, as under fully_shard.

    The rows are split as by torch.chunk, so the last ranks may have fewer rows, or none.

    Args:
        group: of the processes. With a mesh of replicas and shards, those of one replica.
        dtype: in which matrices go to their owners and back; ``None`` is theirs and that of their factors.
    """

    def __init__(self, group: dist.ProcessGroup, dtype: torch.dtype | None = None) -> None:
        self.group, self.dtype = group, dtype

    def numels(self, shape: Sequence[int]) -> list[int]:
        """Return each rank's number of entries in a tensor of ``shape``."""
        ranks = dist.get_world_size(self.group)
        most, width = -(-shape[0] // ranks), torch.Size(shape[1:]).numel()
        return [max(0, min(most, shape[0] - rank * most)) * width for rank in range(ranks)]

    def reduce_(self, sums: Tensor) -> None:
        dist.all_reduce(sums, group=self.group)

    def norms(self, tensors: Tensors) -> list[Tensor]:
        squares = kernels.norms(tensors).square()
        self.reduce_(squares)
        return list(squares.sqrt().to(tensors[0].dtype).unbind())

    def orthogonalize(
        self, directions: Tensors, shapes: Shapes, stacked: Shapes, orthogonalize: Orthogonalize, dtype: torch.dtype
    ) -> list[Tensor]:
        # Two all-to-alls: the rows go to the owner of the matrix, and the rows of the factor come back.
        ranks, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        numels = [self.numels(shape) for shape in shapes]
        owned = assign_to_ranks([newton_schulz_cost(*shape) for shape in stacked], ranks)
        order = [i for indices in owned for i in indices]
        to_owners = [sum(directions[i].numel() for i in indices) for indices in owned]
        from_ranks = [sum(numels[i][r] for i in owned[rank]) for r in range(ranks)]
        sent = torch.cat([directions[i].flatten() for i in order])
        sent = sent.to(self.dtype or sent.dtype)
        received = sent.new_empty(sum(from_ranks))
        dist.all_to_all_single(received, sent, from_ranks, to_owners, group=self.group)
        # The entries from one rank are its rows of all tensors owned here, concatenated.
        by_rank = [part.split([numels[i][r] for i in owned[rank]]) for r, part in enumerate(received.split(from_ranks))]
        by_tensor = zip(owned[rank], zip(*by_rank, strict=True), strict=True) if owned[rank] else ()
        complete = [torch.cat(rows).view(stacked[i]) for i, rows in by_tensor]
        factors = [f.flatten().split(numels[i]) for i, f in zip(owned[rank], orthogonalize(complete), strict=True)]
        returned = torch.empty(sent.numel(), dtype=self.dtype or dtype, device=sent.device)
        back = [returned[:0], *(factor[r].to(returned.dtype) for r in range(ranks) for factor in factors)]
        dist.all_to_all_single(returned, torch.cat(back), to_owners, from_ranks, group=self.group)
        results = list(directions)
        for i, part in zip(order, returned.split([directions[i].numel() for i in order]), strict=True):
            results[i] = part.view(directions[i].shape)
        return results


def newton_schulz_cost(matrices: int, rows: int, cols: int) -> int:
    """Return the multiplications of one Newton-Schulz step on a stack of matrices."""
    small, large = min(rows, cols), max(rows, cols)
    return matrices * small * small * (2 * large + small)


def assign_to_ranks(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Return the indices of the items of each rank, keeping the largest load small.

    The most expensive item left goes to the rank with the smallest load (Graham 1969, at most a third above the
    optimum). All ranks get the same assignment, since it depends only on the arguments.
    """
    loads = [0] * ranks
    owned: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(ranks), key=lambda rank: (loads[rank], rank))
        owned[rank].append(index)
        loads[rank] += costs[index]
    return owned


def is_sharded(tensor: Any) -> bool:
    """Return whether ``tensor`` is a DTensor."""
    # The import takes seconds, and a DTensor exists only after it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the local rows of a DTensor (same memory), or another tensor unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def like(param: Tensor, value: Tensor) -> Tensor:
    """Return ``value`` sharded as ``param``; ``value`` may be replicated on all ranks."""
    if not is_sharded(param) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    # Every process slices its rows; no communication.
    return distribute_tensor(value.to(param.device), mesh, placements, src_data_rank=None)


def same_layout(tensor: Any, param: Any) -> bool:
    """Return whether ``tensor`` is a DTensor with mesh and placements of ``param``."""
    return is_sharded(tensor) and (tensor.device_mesh, tensor.placements) == (param.device_mesh, param.placements)


def reshard(model: nn.Module) -> None:
    """Drop the gathered parameters that FSDP2 keeps after a forward pass without a backward pass.

    The next forward pass would use them, even if the sharded parameters have moved since.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a sharded module exists only after this import
    if fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def has_several_processes() -> bool:
    """Return whether this process is one of several in a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def find_layout(named: Iterable[tuple[str, Tensor]]) -> Local:
    """Return the layout of parameters, ``Sharded`` for DTensors and else ``Local``.

    Raises:
        ValueError: only some are sharded, over different meshes, or not by rows.
    """
    found: Sharded | None = None
    first: tuple[str, Any] | None = None
    unsharded: str | None = None
    for name, param in named:
        if not is_sharded(param):
            unsharded = unsharded or name
            continue
        mesh: Any = param.device_mesh  # type: ignore[attr-defined]
        dimension = _sharding_dimension(name, param)
        if first is None or found is None:
            first, found = (name, mesh), Sharded(mesh.get_group(dimension))
        elif mesh != first[1]:
            raise ValueError(f"parameters {first[0]} and {name} are sharded over different meshes: use one for all")
        expected = found.numels(param.shape)[dist.get_rank(found.group)]
        if local(param).numel() != expected:
            raise ValueError(
                f"parameter {name} of shape {tuple(param.shape)} has {local(param).numel()} entries on this process"
                f" where torch.chunk would put {expected}: use a layout such as that of fully_shard"
            )
    if first is not None and unsharded is not None:
        raise ValueError(
            f"parameter {first[0]} is sharded and parameter {unsharded} is not: call fully_shard on the complete"
            " network before making the optimizer"
        )
    return found or Local()


def _sharding_dimension(name: str, param: Any) -> int:
    """Return the dimension of the mesh along which ``param`` is sharded by rows."""
    from torch.distributed.tensor import Replicate, Shard

    # Not isinstance: FSDP2 gives tensor-parallel parameters a subclass of Shard with another order of rows.
    shards = [i for i, placement in enumerate(param.placements) if type(placement) is Shard and placement.dim == 0]
    others = [p for i, p in enumerate(param.placements) if i not in shards and not isinstance(p, Replicate)]
    if len(shards) != 1 or others:
        raise ValueError(
            f"parameter {name} is laid out as {param.placements}, which is not supported: shard it by its first"
            " dimension alone, as fully_shard does, with or without replicas, and without tensor parallelism"
        )
    return shards[0]
