"""Compute a Hessian's largest eigenvalue and trace from products with vectors.

The Hessian itself is never formed. A vector is a list of tensors, one per parameter.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Vector = list[Tensor]
Product = Callable[[Vector], Vector]


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Let the backward passes of a block be differentiated again.

    Fused attention kernels and compiled graphs cannot be. In the block, attention runs as plain operations, and
    compiled functions run eagerly.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:
            # Without that module nothing is compiled, and importing it takes seconds.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def dot(left: Vector, right: Vector) -> float:
    """Return the inner product over all elements; synchronises with the device once."""
    return torch.stack([product.sum() for product in torch._foreach_mul(left, right)]).sum().item()


def random_vectors(params: Vector, generator: torch.Generator) -> Iterator[Vector]:
    """Yield vectors of standard normal numbers.

    They are drawn on the host, so that every device gets the same.
    """
    while True:
        yield [torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in params]


class Eigenvalue(NamedTuple):
    """State the largest eigenvalue, and how far an eigenvalue can be from it.

    Both are in the unit of the matrix.
    """

    value: float
    error: float
    products: int


def top_eigenvalue(product: Product, start: Vector, max_products: int, tolerance: float) -> Eigenvalue:
    """Return the algebraically largest eigenvalue of a symmetric matrix.

    Uses Lanczos' three-term recurrence, which keeps three vectors. Rounding lets it find an eigenvalue more than once,
    which does not affect the largest one (Paige 1980). It ends when the error is at most ``tolerance`` times the value,
    or after ``max_products``. A value that is not finite ends it with NaN.

    Args:
        product: multiplies a vector by the matrix.
        start: any vector with a component along the eigenvector, such as a random one.
        max_products: at least 1.
        tolerance: relative.
    """
    length = math.sqrt(dot(start, start))
    current, previous = [x / length for x in start], [torch.zeros_like(x) for x in start]
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    value, error = math.nan, math.inf
    while len(diagonal) < max_products:
        following = product(current)
        if off_diagonal:
            torch._foreach_sub_(following, torch._foreach_mul(previous, off_diagonal[-1]))
        diagonal.append(dot(current, following))
        torch._foreach_sub_(following, torch._foreach_mul(current, diagonal[-1]))
        rest = math.sqrt(dot(following, following))
        if not math.isfinite(rest):
            return Eigenvalue(math.nan, math.nan, len(diagonal))
        small = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        small += torch.diag(torch.tensor(off_diagonal, dtype=torch.float64), 1)
        small += torch.diag(torch.tensor(off_diagonal, dtype=torch.float64), -1)
        values, vectors = torch.linalg.eigh(small)
        value, error = values[-1].item(), rest * abs(vectors[-1, -1].item())
        scale = values.abs().max().item()
        # When the Krylov space is exhausted, only rounding is left.
        if error <= tolerance * abs(value) or rest <= torch.finfo(start[0].dtype).eps * scale:
            break
        previous, current = current, [x / rest for x in following]
        off_diagonal.append(rest)
    return Eigenvalue(value, error, len(diagonal))


class Mean(NamedTuple):
    """State a mean of independent samples and its standard error, infinite for one."""

    value: float
    error: float


def mean(samples: list[float]) -> Mean:
    """Return the mean of one or more samples, with its standard error."""
    count, value = len(samples), math.fsum(samples) / len(samples)
    if count == 1:
        return Mean(value, math.inf)
    return Mean(value, math.sqrt(math.fsum((x - value) ** 2 for x in samples) / (count - 1) / count))


def trace(product: Product, signs_of: Iterator[Vector], samples: int) -> Mean:
    """Return the trace of a matrix by Hutchinson's estimator.

    It is the mean of ``z . A z`` over vectors ``z`` of random signs.

    Args:
        product: multiplies a vector by the matrix.
        signs_of: random vectors of a symmetric distribution, whose signs are taken.
        samples: at least 1.
    """
    found = []
    for _ in range(samples):
        signs = [torch.where(x >= 0, 1.0, -1.0).to(x.dtype) for x in next(signs_of)]
        found.append(dot(signs, product(signs)))
    return mean(found)
