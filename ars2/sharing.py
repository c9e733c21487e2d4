"""Newton-Schulz over several processes: every matrix is orthogonalised by one of them, and each gets the results.

Under data parallelism every process holds every matrix, so each takes its share and the results are gathered. Under
sharding every process holds some rows of every matrix, so they are first brought together at the matrix' owner, and
the rows of the result go back; shards may be uneven or empty. Nothing here synchronises with the host.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Orthogonalize = Callable[[list[Tensor]], Sequence[Tensor]]


class Replicas(NamedTuple):
    """The processes that share the work, and the dtype that results are gathered in (``None``: their own)."""

    group: dist.ProcessGroup
    dtype: torch.dtype | None


def newton_schulz_cost(matrices: int, rows: int, cols: int) -> int:
    """Return the multiplications of one Newton-Schulz step on a stack of matrices."""
    small, large = min(rows, cols), max(rows, cols)
    return matrices * small * small * (2 * large + small)


def assign_to_ranks(costs: Sequence[int], ranks: int) -> list[int]:
    """Return the rank that takes each piece of work, so that the greatest sum of costs is small.

    The most costly piece left goes to the rank with the least so far (Graham 1969: at most a third above the best
    there is). The same on every rank, since it depends on the arguments alone.
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
    """Orthogonalise stacks that every rank of ``group`` holds; the results are the same to the bit on every rank.

    Args:
        stacks: tensors (matrices, rows, cols), equal on all ranks.
        orthogonalize: maps a list of stacks to their orthogonal factors.
        dtype: that the results are gathered in; if narrower than that of the factors, they are rounded to it.
        group: of the ranks that share the work; one all-gather.

    Returns:
        One tensor of ``dtype`` for each stack, of its shape.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    owner = assign_to_ranks([newton_schulz_cost(*stack.shape) for stack in stacks], ranks)
    mine = [index for index, one in enumerate(owner) if one == rank]
    lengths = [sum(stacks[i].numel() for i, one in enumerate(owner) if one == r) for r in range(ranks)]
    # Gathered parts must be of one length; gloo takes no other.
    sent = torch.zeros(max(lengths), dtype=dtype, device=stacks[0].device)
    done = orthogonalize([stacks[index] for index in mine])
    if mine:
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
    """Orthogonalise tensors of which every rank of ``group`` holds a run of entries; returns this rank's runs.

    Args:
        shards: this rank's part of each tensor, contiguous; empty where it has none.
        shapes: of the whole tensors, as (matrices, rows, cols).
        numels: for each tensor, how many entries every rank holds; in the order of ranks they make up the tensor.
        orthogonalize: maps a list of whole stacks to their orthogonal factors.
        dtype: that the results are sent back in.
        group: of the ranks among which the tensors are sharded; two all-to-alls.

    Returns:
        One flat tensor of ``dtype`` for each shard, with as many entries.
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
    # What came from one rank holds its runs of all tensors owned here, one after the other.
    runs = [
        part.split([numels[index][r] for index in by_owner[rank]]) for r, part in enumerate(received.split(from_ranks))
    ]
    whole = [torch.cat([runs[r][i] for r in range(ranks)]).view(shapes[t]) for i, t in enumerate(by_owner[rank])]
    factors = [
        factor.flatten().to(dtype).split(list(numels[t]))
        for t, factor in zip(by_owner[rank], orthogonalize(whole), strict=True)
    ]
    empty = sent.new_empty(0, dtype=dtype)
    back = torch.cat([empty, *(factor[r] for r in range(ranks) for factor in factors)])
    returned = torch.empty(sent.numel(), dtype=dtype, device=sent.device)
    dist.all_to_all_single(returned, back, to_owners, from_ranks, group=group)
    results = [empty] * len(shards)
    for index, part in zip(order, returned.split([shards[index].numel() for index in order]), strict=True):
        results[index] = part
    return results
