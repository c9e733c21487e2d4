"""Orthogonalise matrices by Newton-Schulz iterations, in batches."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ars2 import newton_schulz
from ars2.newton_schulz import ALGORITHMS, Schedule

# Largest number of elements in a batch. On the CPU larger batches are not faster, since they leave the cache.
MAX_NUMEL_ON_CPU = 1 << 20
_MAX_NUMEL_ELSEWHERE = 1 << 26
# Matrices that fill at least this part of a batch's columns and rows are padded to join it. More padding costs more
# than one batch less saves. Padded rows cost the most, and with many rows only arithmetic matters.
_LEAST_FILLED_COLUMNS, _LEAST_FILLED_ROWS, _PADDED_TO_ROWS = 0.9, 0.875, 256


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
        coefficients: ``"jordan"``, ``"polar_express"``, or (a, b, c) for each iteration, of which the last repeats.
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
    if x.numel() == 0:
        return x.to(dtype)
    stack = x.reshape(-1, *x.shape[-2:])
    tall = stack.shape[1] > stack.shape[2]
    result = _orthogonalize_wide(stack.mT if tall else stack, steps, coefficients, dtype, algorithm, overwrite=False)
    return (result.mT if tall else result).reshape(x.shape)


def _orthogonalize_wide(
    stack: Tensor, steps: int, coefficients: Schedule, dtype: torch.dtype, algorithm: str, overwrite: bool
) -> Tensor:
    if stack.dtype in (torch.bfloat16, torch.float16):
        stack, overwrite = stack.float(), True
    # The squares of very small or large entries would leave the range of float32, so the largest entry becomes 1 first.
    # A matrix of zeros is divided by 1. The result does not depend on this scale, so no gradient needs to flow through.
    largest = torch.linalg.vector_norm(stack.detach(), ord=math.inf, dim=(-2, -1), keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    stack = stack.div_(largest) if overwrite and not stack.requires_grad else stack / largest
    margin = newton_schulz.POLAR_EXPRESS_MARGIN if coefficients == "polar_express" else 1.0
    norm = torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True).clamp_min(1.0) * margin
    stack = stack / norm if stack.requires_grad else stack.div_(norm)
    steps_taken = newton_schulz.schedule(coefficients, steps)
    algorithm, products = _chosen(algorithm, stack.shape[1], stack.shape[2], dtype, stack.device)
    if algorithm == "gram":
        return newton_schulz.gram(stack, steps_taken, dtype)
    return newton_schulz.standard(stack.to(products), steps_taken).to(dtype)


def _chosen(
    algorithm: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, torch.dtype]:
    """Resolve ``"auto"`` for wide matrices of this shape.

    Returns:
        The algorithm, and the dtype of the standard algorithm's products.
    """
    if algorithm != "auto":
        return algorithm, dtype
    return (
        newton_schulz.faster_algorithm(rows, columns, dtype, device),
        newton_schulz.products_dtype(rows, dtype, device),
    )


def orthogonalize_all(
    stacks: Sequence[Tensor],
    steps: int,
    coefficients: Schedule,
    dtype: torch.dtype,
    max_numel: int | None = None,
    algorithm: str = "auto",
    overwrite: bool = False,
) -> list[Tensor]:
    """Orthogonalise many stacks, batching matrices of one shape or its transpose.

    Matrices of similar shapes join the batch too, padded with columns and rows of zeros. The padding stays zero,
    changes nothing else, and is removed from the result.

    Args:
        stacks: tensors (matrices, rows, cols) of any shapes.
        steps, coefficients, dtype, algorithm: as for :func:`orthogonalize`.
        max_numel: largest number of elements in a batch, which bounds the memory of copies. A larger tensor forms a
            separate batch. ``None`` is 2^20 on the CPU and 2^26 elsewhere.
        overwrite: whether ``stacks`` may be overwritten.

    Returns:
        One tensor of ``dtype`` for each input, with the same shape and in the same order.
    """
    results: list[Tensor] = list(stacks)
    # torch.compile traces the plan. It would ignore the cache and warn.
    plan = _plan if torch.compiler.is_compiling() else _remembered_plan
    kinds = tuple((*stack.shape, stack.device, stack.dtype) for stack in stacks)
    for bucket in plan(kinds, max_numel, dtype, algorithm):
        rows, columns = bucket.rows, bucket.columns
        wide = [stacks[i] if stacks[i].shape[1] <= stacks[i].shape[2] else stacks[i].mT for i in bucket.members]
        padded = [
            stack
            if stack.shape[1:] == (rows, columns)
            else functional.pad(stack, (0, columns - stack.shape[2], 0, rows - stack.shape[1]))
            for stack in wide
        ]
        joined = padded[0] if len(padded) == 1 else torch.cat(padded)
        if joined.numel() == 0:
            parts: Sequence[Tensor] = [stack.to(dtype) for stack in wide]
        else:
            may_overwrite = overwrite or joined is not wide[0]
            joined = _orthogonalize_wide(joined, steps, coefficients, dtype, algorithm, may_overwrite)
            parts = torch.split(joined, [stack.shape[0] for stack in wide])
        for i, part, stack in zip(bucket.members, parts, wide, strict=True):
            part = part if part.shape == stack.shape else part[:, : stack.shape[1], : stack.shape[2]]
            results[i] = part if part.shape == stacks[i].shape else part.mT
    return results


@dataclass
class _Bucket:
    """Collect stacks that share a batch.

    ``rows`` and ``columns`` are the padded shape, ``members`` the indices of the stacks, and ``numel`` their elements.
    """

    rows: int
    columns: int
    kind: tuple[torch.device, torch.dtype]
    members: list[int] = field(default_factory=list)
    numel: int = 0


def _plan(
    kinds: tuple[tuple[Any, ...], ...], max_numel: int | None, dtype: torch.dtype, algorithm: str
) -> list[_Bucket]:
    """Decide which stacks share a batch.

    Args:
        kinds: (matrices, rows, cols, device, dtype) of each stack.
        max_numel, dtype, algorithm: as for :func:`orthogonalize_all`.
    """

    def fits(bucket: _Bucket, rows: int, columns: int) -> bool:
        if not _LEAST_FILLED_COLUMNS * bucket.columns <= columns <= bucket.columns:
            return False
        if rows == bucket.rows:
            return True
        device = bucket.kind[0]
        chosen = _chosen(algorithm, bucket.rows, bucket.columns, dtype, device)
        # A row of zeros stays zero only under the standard algorithm; Gram gives it a singular value. A matrix whose
        # products would be in float32 must not join a batch in half precision.
        same_products = chosen[0] == "standard" and _chosen(algorithm, rows, columns, dtype, device) == chosen
        return same_products and _LEAST_FILLED_ROWS * bucket.rows <= rows and bucket.rows <= _PADDED_TO_ROWS

    buckets: list[_Bucket] = []
    for index in sorted(range(len(kinds)), key=lambda i: (-min(kinds[i][1:3]), -max(kinds[i][1:3]))):
        matrices, *shape, device, kind = kinds[index]
        rows, columns = min(shape), max(shape)
        most = max_numel or (MAX_NUMEL_ON_CPU if device.type == "cpu" else _MAX_NUMEL_ELSEWHERE)
        for bucket in buckets:
            room = bucket.numel + matrices * bucket.rows * bucket.columns <= most
            if room and bucket.kind == (device, kind) and fits(bucket, rows, columns):
                break
        else:
            bucket = _Bucket(rows, columns, (device, kind))
            buckets.append(bucket)
        bucket.members.append(index)
        bucket.numel += matrices * bucket.rows * bucket.columns
    return buckets


_remembered_plan = functools.lru_cache(maxsize=64)(_plan)
