"""Orthogonalise matrices by Newton-Schulz iterations, in batches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ars2 import newton_schulz
from ars2.newton_schulz import ALGORITHMS, HALF, Schedule

# Largest number of elements in a batch. On the CPU larger batches are not faster, since they leave the cache.
MAX_NUMEL_ON_CPU = 1 << 20
_MAX_NUMEL_ELSEWHERE = 1 << 26
# Norms below this are inexact or zero in float32, which rounds squares below 1e-45 to zero. As the least divisor it
# bounds the quotients of such entries.
LEAST_NORM = 1e-19
# Sides in this range are padded to a multiple of the tile, so that nearly equal shapes share a batch.
_TILE, _PADDED_SIDES = 32, range(97, 257)


def orthogonalize(
    x: Tensor,
    steps: int = 5,
    coefficients: Schedule = "jordan",
    dtype: torch.dtype = torch.bfloat16,
    algorithm: str = "auto",
) -> Tensor:
    """Return ``x`` with its singular values moved towards 1.

    Singular vectors stay the same. Each matrix is divided by its Frobenius norm, so its scale does not matter. Then
    ``X <- a X + (b A + c A A) X`` with ``A = X X^T`` is applied ``steps`` times on the side with fewer rows. With
    ``"jordan"``, five steps leave the singular values of a well-conditioned matrix between about 0.7 and 1.2. With
    ``"polar_express"`` they tend to 1.

    Args:
        x: a matrix (rows, cols) or a stack (..., rows, cols), of which every matrix is orthogonalised separately.
        steps: number of iterations, at least 1.
        coefficients: ``"jordan"``, ``"polar_express"``, or one (a, b, c) for each iteration, of which the last repeats.
        dtype: the dtype of the result and of the products with ``x``. ``"auto"`` multiplies in a wider one where that
            is faster.
        algorithm: ``"standard"``; ``"gram"``, the same iteration on the Gram matrix, for elongated matrices; or
            ``"auto"``, the faster one for the shape by measurement. See :mod:`ars2.newton_schulz`.

    Returns:
        A tensor of ``x``'s shape and of ``dtype``. Gradients flow through it.

    Raises:
        ValueError: fewer than two dimensions, entries that are not real floating-point numbers, ``steps`` below 1, or
            unknown ``coefficients`` or ``algorithm``.
    """
    if x.ndim < 2:
        raise ValueError(f"orthogonalize needs a matrix or a stack of matrices, got a tensor of shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"orthogonalize needs real floating-point entries, got a tensor of {x.dtype}")
    if not dtype.is_floating_point:
        raise ValueError(f"orthogonalize: dtype must be a floating-point one, got {dtype}")
    if steps < 1:
        raise ValueError(f"orthogonalize: steps must be at least 1, got {steps}")
    coefficients = newton_schulz.checked(coefficients, "orthogonalize: coefficients")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"orthogonalize: algorithm must be one of {sorted(ALGORITHMS)}, got {algorithm!r}")
    stack = x.reshape(x.shape[:-2].numel(), *x.shape[-2:])
    (result,) = orthogonalize_all([stack], steps, coefficients, dtype, algorithm=algorithm)
    return result.reshape(x.shape)


def orthogonalize_all(
    stacks: Sequence[Tensor],
    steps: int,
    coefficients: Schedule,
    dtype: torch.dtype,
    max_numel: int | None = None,
    algorithm: str = "auto",
    overwrite: bool = False,
    in_range: bool = False,
) -> list[Tensor]:
    """Orthogonalise many stacks, batching matrices of one shape or its transpose.

    Nearly equal shapes share a batch too, padded with zeros. The padding stays zero and is removed from the result.

    Args:
        stacks: tensors (matrices, rows, cols) of any shapes.
        steps, coefficients, dtype, algorithm: as for :func:`orthogonalize`.
        max_numel: largest number of elements in a batch, which bounds the memory of copies. A larger tensor forms a
            separate batch. ``None`` is 2^20 on the CPU and 2^26 elsewhere.
        overwrite: whether ``stacks`` may be overwritten.
        in_range: whether no square of an entry that matters leaves the range of float32, which saves time.

    Returns:
        One tensor of ``dtype`` for each input, with the same shape and in the same order.
    """
    wide = [stack if stack.shape[1] <= stack.shape[2] else stack.mT for stack in stacks]
    results: list[Tensor] = list(stacks)
    for members in _batches(wide, max_numel):
        batch = _joined([wide[i] for i in members])
        if batch.numel():
            may_overwrite = overwrite or batch is not wide[members[0]]
            batch = _orthogonalize_wide(batch, steps, coefficients, dtype, algorithm, may_overwrite, in_range)
        for i, part in zip(members, batch.to(dtype).split([len(wide[i]) for i in members]), strict=True):
            if part.shape != wide[i].shape:
                part = part[:, : wide[i].shape[1], : wide[i].shape[2]]
            results[i] = part if wide[i] is stacks[i] else part.mT
    return results


def stack_shape(shape: torch.Size, flatten: bool) -> torch.Size:
    """Return the shape (matrices, rows, cols) in which a tensor is orthogonalised.

    A 2-D tensor is one matrix. A 3-D tensor is a stack (heads, rows, cols), or with ``flatten`` the matrix (out, in*k).
    Tensors with more dimensions are matrices (out, rest). Without ``flatten`` their leading dimensions (1, 1) are left
    out first.
    """
    while not flatten and len(shape) > 3 and shape[:2] == (1, 1):
        shape = shape[2:]
    if len(shape) == 3 and not flatten:
        return shape
    return torch.Size((1, shape[0], shape[1:].numel()))


def _orthogonalize_wide(
    stack: Tensor,
    steps: int,
    coefficients: Schedule,
    dtype: torch.dtype,
    algorithm: str,
    overwrite: bool,
    in_range: bool,
) -> Tensor:
    if stack.dtype in HALF:
        stack, overwrite = stack.float(), True
    if not in_range:
        # The squares of very small or large entries would leave the range of float32, so the largest entry becomes 1
        # first. The result does not depend on this scale, so no gradient needs to flow through.
        given = stack.detach()
        largest = torch.maximum(given.amax((1, 2), keepdim=True), -given.amin((1, 2), keepdim=True))
        largest = largest.clamp_min(torch.finfo(largest.dtype).tiny)
        stack = stack.div_(largest) if overwrite and not stack.requires_grad else stack / largest
        overwrite = True
    # The iteration diverges above norm 1. Directions in range that are shorter than 1e-15 are too small to matter.
    norm = torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True).clamp_min(1e-15)
    if coefficients == "polar_express":
        norm = norm * newton_schulz.POLAR_EXPRESS_MARGIN
    stack = stack.div_(norm) if overwrite and not stack.requires_grad else stack / norm
    iterations = newton_schulz.schedule(coefficients, steps)
    algorithm, products = newton_schulz.choose(algorithm, stack.shape[1], stack.shape[2], dtype, stack.device)
    if algorithm == "gram":
        return newton_schulz.gram(stack, iterations, dtype)
    return newton_schulz.standard(stack.to(products), iterations)


def _batches(stacks: Sequence[Tensor], max_numel: int | None) -> list[list[int]]:
    """Return the indices of the wide stacks that share each batch."""
    batches: list[list[int]] = []
    open_batches: dict[object, tuple[list[int], int]] = {}
    for index, stack in enumerate(stacks):
        shape = (len(stack), *_padded(stack))
        key, numel = (shape[1:], stack.device, stack.dtype), shape[0] * shape[1] * shape[2]
        most = max_numel or (MAX_NUMEL_ON_CPU if stack.device.type == "cpu" else _MAX_NUMEL_ELSEWHERE)
        members, size = open_batches.get(key, ([], 0))
        if not members or size + numel > most:
            members, size = [], 0
            batches.append(members)
        members.append(index)
        open_batches[key] = members, size + numel
    return batches


def _joined(stacks: list[Tensor]) -> Tensor:
    """Return the stacks as one, padded with zeros to one shape if their shapes differ."""
    if len(stacks) == 1:
        return stacks[0]
    if all(stack.shape[1:] == stacks[0].shape[1:] for stack in stacks):
        return torch.cat(stacks)
    rows, columns = (max(stack.shape[side] for stack in stacks) for side in (1, 2))
    return torch.cat([torch.nn.functional.pad(s, (0, columns - s.shape[2], 0, rows - s.shape[1])) for s in stacks])


def _padded(stack: Tensor) -> tuple[int, int]:
    rows, columns = (-(-side // _TILE) * _TILE if side in _PADDED_SIDES else side for side in stack.shape[1:])
    return rows, columns
