"""Gather the tensors of one step as lists, and split them into chunks.

Chunks are small enough to stay in cache, and bound temporary memory.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ars2.distributed import Local
from ars2.kernels import Number, Tensors
from ars2.orthogonalize import MAX_NUMEL_ON_CPU, stack_shape

# Elements in a chunk. The move to the adversarial point uses seven float32 tensors: 7 MB, which stay in cache.
_CHUNK_NUMEL = 1 << 18
# On other devices, where only the memory of a step matters: 256 MB for each float32 tensor.
_CHUNK_NUMEL_ELSEWHERE = 1 << 26
# Elements in a chunk of matrices: the size of one Newton-Schulz batch.
_MATRIX_CHUNK_NUMEL = MAX_NUMEL_ON_CPU


class Chunk(NamedTuple):
    """List parameters of one group that have a gradient, with their state.

    All lists have the same order. For sharded parameters they contain the local rows. A chunk of one large tensor may
    contain flat views of a part of it.

    ``state`` has the state tensors by name; ``remainder`` is ``None`` for parameters that are not in half precision.
    ``counts`` are the numbers of gradients that the parameters have had, ``sources`` the parameters themselves, and
    ``first`` is the index of the first one among the parameters of the step. For a flat part ``start`` is the index of
    its first entry.
    """

    group: dict[str, Any]
    params: list[Tensor]
    grads: Tensors
    state: dict[str, list[Tensor]]
    counts: Sequence[Number]
    sources: list[Tensor]
    first: int = 0
    start: int | None = None

    @property
    def shapes(self) -> list[torch.Size]:
        """Return the unsharded shapes of the parameters."""
        return [source.shape for source in self.sources]

    @property
    def adam_arguments(self) -> tuple[Any, ...]:
        """Return the arguments of :func:`ars2.kernels.adam_directions`."""
        state, group = self.state, self.group
        return self.grads, state["exp_avg"], state["exp_avg_sq"], group["betas"], tuple(self.counts), group["eps"]

    def subset(self, indices: Sequence[int], first: int | None = None) -> "Chunk":
        """Return the chunk of these indices; ``first`` is the index of the first one."""
        return self._replace(
            params=[self.params[i] for i in indices],
            grads=[self.grads[i] for i in indices],
            state={name: [tensors[i] for i in indices] for name, tensors in self.state.items()},
            counts=[self.counts[i] for i in indices],
            sources=[self.sources[i] for i in indices],
            first=self.first if first is None else first,
        )

    def split(self) -> "Iterator[list[Chunk]]":
        """Yield chunks of several small tensors, and of parts of each large tensor.

        The parts of one tensor come together in a list; other lists have one chunk. Elementwise work on flat views
        needs no temporary tensors of the full size.
        """
        for chunk in self._by_numel(_CHUNK_NUMEL, _CHUNK_NUMEL_ELSEWHERE):
            yield list(chunk._flat_parts()) if len(chunk.params) == 1 else [chunk]

    def split_matrices(self, flatten: bool) -> "Iterator[Chunk]":
        """Yield chunks of matrices of similar shapes, where they are on the CPU.

        Matrices are read with ``flatten``. Each chunk reuses the memory of the one before. On other devices there is
        one chunk.
        """

        def sides(index: int) -> tuple[int, int]:
            _, rows, columns = stack_shape(self.sources[index].shape, flatten)
            return min(rows, columns), max(rows, columns)

        if sum(param.numel() for param in self.params if param.device.type == "cpu") <= _MATRIX_CHUNK_NUMEL:
            return iter([self])
        order = sorted(range(len(self.params)), key=sides, reverse=True)
        return self.subset(order)._by_numel(_MATRIX_CHUNK_NUMEL)

    def _by_numel(self, most: int, most_elsewhere: float = math.inf) -> "Iterator[Chunk]":
        start = numel = 0
        for index, param in enumerate(self.params):
            if numel and numel + param.numel() > (most if param.device.type == "cpu" else most_elsewhere):
                yield self.subset(range(start, index), self.first + start)
                start, numel = index, 0
            numel += param.numel()
        if self.params:
            yield self if not start else self.subset(range(start, len(self.params)), self.first + start)

    def _flat_parts(self) -> "Iterator[Chunk]":
        tensors = [self.params[0], self.grads[0], *(tensors[0] for tensors in self.state.values())]
        tensors = [tensor for tensor in tensors if tensor is not None]
        most = _CHUNK_NUMEL if tensors[0].device.type == "cpu" else _CHUNK_NUMEL_ELSEWHERE
        if tensors[0].numel() <= most or not all(tensor.is_contiguous() for tensor in tensors):
            yield self
            return
        for start in range(0, tensors[0].numel(), most):

            def part(tensor: Tensor, start: int = start) -> Tensor:
                return tensor if tensor is None else tensor.view(-1)[start : start + most]

            state = {name: [part(tensors[0])] for name, tensors in self.state.items()}
            yield self._replace(params=[part(self.params[0])], grads=[part(self.grads[0])], state=state, start=start)


def sums_of(chunks: Sequence[Chunk], kernel: Callable[[Chunk], Tensor], layout: Local) -> Tensor:
    """Return sums over the entries of each tensor, a tensor (sums, tensors).

    ``kernel`` returns the sums of one chunk. Sums of several chunks of a tensor are added, and those of all processes.
    """
    if len(chunks) == 1:
        total = kernel(chunks[0])
    else:
        first = chunks[0].first
        partial = [kernel(chunk) for chunk in chunks]
        total = partial[0].new_zeros(len(partial[0]), chunks[-1].first + len(chunks[-1].params) - first)
        for chunk, sums in zip(chunks, partial, strict=True):
            total[:, chunk.first - first : chunk.first - first + len(chunk.params)] += sums
    layout.reduce_(total)
    return total


def with_sums(
    rounds: Iterable[Sequence[Chunk]], kernel: Callable[[Chunk], Tensor], layout: Local
) -> Iterator[tuple[Chunk, Tensor]]:
    """Yield each chunk with the sums of its tensors, see :func:`sums_of`.

    Chunks of one round are reduced together, before the first of them is yielded.
    """
    for chunks in rounds:
        total = sums_of(chunks, kernel, layout)
        for chunk in chunks:
            start = chunk.first - chunks[0].first
            yield chunk, total[:, start : start + len(chunk.params)]
