"""Newton-Schulz orthogonalisation: move a matrix towards the nearest orthogonal one by matrix products alone."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ars2 import newton_schulz
from ars2.newton_schulz import ALGORITHMS, COEFFICIENTS

_NORM_MARGIN = {"jordan": 1.0, "polar_express": newton_schulz.POLAR_EXPRESS_MARGIN}
_TINY = 1e-7
# The most elements in one batch. A core's cache is what counts on the CPU: larger batches are no faster there.
_MAX_NUMEL = {"cpu": 1 << 20}
_MAX_NUMEL_ELSEWHERE = 1 << 26
# Padding joins matrices that fill at least this part of the widest one's columns: more than that costs more than a
# batch less saves.
_LEAST_FILLED = 0.9


def orthogonalize(
    x: Tensor,
    steps: int = 5,
    coefficients: str = "jordan",
    dtype: torch.dtype = torch.bfloat16,
    algorithm: str = "auto",
) -> Tensor:
    """Return ``x`` with its singular values moved towards 1, its singular vectors kept.

    Each matrix is divided by its Frobenius norm (+1e-7), then ``X <- a X + (b A + c A A) X`` with ``A = X X^T`` is
    applied ``steps`` times on the side with fewer rows. Under ``"jordan"`` five steps leave the singular values of a
    well-conditioned matrix between about 0.7 and 1.2; under ``"polar_express"`` they tend to 1.

    Args:
        x: a matrix (rows, cols) or a stack (..., rows, cols); every matrix of a stack is taken for itself.
        steps: number of iterations, at least 1.
        coefficients: ``"jordan"`` or ``"polar_express"``.
        dtype: the dtype the products with ``x`` run in, and that of the result; ``"auto"`` multiplies in a wider one
            where that is faster.
        algorithm: ``"standard"``; ``"gram"``, the same iteration on the small side alone, for elongated matrices; or
            ``"auto"``, the faster one for the shape by measurement. See :mod:`ars2.newton_schulz`.

    Returns:
        A tensor of ``x``'s shape and of ``dtype``.

    Raises:
        ValueError: fewer than two dimensions, ``steps`` below 1, or unknown ``coefficients`` or ``algorithm``.
    """
    if x.ndim < 2:
        raise ValueError(f"orthogonalize needs a matrix or a stack of matrices, got a tensor of shape {tuple(x.shape)}")
    if steps < 1:
        raise ValueError(f"orthogonalize: steps must be at least 1, got {steps}")
    if coefficients not in COEFFICIENTS:
        raise ValueError(f"orthogonalize: coefficients must be one of {sorted(COEFFICIENTS)}, got {coefficients!r}")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"orthogonalize: algorithm must be one of {sorted(ALGORITHMS)}, got {algorithm!r}")
    if x.numel() == 0:
        return x.to(dtype)
    stack = x.reshape(-1, *x.shape[-2:])
    tall = stack.shape[1] > stack.shape[2]
    result = _orthogonalize_wide(stack.mT if tall else stack, steps, coefficients, dtype, algorithm)
    return (result.mT if tall else result).reshape(x.shape)


def _orthogonalize_wide(stack: Tensor, steps: int, coefficients: str, dtype: torch.dtype, algorithm: str) -> Tensor:
    # The norm is taken before the cast: squares of small entries underflow in half precision.
    norm = torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True)
    if (margin := _NORM_MARGIN[coefficients]) != 1.0:
        norm = norm * margin
    stack = stack / (norm + _TINY)
    steps_taken = newton_schulz.schedule(coefficients, steps)
    products = dtype
    if algorithm == "auto":
        algorithm = newton_schulz.faster_algorithm(stack.shape[1], stack.shape[2], dtype, stack.device)
        products = newton_schulz.products_dtype(stack.shape[1], dtype, stack.device)
    if algorithm == "gram":
        return newton_schulz.gram(stack, steps_taken, dtype)
    return newton_schulz.standard(stack.to(products), steps_taken).to(dtype)


def orthogonalize_all(
    stacks: Sequence[Tensor],
    steps: int,
    coefficients: str,
    dtype: torch.dtype,
    max_numel: int | None = None,
    algorithm: str = "auto",
) -> list[Tensor]:
    """Orthogonalise many stacks at once: matrices of one shape (or its transpose) share one batched iteration.

    Matrices with as many rows and nearly as many columns are padded with columns of zeros to share it too; these stay
    zero, change nothing else, and are cut off again.

    Args:
        stacks: tensors (matrices, rows, cols); shapes may differ between tensors.
        steps, coefficients, dtype, algorithm: as for :func:`orthogonalize`.
        max_numel: the most elements joined into one batch, which bounds the memory of the copies; a larger tensor is
            a batch of its own. ``None`` is 2^20 on the CPU and 2^26 elsewhere.

    Returns:
        One tensor of ``dtype`` for each input, same shapes, same order.
    """
    results: list[Tensor] = list(stacks)
    # A compiler takes the plan in; it looks through a cache, and warns of it.
    plan = _plan if torch.compiler.is_compiling() else _remembered_plan
    for members, columns in plan(tuple((*stack.shape, stack.device, stack.dtype) for stack in stacks), max_numel):
        wide = [stacks[i] if stacks[i].shape[1] <= stacks[i].shape[2] else stacks[i].mT for i in members]
        padded = [
            stack if stack.shape[2] == columns else functional.pad(stack, (0, columns - stack.shape[2]))
            for stack in wide
        ]
        joined = padded[0] if len(padded) == 1 else torch.cat(padded)
        if joined.numel() == 0:
            parts: Sequence[Tensor] = [stack.to(dtype) for stack in wide]
        else:
            joined = _orthogonalize_wide(joined, steps, coefficients, dtype, algorithm)
            parts = torch.split(joined, [stack.shape[0] for stack in wide])
        for i, part, stack in zip(members, parts, wide, strict=True):
            part = part if part.shape[2] == stack.shape[2] else part[..., : stack.shape[2]]
            results[i] = part if part.shape == stacks[i].shape else part.mT
    return results


def _plan(kinds: tuple[tuple[Any, ...], ...], max_numel: int | None) -> list[tuple[list[int], int]]:
    """Say which stacks share a batch: lists of indices, and the number of columns that each list is padded to.

    Args:
        kinds: for each stack (matrices, rows, cols, device, dtype).
        max_numel: as for :func:`orthogonalize_all`.
    """
    order = sorted(range(len(kinds)), key=lambda i: (min(kinds[i][1:3]), -max(kinds[i][1:3])))
    batches: list[tuple[list[int], int]] = []
    last: dict[tuple[Any, ...], tuple[list[int], int]] = {}
    filled: dict[tuple[Any, ...], int] = {}
    for index in order:
        matrices, rows, columns, device, dtype = kinds[index]
        rows, columns = min(rows, columns), max(rows, columns)
        most = max_numel or _MAX_NUMEL.get(device.type, _MAX_NUMEL_ELSEWHERE)
        kind = rows, device, dtype
        widest = last[kind][1] if kind in last else 0
        if columns < _LEAST_FILLED * widest or not widest or filled[kind] + matrices * rows * widest > most:
            last[kind], filled[kind] = ([], columns), 0
            batches.append(last[kind])
        last[kind][0].append(index)
        filled[kind] += matrices * rows * last[kind][1]
    return batches


_remembered_plan = functools.lru_cache(maxsize=64)(_plan)
