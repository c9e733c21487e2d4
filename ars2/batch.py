"""Gather the tensors of one step as lists, and split them into chunks."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ars2.orthogonalize import MAX_NUMEL_ON_CPU
from ars2.updates import Number, Tensors, stack_shape

# Elements in a chunk. The move to the adversarial point uses seven float32 tensors: 7 MB, which stay in cache.
_CHUNK_NUMEL = 1 << 18
# Elements in a flat view of one tensor.
_FLAT_CHUNK_NUMEL = _CHUNK_NUMEL
# Both on other devices, where only the memory of a step matters: 256 MB for each float32 tensor.
_CHUNK_NUMEL_ELSEWHERE = 1 << 26
# Elements in a chunk of matrices: the size of one Newton-Schulz batch.
_MATRIX_CHUNK_NUMEL = MAX_NUMEL_ON_CPU


class Batch(NamedTuple):
    """List the parameters of one group that have a gradient, with their state.

    All lists have the same order. For sharded parameters they contain the local rows; ``sources`` are the parameters
    themselves. ``gradient_count`` is the number of gradients that each parameter has had. It is ``None`` where these
    counts are tensors on the device, one for each parameter.
    """

    params: list[Tensor]
    grads: Tensors
    states: list[dict[str, Tensor]]
    sources: list[Tensor]
    gradient_count: int | None = 0

    @property
    def step(self) -> Number:
        """Return the number of gradients in the second moments, or a tensor of counts."""
        return torch.stack(self.state("step")) if self.gradient_count is None else self.gradient_count

    @property
    def shapes(self) -> list[torch.Size]:
        """Return the unsharded shapes of the parameters."""
        return [source.shape for source in self.sources]

    def state(self, key: str) -> list[Tensor]:
        return [state[key] for state in self.states]

    def chunks(self) -> "Iterator[Batch]":
        """Yield the batch in chunks of several tensors.

        Chunks small enough to stay in cache; they also bound temporary memory.
        """
        return self._split(_CHUNK_NUMEL, _CHUNK_NUMEL_ELSEWHERE)

    def flat_chunks(self) -> "Iterator[Batch]":
        """Yield one large contiguous tensor in flat views, and any other batch as it is.

        Elementwise work on flat views needs no temporary tensors of the full size.
        """
        if len(self.params) != 1:
            yield self
            return
        keys = [key for key in self.states[0] if key != "step"]
        for params, grads, *states in split_flat(self.params, self.grads, *map(self.state, keys)):
            (state,) = zip(*states, strict=True)
            piece = {**self.states[0], **dict(zip(keys, state, strict=True))}
            yield Batch(params, grads, [piece], self.sources, self.gradient_count)

    def matrix_chunks(self, flatten: bool) -> "Iterator[Batch]":
        """Yield chunks of matrices of similar shapes, where the batch is on the CPU.

        Matrices are read with ``flatten``. Chunks bound the temporary memory of a step, and each reuses the memory of
        the one before. On other devices the batch stays in one chunk.
        """
        if sum(param.numel() for param in self.params if param.device.type == "cpu") <= _MATRIX_CHUNK_NUMEL:
            return self._split(_MATRIX_CHUNK_NUMEL)

        def sides(index: int) -> tuple[int, int]:
            _, rows, columns = stack_shape(self.sources[index].shape, flatten)
            return min(rows, columns), max(rows, columns)

        order = sorted(range(len(self.params)), key=sides, reverse=True)
        return self.subset(order, self.gradient_count)._split(_MATRIX_CHUNK_NUMEL)

    def subset(self, indices: Sequence[int], count: int | None) -> "Batch":
        """Return the batch of these indices, which share the gradient count ``count``."""
        return Batch(
            [self.params[i] for i in indices],
            [self.grads[i] for i in indices],
            [self.states[i] for i in indices],
            [self.sources[i] for i in indices],
            count,
        )

    def _split(self, most: int, most_elsewhere: float = math.inf) -> "Iterator[Batch]":
        start = held = 0
        for index, param in enumerate(self.params):
            if held and held + param.numel() > (most if param.device.type == "cpu" else most_elsewhere):
                yield self._slice(slice(start, index))
                start, held = index, 0
            held += param.numel()
        if self.params:
            yield self._slice(slice(start, None))

    def _slice(self, part: slice) -> "Batch":
        return Batch(self.params[part], self.grads[part], self.states[part], self.sources[part], self.gradient_count)


def split_flat(*lists: Tensors) -> Iterator[list[list[Tensor]]]:
    """Yield the lists in flat views, if each is one large contiguous tensor.

    Other lists are yielded once, as they are.
    """
    singles = [tensors[0] for tensors in lists if len(tensors) == 1]
    most = _FLAT_CHUNK_NUMEL if all(t.device.type == "cpu" for t in singles) else _CHUNK_NUMEL_ELSEWHERE
    if len(singles) < len(lists) or not all(t.numel() > most and t.is_contiguous() for t in singles):
        yield [list(tensors) for tensors in lists]
        return
    for views in zip(*(t.view(-1).split(most) for t in singles), strict=True):
        yield [[view] for view in views]
