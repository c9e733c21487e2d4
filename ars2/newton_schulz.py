"""Iterate Newton-Schulz on stacks of wide matrices, by two algorithms.

Both are equal in exact arithmetic. References: the quintic iteration and its coefficients are from Jordan et al.,
"Muon: an optimizer for hidden layers in neural networks" (2024). Polar Express is from Amsel et al., "The Polar
Express: optimal matrix sign methods and their application to Muon" (2025).

*Standard*: ``X <- (a I + b A + c A A) X`` with ``A = X X^T``, which costs ``4 r^2 n + 2 r^3`` operations a step for r
rows and n columns. *Gram*: every step is a polynomial ``P`` in the same A. So A is iterated alone, ``A <- P A P``, the
polynomials are multiplied, ``Q <- P Q``, and X is multiplied once at the end. This costs ``4 r^2 n`` in all and
``8 r^3`` a step.

The Gram iteration squares singular values, and each step amplifies rounding errors of small ones by up to a^2. It
therefore runs in the next wider precision than the result, and recomputes A from X before the amplification exceeds a
bound. For half precision A is computed from X in float32, which suffices for all five steps of "jordan".
"""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

Coefficients: TypeAlias = tuple[float, float, float]
Schedule: TypeAlias = Sequence[Coefficients] | str

_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.875, -1.25, 0.375),
)
# Each polynomial of Polar Express is optimal on the range of the one before it and grows fast above that range.
# Rounding in half precision exceeds the range. Like its authors, we widen all but the last polynomial by this factor.
POLAR_EXPRESS_MARGIN = 1.01
# One (a, b, c) for each step. The last entry repeats if there are more steps.
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
_HALF = (torch.bfloat16, torch.float16)
_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
# Largest amplification of rounding errors of A before A is recomputed. It allows two updates under "jordan",
# 3.4445^4 = 141. With A in float32 and the result in half precision four updates, 3.4445^8 = 2e4, leave three digits.
_MOST_GROWTH, _MOST_GROWTH_FOR_HALF = 150.0, 2e4
# Up to this many rows the CPU multiplies float32 at least as fast as half precision, which has a fixed overhead.
_FLOAT32_TO_ROWS = 64
# Smallest number of rows and smallest aspect ratio (columns / rows) at which Gram is faster for bfloat16 on the CPU, as
# measured by benchmarks/newton_schulz.py. The ratio is lower for small matrices, which are multiplied in float32, and
# for large ones, whose symmetric products are computed by blocks. For float32 Gram needs float64 and is neither much
# faster nor always as accurate, and other devices were not measured. Both use the standard iteration.
_GRAM_FROM_ROWS = 24
_GRAM_FROM_ASPECT, _GRAM_FROM_ASPECT_BETWEEN = 3.0, 4.0
_LARGE_FROM_ROWS = 512
# Smallest number of rows at which the CPU computes a symmetric product by blocks, and the fastest block sizes. Blocks
# are of columns, in half precision of rows.
_BLOCKED_FROM_ROWS, _BLOCK_COLUMNS = 384, 128
_BLOCKED_FROM_ROWS_FOR_HALF, _BLOCK_ROWS = 512, 256
_CACHE_LINE = 64  # bytes


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


