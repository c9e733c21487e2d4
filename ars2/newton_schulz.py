"""Iterate Newton-Schulz on stacks of wide matrices, by two algorithms.

Both are equal in exact arithmetic. References: the quintic iteration and its coefficients are from Jordan et al.,
"Muon: an optimizer for hidden layers in neural networks" (2024). Polar Express is from Amsel et al., "The Polar
Express: optimal matrix sign methods and their application to Muon" (2025).

*Standard*: ``X <- (a I + b A + c A A) X`` with ``A = X X^T``, which costs ``4 r^2 n + 2 r^3`` operations a step for r
rows and n columns. *Gram*: every step is a polynomial ``P`` in the same A. So A is iterated alone, ``A <- P A P``, the
polynomials are multiplied, ``Q <- P Q``, and X is multiplied once at the end. This costs ``4 r^2 n`` in all and
``8 r^3`` a step. The Gram matrix squares singular values, and each step amplifies rounding errors of small ones by up
to a^2. It is therefore in the next wider precision, and is computed anew before the amplification exceeds a bound.
"""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

Coefficients: TypeAlias = tuple[float, float, float]
Schedule: TypeAlias = Sequence[Coefficients] | str

# Each polynomial of Polar Express is optimal on the range of the one before it and grows fast above that range.
# Rounding in half precision exceeds the range. Like its authors, we widen all but the last polynomial by this factor.
POLAR_EXPRESS_MARGIN = 1.01
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115952949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
)
# One (a, b, c) for each step. The last entry repeats if there are more steps.
COEFFICIENTS: dict[str, tuple[Coefficients, ...]] = {
    "jordan": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (
        *(
            (a / POLAR_EXPRESS_MARGIN, b / POLAR_EXPRESS_MARGIN**3, c / POLAR_EXPRESS_MARGIN**5)
            for a, b, c in _POLAR_EXPRESS
        ),
        (1.875, -1.25, 0.375),
    ),
}
ALGORITHMS = ("auto", "standard", "gram")
HALF = (torch.bfloat16, torch.float16)
# Up to this many rows the CPU multiplies float32 at least as fast as half precision, which has a fixed overhead.
_FLOAT32_TO_ROWS = 64
# Rows from which, and aspect ratio (columns / rows) from which, Gram is faster for bfloat16 on the CPU, as measured by
# benchmarks/newton_schulz.py. The ratio is higher in the middle. Matrix units (AMX) multiply bfloat16 so much faster
# than float32 that with them Gram is the slower one above 128 rows.
_GRAM_FROM_ROWS, _GRAM_TO_ROWS_WITH_MATRIX_UNITS = 24, 128
_HAS_MATRIX_UNITS = bool(torch.cpu.get_capabilities().get("amx_bf16", False))
# Rows from which rounding the last product's factors to half precision costs less than it saves.
_ROUNDED_FROM_ROWS = 256
_GRAM_FROM_ASPECT, _GRAM_FROM_ASPECT_BETWEEN, _LARGE_FROM_ROWS = 3.0, 4.0, 512


def checked(given: Any, name: str = "coefficients") -> Schedule:
    """Return the name of a schedule, or triples as a tuple of tuples of floats.

    Raises:
        ValueError: anything else. The message starts with ``name``.
    """
    if isinstance(given, str) and given in COEFFICIENTS:
        return given
    triples = given if isinstance(given, (list, tuple)) else ()
    numbers = [part for triple in triples if isinstance(triple, (list, tuple)) and len(triple) == 3 for part in triple]
    real = all(isinstance(number, Real) and type(number) is not bool and math.isfinite(number) for number in numbers)
    if not triples or len(numbers) != 3 * len(triples) or not real:
        names = ", ".join(map(repr, COEFFICIENTS))
        raise ValueError(f"{name} must be one of {names}, or a list of triples (a, b, c) of numbers, got {given!r}")
    return tuple((float(a), float(b), float(c)) for a, b, c in triples)


def schedule(given: Schedule, steps: int) -> list[Coefficients]:
    """Return the coefficients (a, b, c) of each of ``steps`` iterations."""
    entries = COEFFICIENTS[given] if isinstance(given, str) else given
    return [entries[min(step, len(entries) - 1)] for step in range(steps)]


