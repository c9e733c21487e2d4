"""Distribute Newton-Schulz iterations over several processes.

One rank orthogonalises each matrix, and all ranks get the result. Under data parallelism every rank has all matrices,
so the results are gathered. Under sharding every rank has some rows of all matrices. The rows are first sent to the
owner of the matrix, and the rows of the result are sent back. Shards may be uneven or empty. Nothing here synchronises
with the host.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Orthogonalize = Callable[[list[Tensor]], Sequence[Tensor]]


class Replicas(NamedTuple):
    """Describe the processes that share the work on replicated tensors.

    Results are gathered in ``dtype``; ``None`` keeps their dtype.
    """

    group: dist.ProcessGroup
    dtype: torch.dtype | None


def newton_schulz_cost(matrices: int, rows: int, cols: int) -> int:
    """Return the multiplications of one Newton-Schulz step on a stack of matrices."""
    small, large = min(rows, cols), max(rows, cols)
    return matrices * small * small * (2 * large + small)


def assign_to_ranks(costs: Sequence[int], ranks: int) -> list[int]:
    """Return the owner of each item, keeping the largest load small.

    The most expensive item left goes to the rank with the smallest load (Graham 1969, at most a third above the
    optimum). All ranks get the same assignment, since it depends only on the arguments.
    """
    loads = [0] * ranks
    owner = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner[index] = min(range(ranks), key=lambda rank: (loads[rank], rank))
        loads[owner[index]] += costs[index]
    return owner


def orthogonalize_replicated(
    stacks: Sequence[Tensor], orthogonalize: Orthogonalize, dtype: torch.dtype, group: dist.ProcessGroup
) -> list[Tensor]:
    """Orthogonalise stacks that are replicated on every rank of ``group``.

    The results are identical on all ranks, bit for bit.

    Args:
        stacks: tensors (matrices, rows, cols), equal on all ranks.
        orthogonalize: maps a list of stacks to their orthogonal factors.
        dtype: the results are gathered in this dtype and rounded to it if it is narrower.
        group: of the ranks that share the work. One all-gather.

    Returns:
        One tensor of ``dtype`` for each stack, with its shape.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    owner = assign_to_ranks([newton_schulz_cost(*stack.shape) for stack in stacks], ranks)
    local = [index for index, one in enumerate(owner) if one == rank]
    lengths = [sum(stacks[i].numel() for i, one in enumerate(owner) if one == r) for r in range(ranks)]
    # gloo gathers only tensors of equal length.
    sent = torch.zeros(max(lengths), dtype=dtype, device=stacks[0].device)
    done = orthogonalize([stacks[index] for index in local])
    if local:
        torch.cat([factor.flatten().to(dtype) for factor in done], out=sent[: lengths[rank]])
    received = [torch.empty_like(sent) for _ in range(ranks)]
    dist.all_gather(received, sent, group=group)
    results = list(stacks)
    for r in range(ranks):
        owned = [index for index, one in enumerate(owner) if one == r]
        parts = received[r][: lengths[r]].split([stacks[index].numel() for index in owned])
        for index, part in zip(owned, parts, strict=True):
            results[index] = part.view(stacks[index].shape)
    return results


def orthogonalize_sharded(
    shards: Sequence[Tensor],
    shapes: Sequence[torch.Size],
    numels: Sequence[Sequence[int]],
    orthogonalize: Orthogonalize,
    dtype: torch.dtype,
    group: dist.ProcessGroup,
) -> list[Tensor]:
    """Orthogonalise tensors of which every rank of ``group`` has a flat chunk.

    Args:
        shards: this rank's chunk of each tensor, contiguous, possibly empty.
        shapes: of the full tensors, as (matrices, rows, cols).
        numels: for each tensor the number of entries on every rank. In the order of ranks the chunks form the tensor.
        orthogonalize: maps a list of full stacks to their orthogonal factors.
        dtype: the results are sent back in this dtype.
        group: of the ranks among which the tensors are sharded. Two all-to-alls.

    Returns:
        This rank's chunk of each result, a flat tensor of ``dtype``.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    owner = assign_to_ranks([newton_schulz_cost(*shape) for shape in shapes], ranks)
    by_owner = [[index for index, one in enumerate(owner) if one == r] for r in range(ranks)]
    order = [index for owned in by_owner for index in owned]
    to_owners = [sum(shards[index].numel() for index in owned) for owned in by_owner]
    from_ranks = [sum(numels[index][r] for index in by_owner[rank]) for r in range(ranks)]
    sent = torch.cat([shards[index].flatten() for index in order])
    received = sent.new_empty(sum(from_ranks))
    dist.all_to_all_single(received, sent, from_ranks, to_owners, group=group)
    # The entries from one rank are its chunks of all tensors owned here, concatenated.
    chunks = [
        part.split([numels[index][r] for index in by_owner[rank]]) for r, part in enumerate(received.split(from_ranks))
    ]
    full = [torch.cat([chunks[r][i] for r in range(ranks)]).view(shapes[t]) for i, t in enumerate(by_owner[rank])]
    factors = [
        factor.flatten().to(dtype).split(list(numels[t]))
        for t, factor in zip(by_owner[rank], orthogonalize(full), strict=True)
    ]
    empty = sent.new_empty(0, dtype=dtype)
    back = torch.cat([empty, *(factor[r] for r in range(ranks) for factor in factors)])
    returned = torch.empty(sent.numel(), dtype=dtype, device=sent.device)
    dist.all_to_all_single(returned, back, to_owners, from_ranks, group=group)
    results = [empty] * len(shards)
    for index, part in zip(order, returned.split([shards[index].numel() for index in order]), strict=True):
        results[index] = part
    return results
