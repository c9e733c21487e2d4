"""The tensors of one step: parameters that have a gradient, with gradient and state, as lists of the same order."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ars2.orthogonalize import MAX_NUMEL_ON_CPU
from ars2.updates import Number, Tensors, stack_shape

# Elements of a part of a batch: with seven float32 tensors each, as on the way to the adversarial point, 7 MB.
_CHUNK_NUMEL = 1 << 18
# Of a piece of a single tensor.
_FLAT_CHUNK_NUMEL = _CHUNK_NUMEL
# Of either on other devices, where all that counts is how much a step holds: 256 MB a tensor.
_CHUNK_NUMEL_ELSEWHERE = 1 << 26
# Of a part whose matrices are orthogonalised: as many as one Newton-Schulz batch holds.
_MATRIX_CHUNK_NUMEL = MAX_NUMEL_ON_CPU


class Batch(NamedTuple):
    """The parameters of one group that have a gradient, with what belongs to them, as lists of the same order.

    Of sharded parameters it is the rows that this process holds; ``sources`` are the parameters themselves.
    ``gradient_count`` is the number of gradients that each has had; ``None`` if that is on the device, one a parameter.
    """

    params: list[Tensor]
    grads: Tensors
    states: list[dict[str, Tensor]]
    sources: list[Tensor]
    gradient_count: int | None = 0

    @property
    def step(self) -> Number:
        """How many gradients the second moments hold: a number, or a tensor (parameters,) on the device."""
        return torch.stack(self.state("step")) if self.gradient_count is None else self.gradient_count

    @property
    def shapes(self) -> list[torch.Size]:
        """The shapes of the whole parameters."""
        return [source.shape for source in self.sources]

    def state(self, key: str) -> list[Tensor]:
        return [state[key] for state in self.states]

    def chunks(self) -> "Iterator[Batch]":
        """Yield runs of it, on the CPU short ones.

        What works tensor by tensor then finds in the processor's cache what it wrote there before, and holds less.
        """
        return self._split(_CHUNK_NUMEL, _CHUNK_NUMEL_ELSEWHERE)

    def flat_chunks(self) -> "Iterator[Batch]":
        """Yield it cut into flat views, if it is one large contiguous tensor; otherwise it is one whole.

        What has no need of the whole tensor then holds no temporary tensors of its size.
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
        """Yield parts of it on the CPU whose matrices, read with ``flatten``, are of nearly one shape or small.

        A step's temporary tensors are then not as large as all matrices, and the memory of one part serves the next.
        On other devices it is one whole.
        """
        if sum(param.numel() for param in self.params if param.device.type == "cpu") <= _MATRIX_CHUNK_NUMEL:
            return self._split(_MATRIX_CHUNK_NUMEL)

        def sides(index: int) -> tuple[int, int]:
            _, rows, columns = stack_shape(self.sources[index].shape, flatten)
            return min(rows, columns), max(rows, columns)

        order = sorted(range(len(self.params)), key=sides, reverse=True)
        return self.subset(order, self.gradient_count)._split(_MATRIX_CHUNK_NUMEL)

    def subset(self, indices: Sequence[int], count: int | None) -> "Batch":
        """Return the batch of the parameters with these indices, all of which have had ``count`` gradients."""
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
    """Yield the lists cut into flat views, if each is one large contiguous tensor; otherwise as they are."""
    singles = [tensors[0] for tensors in lists if len(tensors) == 1]
    most = _FLAT_CHUNK_NUMEL if all(t.device.type == "cpu" for t in singles) else _CHUNK_NUMEL_ELSEWHERE
    if len(singles) < len(lists) or not all(t.numel() > most and t.is_contiguous() for t in singles):
        yield [list(tensors) for tensors in lists]
        return
    for views in zip(*(t.view(-1).split(most) for t in singles), strict=True):
        yield [[view] for view in views]