def choose(
    algorithm: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, torch.dtype]:
    """Return the algorithm for wide matrices, and the dtype of standard products.

    ``"auto"`` becomes the faster algorithm, by measurements of benchmarks/newton_schulz.py.
    """
    if algorithm != "auto":
        return algorithm, dtype
    if device.type != "cpu" or dtype not in HALF:
        return "standard", dtype
    between = _FLOAT32_TO_ROWS < rows < _LARGE_FROM_ROWS
    aspect = _GRAM_FROM_ASPECT_BETWEEN if between else _GRAM_FROM_ASPECT
    products = torch.float32 if rows <= _FLOAT32_TO_ROWS else dtype
    if rows < _GRAM_FROM_ROWS or columns < aspect * rows or dtype != torch.bfloat16:
        return "standard", products
    if rows > _GRAM_TO_ROWS_WITH_MATRIX_UNITS and _HAS_MATRIX_UNITS:
        return "standard", products
    return "gram", products


def standard(stack: Tensor, coefficients: Sequence[Coefficients]) -> Tensor:
    """Iterate on ``stack`` (matrices, rows, columns) in its dtype.

    It requires rows <= columns.
    """
    for a, b, c in coefficients:
        gram = torch.bmm(stack, stack.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        stack = torch.baddbmm(stack, polynomial, stack, beta=a)
    return stack


def gram(stack: Tensor, coefficients: Sequence[Coefficients], dtype: torch.dtype) -> Tensor:
    """Iterate on the Gram matrices of ``stack``, in the next wider precision.

    It is a tensor (matrices, rows, columns) and requires rows <= columns. The result is in ``dtype``.
    """
    start, wide = 0, torch.float32 if dtype in HALF else torch.float64
    while start < len(coefficients):
        stack, end = stack.to(wide), _end_of_block(coefficients, start, dtype)
        product = _product(torch.bmm(stack, stack.mT), coefficients[start:end])
        if dtype in HALF and stack.shape[1] >= _ROUNDED_FROM_ROWS:
            stack = _apply_rounded(product, stack, dtype)
        else:
            stack = torch.bmm(product, stack)
        start = end
    return stack.to(dtype)


def _product(inner: Tensor, coefficients: Sequence[Coefficients]) -> Tensor:
    """Return the product of the steps' polynomials in A, for A = ``inner``."""
    product: Tensor | None = None
    for index, (a, b, c) in enumerate(coefficients):
        polynomial = torch.baddbmm(inner, inner, inner, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if product is None else torch.bmm(product, polynomial)
        if index + 1 < len(coefficients):
            inner = torch.bmm(torch.bmm(polynomial, inner), polynomial)
    assert product is not None
    return product


def _apply_rounded(product: Tensor, stack: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``product @ stack`` with both factors rounded to ``dtype``.

    The diagonal of ``product`` keeps more digits. A multiple of the identity, the power of two nearest to the mean of
    the diagonal, is subtracted first and applied to ``stack`` exactly.
    """
    diagonal = product.diagonal(dim1=-2, dim2=-1)
    scale = torch.exp2(torch.round(torch.log2(diagonal.mean(dim=-1, keepdim=True))))
    product = product - torch.diag_embed(scale.expand_as(diagonal))
    stack = stack.to(dtype)
    return torch.baddbmm(stack * scale.unsqueeze(-1).to(dtype), product.to(dtype), stack)


def _end_of_block(coefficients: Sequence[Coefficients], start: int, dtype: torch.dtype) -> int:
    """Return the end of the steps from ``start`` that share a Gram matrix."""
    # Four updates by "jordan" amplify rounding errors of A by 3.4445^8 = 2e4, which leaves three digits of float32.
    # Where A is no wider than the result, two updates are allowed, 3.4445^4 = 141.
    growth, most, end = 1.0, 150.0 if dtype == torch.float64 else 2e4, start + 1
    while end < len(coefficients) and (growth := growth * coefficients[end - 1][0] ** 2) <= most:
        end += 1
    return end
