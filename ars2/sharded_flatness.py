"""Apply :mod:`ars2.flatness` to sharded parameters.

Each function needs one all-reduce, for any number of groups.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from ars2 import flatness
from ars2.batch import Batch
from ars2.sharded import Shards
from ars2.updates import Tensors


class Move(NamedTuple):
    """List the local rows of a group's parameters, their offsets n, and rho."""

    params: list[Tensor]
    offsets: Tensors
    rho: float


def move_all_(moves: list[Move], shards: Shards) -> None:
    """Move all groups to the adversarial point, with one all-reduce."""
    _, lengths = shards.all_reduce_norms([], [flatness.norms(move.offsets) for move in moves])
    for move, length in zip(moves, lengths, strict=True):
        flatness.move_along_(move.params, move.offsets, length, move.rho)


def keep_shears_(batches: list[Batch], first: dict[Tensor, Tensor], shards: Shards) -> None:
    """Store the shear force of each parameter that has a first gradient.

    Args:
        batches: of all groups, with the second gradients.
        first: gradients of the first pass by parameter, at any scale.
        shards: the processes with the other rows.
    """
    found = [flatness.both_gradients(batch.sources, batch.grads, batch.states, first) for batch in batches]
    found = [lists for lists in found if lists[0]]
    products, lengths = shards.all_reduce_norms(
        [flatness.inner_products(second, firsts) for second, firsts, _ in found],
        [flatness.norms(firsts) for _, firsts, _ in found],
    )
    for (second, firsts, stored), product, length in zip(found, products, lengths, strict=True):
        shears = flatness.without_parallel(second, firsts, product, length)
        for place, shear in zip(stored, shears, strict=True):
            place.copy_(shear)


def injected(batches: list[Batch], alpha: float, shards: Shards) -> Iterator[Batch]:
    """Yield the batches with the shear forces added to their gradients."""
    lists = [tensors for batch in batches if batch.params for tensors in (batch.grads, batch.state("shear"))]
    lengths = iter(shards.all_reduce_norms([], [flatness.norms(tensors) for tensors in lists])[1])
    for batch in batches:
        if batch.params:
            scales = flatness.injection_scales(alpha, next(lengths), next(lengths))
            batch = batch._replace(grads=flatness.with_shears(batch.grads, batch.state("shear"), scales))
        yield batch
