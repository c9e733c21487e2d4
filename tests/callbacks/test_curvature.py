import itertools
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from callbacks.curvature import Product, Vector, dot, mean, random_vectors, top_eigenvalue, trace, twice_differentiable

SHAPES = ((3, 4), (5,), (2, 2, 2))
SIZE = 25


def symmetric(seed: int, eigenvalues: Tensor | None = None) -> Tensor:
    """Return a symmetric float64 matrix (25, 25), random or with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator)
    if eigenvalues is None:
        return matrix + matrix.T
    basis, _ = torch.linalg.qr(matrix)
    return basis @ torch.diag(eigenvalues) @ basis.T


def as_product(matrix: Tensor) -> Product:
    def product(vector: Vector) -> Vector:
        parts = (matrix @ torch.cat([x.flatten() for x in vector])).split([x.numel() for x in vector])
        return [part.view(x.shape) for part, x in zip(parts, vector, strict=True)]

    return product


def vectors(seed: int = 0, dtype: torch.dtype = torch.float64) -> Iterator[Vector]:
    zeros = [torch.zeros(shape, dtype=dtype) for shape in SHAPES]
    return random_vectors(zeros, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
def test_the_top_eigenvalue_is_that_of_the_full_matrix(seed: int) -> None:
    matrix = symmetric(seed)
    found = top_eigenvalue(as_product(matrix), next(vectors()), 100, 1e-8)
    assert found.value == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item(), rel=1e-8)
    assert found.products <= 2 * SIZE


def test_the_top_eigenvalue_is_the_largest_not_the_longest() -> None:
    matrix = symmetric(0, torch.cat([torch.tensor([-100.0, 3.0]).double(), torch.linspace(-1, 1, SIZE - 2).double()]))
    found = top_eigenvalue(as_product(matrix), next(vectors()), 100, 1e-6)
    assert found.value == pytest.approx(3.0, rel=1e-6)


@pytest.mark.parametrize("products", [1, 2, 4, 8])
def test_an_unfinished_search_is_within_the_error_that_it_states(products: int) -> None:
    matrix = symmetric(3)
    found = top_eigenvalue(as_product(matrix), next(vectors()), products, 0.0)
    values = torch.linalg.eigvalsh(matrix)
    assert found.products == products
    assert found.error > 0
    assert (values - found.value).abs().min().item() <= found.error * (1 + 1e-9)
    assert found.value <= values[-1].item() + 1e-9


def test_the_search_ends_early_where_it_has_found_enough() -> None:
    matrix = symmetric(0, torch.cat([torch.linspace(0, 1, SIZE - 1), torch.tensor([50.0])]).double())
    found = top_eigenvalue(as_product(matrix), next(vectors()), 100, 1e-3)
    assert found.products < 8
    assert found.error <= 1e-3 * found.value


def test_single_precision_finds_it_too() -> None:
    matrix = symmetric(1)
    found = top_eigenvalue(as_product(matrix.float()), next(vectors(dtype=torch.float32)), 200, 1e-5)
    assert found.value == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item(), rel=1e-4)


@pytest.mark.parametrize("value", [0.0, -2.0, 5.0])
def test_a_multiple_of_the_identity_takes_one_product(value: float) -> None:
    found = top_eigenvalue(as_product(value * torch.eye(SIZE).double()), next(vectors()), 9, 1e-6)
    assert (found.value, found.products) == (pytest.approx(value), 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_product_that_is_not_finite_gives_nan_at_once(bad: float) -> None:
    found = top_eigenvalue(as_product(torch.full((SIZE, SIZE), bad).double()), next(vectors()), 9, 1e-6)
    assert math.isnan(found.value)
    assert found.products == 1


def test_the_trace_is_within_its_error_and_exact_for_a_diagonal_matrix() -> None:
    matrix = symmetric(2)
    found = trace(as_product(matrix), vectors(), 2000)
    # The variance of the estimator is twice the sum of squares off the diagonal.
    deviation = (2 * (matrix.square().sum() - matrix.diagonal().square().sum()) / 2000).sqrt().item()
    assert found.error == pytest.approx(deviation, rel=0.1)
    assert abs(found.value - matrix.trace().item()) < 4 * found.error
    exact = trace(as_product(torch.diag(matrix.diagonal())), vectors(), 3)
    assert exact.value == pytest.approx(matrix.trace().item())
    assert exact.error == pytest.approx(0, abs=1e-12)


def test_one_sample_has_no_error_to_state() -> None:
    assert mean([3.0]) == (3.0, math.inf)
    assert mean([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / math.sqrt(3)))


def test_random_vectors_are_the_same_for_a_seed_and_differ_within_it() -> None:
    first, second = itertools.islice(vectors(), 2)
    again = next(vectors())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert abs(dot(first, second)) < 0.9 * math.sqrt(dot(first, first) * dot(second, second))


def attention_loss(query: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, query, query, is_causal=True).square().sum()


def test_attention_can_be_differentiated_twice_inside_the_block_only() -> None:
    query = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def second() -> Tensor:
        (gradient,) = torch.autograd.grad(attention_loss(query), query, create_graph=True)
        (result,) = torch.autograd.grad(gradient.square().sum(), query)
        return result

    with pytest.raises(RuntimeError, match="not implemented"):
        second()
    with twice_differentiable():
        assert torch.isfinite(second()).all()
    with pytest.raises(RuntimeError, match="not implemented"):
        second()


def test_a_compiled_network_can_be_differentiated_twice_inside_the_block() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    network.compile(backend="aot_eager")
    inputs = torch.ones(2, 3)
    network(inputs).sum().backward()
    weight = network[0].weight

    def second() -> Tensor:
        (gradient,) = torch.autograd.grad(network(inputs).square().sum(), weight, create_graph=True)
        (result,) = torch.autograd.grad(gradient.square().sum(), weight)
        return result

    with pytest.raises(RuntimeError, match=r"double backward|donated buffer"):
        second()
    with twice_differentiable():
        assert torch.isfinite(second()).all()
