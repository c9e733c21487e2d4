"""Newton-Schulz orthogonalisation: move a matrix towards the nearest orthogonal one by matrix products alone.

Quintic iteration and its coefficients: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).
Polar Express: Amsel et al., "The Polar Express: optimal matrix sign methods and their application to Muon" (2025).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.875, -1.25, 0.375),
)
# Each polynomial of Polar Express is made for the range that the one before it reaches, and grows fast above it.
# Rounding in half precision goes past it, so, as its authors do, all but the last are widened by this factor.
_MARGIN = 1.01
# One (a, b, c) a step; a schedule shorter than the number of steps goes on with its last entry.
COEFFICIENTS: dict[str, tuple[tuple[float, float, float], ...]] = {
    "jordan": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (
        *((a / _MARGIN, b / _MARGIN**3, c / _MARGIN**5) for a, b, c in _POLAR_EXPRESS[:-1]),
        _POLAR_EXPRESS[-1],
    ),
}
_NORM_MARGIN = {"jordan": 1.0, "polar_express": _MARGIN}
_TINY = 1e-7


def orthogonalize(
    x: Tensor, steps: int = 5, coefficients: str = "jordan", dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Return ``x`` with its singular values moved towards 1, its singular vectors kept.

    Each matrix is divided by its Frobenius norm (+1e-7), then ``X <- a X + (b A + c A A) X`` with ``A = X X^T`` is
    applied ``steps`` times on the side with fewer rows. Under ``"jordan"`` five steps leave the singular values of a
    well-conditioned matrix between about 0.7 and 1.2; under ``"polar_express"`` they tend to 1.

    Args:
        x: a matrix (rows, cols) or a stack (..., rows, cols); every matrix of a stack is taken for itself.
        steps: number of iterations, at least 1.
        coefficients: ``"jordan"`` or ``"polar_express"``.
        dtype: the dtype the products run in, and that of the result.

    Returns:
        A tensor of ``x``'s shape and of ``dtype``.

    Raises:
        ValueError: fewer than two dimensions, ``steps`` below 1, or unknown ``coefficients``.
    """
    if x.ndim < 2:
        raise ValueError(f"orthogonalize needs a matrix or a stack of matrices, got a tensor of shape {tuple(x.shape)}")
    if steps < 1:
        raise ValueError(f"orthogonalize: steps must be at least 1, got {steps}")
    if coefficients not in COEFFICIENTS:
        raise ValueError(f"orthogonalize: coefficients must be one of {sorted(COEFFICIENTS)}, got {coefficients!r}")
    if x.numel() == 0:
        return x.to(dtype)
    schedule = COEFFICIENTS[coefficients]
    stack = x.reshape(-1, *x.shape[-2:])
    # The norm is taken before the cast: squares of small entries underflow in half precision.
    norm = torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True)
    stack = (stack / (norm * _NORM_MARGIN[coefficients] + _TINY)).to(dtype)
    tall = stack.shape[-2] > stack.shape[-1]
    if tall:
        stack = stack.mT
    for step in range(steps):
        a, b, c = schedule[min(step, len(schedule) - 1)]
        gram = torch.bmm(stack, stack.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        stack = torch.baddbmm(stack, polynomial, stack, beta=a)
    if tall:
        stack = stack.mT
    return stack.reshape(x.shape)


def orthogonalize_all(
    stacks: Sequence[Tensor], steps: int, coefficients: str, dtype: torch.dtype, max_numel: int = 1 << 26
) -> list[Tensor]:
    """Orthogonalise many stacks at once: matrices of one shape (or its transpose) share one batched iteration.

    Args:
        stacks: tensors (matrices, rows, cols); shapes may differ between tensors.
        steps, coefficients, dtype: as for :func:`orthogonalize`.
        max_numel: the most elements joined into one batch, which bounds the memory of the copies; a larger tensor is
            a batch of its own.

    Returns:
        One tensor of ``dtype`` for each input, same shapes, same order.
    """
    batches: list[list[int]] = []
    last: dict[tuple[int, int, torch.device, torch.dtype], list[int]] = {}
    filled: dict[tuple[int, int, torch.device, torch.dtype], int] = {}
    for index, stack in enumerate(stacks):
        kind = (min(stack.shape[1:]), max(stack.shape[1:]), stack.device, stack.dtype)
        if kind not in last or filled[kind] + stack.numel() > max_numel:
            last[kind], filled[kind] = [], 0
            batches.append(last[kind])
        last[kind].append(index)
        filled[kind] += stack.numel()
    results: list[Tensor] = list(stacks)
    for members in batches:
        wide = [stacks[i] if stacks[i].shape[1] <= stacks[i].shape[2] else stacks[i].mT for i in members]
        joined = wide[0] if len(wide) == 1 else torch.cat(wide)
        parts = torch.split(orthogonalize(joined, steps, coefficients, dtype), [stack.shape[0] for stack in wide])
        for i, part in zip(members, parts, strict=True):
            results[i] = part if part.shape == stacks[i].shape else part.mT
    return results