def faster_algorithm(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> str:
    """Return the faster algorithm for wide matrices of this shape.

    The choice between ``"standard"`` and ``"gram"`` follows measurements by benchmarks/newton_schulz.py.
    """
    if device.type != "cpu" or dtype != torch.bfloat16 or rows < _GRAM_FROM_ROWS:
        return "standard"
    between = _FLOAT32_TO_ROWS < rows < _LARGE_FROM_ROWS
    aspect = _GRAM_FROM_ASPECT_BETWEEN if between else _GRAM_FROM_ASPECT
    return "gram" if columns >= aspect * rows else "standard"


def products_dtype(rows: int, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the faster dtype for the products of wide matrices with ``rows`` rows.

    The result of the iteration is in ``dtype``.
    """
    small = device.type == "cpu" and rows <= _FLOAT32_TO_ROWS
    return torch.float32 if small and dtype in _HALF else dtype


def standard(stack: Tensor, coefficients: Sequence[Coefficients]) -> Tensor:
    """Iterate on ``stack`` (matrices, rows, columns) in its dtype.

    It requires rows <= columns.
    """
    for a, b, c in coefficients:
        gram = torch.bmm(stack, stack.mT)
        polynomial = _symmetric(gram, gram, gram, beta=b, alpha=c)
        stack = torch.baddbmm(stack, polynomial, stack, beta=a)
    return stack


def gram(stack: Tensor, coefficients: Sequence[Coefficients], dtype: torch.dtype) -> Tensor:
    """Iterate on the Gram matrices of ``stack`` (matrices, rows, columns).

    It requires rows <= columns. The result is in ``dtype``. In float64 the Gram matrices are float64 too.
    """
    half = dtype in _HALF
    stack = stack.to(_WIDER[dtype] if half else dtype)
    for block in _blocks(coefficients, _MOST_GROWTH_FOR_HALF if half else _MOST_GROWTH):
        if len(block) == 1:  # a single step is not faster on the Gram matrix
            stack = standard(stack.to(dtype), block)
            continue
        if half:
            stack = stack.float()
        inner = _symmetric(None, stack, stack.mT)
        product = _product(inner if half else inner.to(_WIDER.get(dtype, dtype)), block)
        if half and products_dtype(stack.shape[1], dtype, stack.device) == dtype:
            stack = _apply_rounded(product, stack, dtype)
        else:
            stack = torch.bmm(product.to(stack.dtype), stack)
    return stack.to(dtype)


def _product(inner: Tensor, block: Sequence[Coefficients]) -> Tensor:
    """Return the product of the steps' polynomials in A, for A = ``inner``."""
    product: Tensor | None = None
    for index, (a, b, c) in enumerate(block):
        # The polynomial without a I. The products below add that term exactly.
        polynomial = _symmetric(inner, inner, inner, beta=b, alpha=c)
        if index + 1 < len(block):
            half = _symmetric(inner, polynomial, inner, beta=a)
            inner = _symmetric(half, half, polynomial, beta=a)
        if product is None:
            product = polynomial.clone() if polynomial.requires_grad else polynomial  # for autograd
            product.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            product = _symmetric(product, polynomial, product, beta=a)
    assert product is not None
    return product


def _apply_rounded(product: Tensor, stack: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``product @ stack`` with both factors rounded to ``dtype``.

    The diagonal of ``product`` keeps more digits. A multiple of the identity, the power of two nearest to the mean of
    the diagonal, is subtracted first and applied to ``stack`` exactly.
    """
    diagonal = product.diagonal(dim1=-2, dim2=-1)
    scale = torch.exp2(torch.round(torch.log2(diagonal.mean(dim=-1, keepdim=True))))
    diagonal.sub_(scale)
    stack = stack.to(dtype)
    return torch.baddbmm(stack * scale.unsqueeze(-1).to(dtype), product.to(dtype), stack)


def _symmetric(added: Tensor | None, left: Tensor, right: Tensor, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """Return ``beta * added + alpha * left @ right``, which must be symmetric.

    ``None`` adds nothing. On the CPU only one triangle of blocks of a large product is computed, then mirrored.
    """
    matrices, rows, _ = left.shape
    half = left.dtype in _HALF
    width, least = (_BLOCK_ROWS, _BLOCKED_FROM_ROWS_FOR_HALF) if half else (_BLOCK_COLUMNS, _BLOCKED_FROM_ROWS)
    in_one_product = rows < least or left.device.type != "cpu" or left.requires_grad
    if in_one_product or torch.compiler.is_compiling():
        return torch.bmm(left, right) if added is None else torch.baddbmm(added, left, right, beta=beta, alpha=alpha)
    # In float32, rows at a power-of-two distance conflict in the cache and slow the mirroring, so they are padded. Half
    # precision multiplies unpadded rows faster.
    padding = 0 if half else _CACHE_LINE // left.element_size()
    result = left.new_empty(matrices, rows, rows + padding)[:, :, :rows]
    if added is not None:
        result.copy_(added)
    for start in range(0, rows, width):
        strip, onward, beyond = slice(start, start + width), slice(start, None), slice(start + width, None)
        vertical, horizontal = (strip, onward) if half else (onward, strip)
        block, one, other = result[:, vertical, horizontal], left[:, vertical], right[:, :, horizontal]
        if added is None:
            torch.bmm(one, other, out=block)
        else:
            block.baddbmm_(one, other, beta=beta, alpha=alpha)
        vertical, horizontal = (beyond, strip) if half else (strip, beyond)
        result[:, vertical, horizontal] = result[:, horizontal, vertical].mT
    return result


def _blocks(coefficients: Sequence[Coefficients], most_growth: float = _MOST_GROWTH) -> list[list[Coefficients]]:
    """Split the steps where A is recomputed from X."""
    blocks: list[list[Coefficients]] = []
    growth = 1.0
    for step in coefficients:
        # The amplification by earlier updates of A in this block.
        if not blocks or growth > most_growth:
            blocks.append([])
            growth = 1.0
        blocks[-1].append(step)
        growth *= step[0] ** 2
    return blocks
