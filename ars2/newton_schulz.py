"""The Newton-Schulz iteration on a stack of wide matrices, by two algorithms that are equal in exact arithmetic.

Quintic iteration and its coefficients: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).
Polar Express: Amsel et al., "The Polar Express: optimal matrix sign methods and their application to Muon" (2025).

*Standard*: ``X <- (a I + b A + c A A) X`` with ``A = X X^T``, which costs ``4 r^2 n + 2 r^3`` operations a step for r
rows and n columns. *Gram*: every step is a polynomial ``P`` in the same A, so that A can be iterated alone,
``A <- P A P``, the polynomials be multiplied, ``Q <- P Q``, and X be touched once at the end: ``4 r^2 n`` in all and
``8 r^3`` a step.

The Gram side squares singular values, and rounding of A is amplified by up to a^2 a step where they are small. So it
runs one precision wider than X, and A is formed anew from X before the amplification passes ``_MOST_GROWTH``.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Coefficients: TypeAlias = tuple[float, float, float]

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
POLAR_EXPRESS_MARGIN = 1.01
# One (a, b, c) a step; a schedule shorter than the number of steps goes on with its last entry.
COEFFICIENTS: dict[str, tuple[Coefficients, ...]] = {
    "jordan": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (
        *(
            (a / POLAR_EXPRESS_MARGIN, b / POLAR_EXPRESS_MARGIN**3, c / POLAR_EXPRESS_MARGIN**5)
            for a, b, c in _POLAR_EXPRESS[:-1]
        ),
        _POLAR_EXPRESS[-1],
    ),
}
ALGORITHMS = ("auto", "standard", "gram")
_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
# Of A's rounding, from one forming of A to the next: two updates under "jordan", 3.4445^4 = 141.
_MOST_GROWTH = 150.0
# From how many columns a row, and from how many rows on, Gram is the faster one on the CPU, as
# benchmarks/newton_schulz.py measures it. In float32, whose inner side is float64, it is neither faster by much nor
# always as accurate; other devices were not measured. There standard is taken.
_GRAM_FROM_ASPECT = {torch.bfloat16: 4.0}
_GRAM_FROM_ROWS = 24


def schedule(name: str, steps: int) -> list[Coefficients]:
    """Return the coefficients (a, b, c) of each of ``steps`` iterations."""
    entries = COEFFICIENTS[name]
    return [entries[min(step, len(entries) - 1)] for step in range(steps)]


def faster_algorithm(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> str:
    """Return ``"standard"`` or ``"gram"``, whichever is faster for wide matrices of this shape by measurement."""
    aspect = _GRAM_FROM_ASPECT.get(dtype)
    if device.type != "cpu" or aspect is None or rows < _GRAM_FROM_ROWS:
        return "standard"
    return "gram" if columns >= aspect * rows else "standard"


def standard(stack: Tensor, coefficients: Sequence[Coefficients]) -> Tensor:
    """Iterate on ``stack`` (matrices, rows, columns) itself, rows <= columns, in its dtype."""
    for a, b, c in coefficients:
        gram = torch.bmm(stack, stack.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        stack = torch.baddbmm(stack, polynomial, stack, beta=a)
    return stack


def gram(stack: Tensor, coefficients: Sequence[Coefficients]) -> Tensor:
    """Iterate on the Gram matrices of ``stack`` (matrices, rows, columns), rows <= columns; the result has its dtype.

    float64 has nothing wider and keeps to itself.
    """
    for block in _blocks(coefficients):
        if len(block) == 1:  # one step gains nothing from its Gram matrix alone
            stack = standard(stack, block)
            continue
        inner = torch.bmm(stack, stack.mT).to(_WIDER.get(stack.dtype, stack.dtype))
        product: Tensor | None = None
        for index, (a, b, c) in enumerate(block):
            # The polynomial without its a I: that part is added in the products, where it is exact.
            polynomial = torch.baddbmm(inner, inner, inner, beta=b, alpha=c)
            if index + 1 < len(block):
                half = torch.baddbmm(inner, polynomial, inner, beta=a)
                inner = torch.baddbmm(half, half, polynomial, beta=a)
            if product is None:
                product = polynomial
                product.diagonal(dim1=-2, dim2=-1).add_(a)
            else:
                product = torch.baddbmm(product, polynomial, product, beta=a)
        assert product is not None
        stack = torch.bmm(product.to(stack.dtype), stack)
    return stack


def _blocks(coefficients: Sequence[Coefficients]) -> list[list[Coefficients]]:
    """Cut the steps where A is to be formed anew."""
    blocks: list[list[Coefficients]] = []
    growth = 1.0
    for step in coefficients:
        # What the updates of A before this step have amplified, by the steps of its block so far.
        if not blocks or growth > _MOST_GROWTH:
            blocks.append([])
            growth = 1.0
        blocks[-1].append(step)
        growth *= step[0] ** 2
    return blocks
