"""Compare Newton-Schulz with the SVD and the float64 reference."""

from itertools import product

import pytest
import torch
from torch import Tensor

from ars2 import orthogonalize
from ars2.newton_schulz import COEFFICIENTS
from ars2.orthogonalize import orthogonalize_all
from tests.ars2.reference import polar_factor, reference_newton_schulz

SHAPES = [(6, 6), (24, 24), (4, 27), (40, 26), (26, 40), (128, 64), (1, 9), (9, 1)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# Worst absolute difference from the reference, whose entries are of order 0.1 to 1; measured: 1.6e-15, 9.8e-7, 1.9e-2.
REFERENCE_BOUND = {torch.float64: 8e-15, torch.float32: 4e-6, torch.bfloat16: 5e-2}
# Worst asymmetry in the basis of the polar factor; measured: 2.7e-15, 9.4e-7, 7.4e-3.
VECTORS_BOUND = {torch.float64: 1e-14, torch.float32: 4e-6, torch.bfloat16: 3e-2}


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_singular_values(rows: int, cols: int, values: Tensor) -> Tensor:
    u, _, v_transposed = torch.linalg.svd(random(rows, cols), full_matrices=False)
    return u @ torch.diag(values.double()) @ v_transposed


def input_for(dtype: torch.dtype) -> torch.dtype:
    """Return moments as the optimizers pass them.

    They are float32, or float64 for float64 parameters.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_polar_basis(result: Tensor, matrix: Tensor) -> Tensor:
    """Express the result in the basis of the polar factor.

    It is symmetric, with the result's singular values as eigenvalues, if and only if the singular vectors are those of
    the matrix.
    """
    polar = polar_factor(matrix)
    return result.double() @ polar.T if matrix.shape[0] <= matrix.shape[1] else polar.T @ result.double()


@pytest.mark.parametrize("dtype", DTYPES)
def test_jordan_equals_the_reference(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        matrix = random(*shape)
        result = orthogonalize(matrix.to(input_for(dtype)), dtype=dtype)
        assert result.dtype == dtype and result.shape == shape
        assert (result.double() - reference_newton_schulz(matrix)).abs().max() <= REFERENCE_BOUND[dtype], shape


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_singular_vectors_are_kept(dtype: torch.dtype, coefficients: str) -> None:
    for shape in SHAPES:
        matrix = random(*shape)
        result = orthogonalize(matrix.to(input_for(dtype)), coefficients=coefficients, dtype=dtype)
        small = in_polar_basis(result, matrix)
        assert (small - small.T).abs().max() <= VECTORS_BOUND[dtype], shape
        assert torch.linalg.eigvalsh((small + small.T) / 2).min() > 0, shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_jordan_leaves_singular_values_in_its_band(dtype: torch.dtype) -> None:
    for seed, shape in product(range(3), SHAPES):
        values = torch.linalg.svdvals(orthogonalize(random(*shape, seed=seed), dtype=dtype).double())
        assert values.max() < 1.2
        # A square Gaussian matrix may have a singular value near zero, which five steps do not lift all the way.
        assert shape[0] == shape[1] or values.min() > 0.66


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 5e-14), (torch.float32, 7e-6), (torch.bfloat16, 0.15)])
def test_polar_express_converges_to_the_polar_factor(dtype: torch.dtype, bound: float) -> None:
    # Measured: 1.0e-14, 1.5e-6, 3.6e-2, over matrices of condition up to 1e4.
    for index in range(40):
        rows, cols = [(3, 3), (6, 12), (16, 17), (48, 24), (24, 24)][index % 5]
        matrix = random(rows, cols, seed=index)
        if index % 4 == 0:
            matrix = with_singular_values(rows, cols, torch.logspace(0, -2, min(rows, cols)))
        result = orthogonalize(matrix.to(input_for(dtype)), 20, "polar_express", dtype)
        assert (result.double() - polar_factor(matrix)).abs().max() <= bound


@pytest.mark.parametrize("steps", [1, 4, 5, 12])
def test_polar_express_in_bfloat16_never_blows_up(steps: int) -> None:
    # Polynomials that grow fast above singular value 1, and rounding that takes small matrices there.
    for seed in range(30):
        rows, cols = [(3, 3), (6, 6), (24, 24), (16, 17), (48, 96)][seed % 5]
        result = orthogonalize(random(rows, cols, dtype=torch.float32, seed=seed), steps, "polar_express")
        # Up to 2 on the way is by design.
        assert torch.linalg.matrix_norm(result.float(), 2) < (2.0 if steps < 5 else 1.2)


@pytest.mark.parametrize("algorithm", ["standard", "gram"])
def test_triples_are_applied_in_order_and_the_last_repeats(algorithm: str) -> None:
    values, given = torch.tensor([0.8, 0.5, 0.3, 0.2], dtype=torch.float64), [[3.0, -4.0, 2.0], [1.5, -0.5, 0.0]]
    expected = values / values.norm()
    for a, b, c in [given[0], given[1], given[1]]:
        expected = a * expected + b * expected**3 + c * expected**5
    result = orthogonalize(with_singular_values(4, 9, values), 3, given, torch.float64, algorithm)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.linalg.svdvals(result), expected.sort(descending=True).values)


def test_polar_express_brings_values_closer_than_jordan() -> None:
    matrix = random(48, 96)
    errors = {
        name: (torch.linalg.svdvals(orthogonalize(matrix, 8, name, torch.float64)) - 1).abs().max()
        for name in COEFFICIENTS
    }
    assert errors["polar_express"] < 1e-4 < 1e-1 < errors["jordan"]


@pytest.mark.parametrize(
    ("shape", "dtype", "coefficients"),
    [
        ((3, 5, 8), torch.float64, "jordan"),
        ((3, 8, 5), torch.float32, "polar_express"),
        ((2, 3, 7, 4), torch.bfloat16, "jordan"),
    ],
)
def test_matrices_of_a_stack_are_independent(shape: tuple[int, ...], dtype: torch.dtype, coefficients: str) -> None:
    stack = random(*shape, dtype=input_for(dtype))
    stack[0] *= 1e6  # scales do not reach over
    result = orthogonalize(stack, 5, coefficients, dtype)
    singles = [orthogonalize(matrix, 5, coefficients, dtype) for matrix in stack.flatten(0, -3)]
    # Batched and single products may add in another order.
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(result, torch.stack(singles).reshape(shape), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_transpose_gives_the_transpose_to_the_bit(dtype: torch.dtype) -> None:
    matrix = random(26, 40, dtype=input_for(dtype))
    assert torch.equal(orthogonalize(matrix.T, dtype=dtype), orthogonalize(matrix, dtype=dtype).T)


def test_zero_stays_zero() -> None:
    for coefficients, dtype in product(COEFFICIENTS, DTYPES):
        result = orthogonalize(torch.zeros(2, 5, 8), coefficients=coefficients, dtype=dtype)
        assert result.dtype == dtype and not result.any()


def test_an_empty_matrix_stays_empty() -> None:
    result = orthogonalize(torch.zeros(0, 4))
    assert result.shape == (0, 4) and result.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_scale_overflows_or_loses_the_direction(dtype: torch.dtype) -> None:
    matrix = random(5, 8, dtype=torch.float32)
    for scale in (1e-30, 1e-6, 1.0, 1e12):
        result = orthogonalize(matrix * scale, dtype=dtype)
        assert result.isfinite().all()
        expected = reference_newton_schulz(matrix.double() * scale)
        assert (result.double() - expected).abs().max() <= REFERENCE_BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_keeps_its_rank(dtype: torch.dtype) -> None:
    matrix = with_singular_values(12, 20, torch.tensor([3.0, 1.0, 0.5, *[0.0] * 9]))
    values = torch.linalg.svdvals(orthogonalize(matrix.to(input_for(dtype)), dtype=dtype).double())
    assert values[2] > 0.66 and values[0] < 1.2
    # Rounding noise grows by up to 3.4445^5 = 485.
    noise = {torch.float64: 5e-13, torch.float32: 5e-4, torch.bfloat16: 5e-1}[dtype]
    assert values[3] < noise


def test_an_input_is_not_changed() -> None:
    matrix = random(8, 5, dtype=torch.float32)
    before = matrix.clone()
    orthogonalize(matrix, dtype=torch.float32)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("algorithm", ["standard", "gram"])
def test_inputs_are_overwritten_only_where_allowed(algorithm: str) -> None:
    def stacks() -> list[Tensor]:
        return [random(1, *shape, dtype=torch.float32) for shape in ((4, 30), (20, 3), (7, 7), (7, 7))]

    inputs, given = stacks(), stacks()
    results = orthogonalize_all(inputs, 5, "jordan", torch.bfloat16, algorithm=algorithm)
    assert all(torch.equal(a, b) for a, b in zip(inputs, stacks(), strict=True))
    written = orthogonalize_all(given, 5, "jordan", torch.bfloat16, algorithm=algorithm, overwrite=True)
    assert all(torch.equal(a, b) for a, b in zip(results, written, strict=True))
    assert not torch.equal(given[0], inputs[0])  # a matrix alone in its batch gives its memory to the iteration


@pytest.mark.parametrize(
    ("dtype", "max_numel"),
    [(torch.float64, 1), (torch.float64, 100), (torch.float32, 40), (torch.bfloat16, 250), (torch.bfloat16, 1 << 26)],
)
def test_all_at_once_equals_one_by_one(dtype: torch.dtype, max_numel: int) -> None:
    shapes = [(1, 5, 8), (3, 5, 8), (1, 8, 5), (2, 6, 6), (1, 1, 9), (1, 5, 8), (1, 9, 1), (1, 6, 6), (4, 8, 5)]
    stacks = [random(*shape, dtype=input_for(dtype), seed=seed) for seed, shape in enumerate(shapes)]
    stacks.append(random(1, 5, 8))  # float64 among the others
    together = orthogonalize_all(stacks, 5, "jordan", dtype, max_numel)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    for stack, result in zip(stacks, together, strict=True):
        assert result.shape == stack.shape and result.dtype == dtype
        torch.testing.assert_close(result, orthogonalize(stack, dtype=dtype), rtol=0, atol=tolerance)


def test_no_batch_is_larger_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    bmm = torch.bmm

    def counting(left: Tensor, right: Tensor) -> Tensor:
        seen.append(left.numel())
        return bmm(left, right)

    monkeypatch.setattr(torch, "bmm", counting)
    stacks = [random(1, 5, 8) for _ in range(7)] + [random(1, 8, 5), random(4, 5, 8)]
    orthogonalize_all(stacks, 1, "jordan", torch.float64, max_numel=100)
    # Eight of 40 in pairs, and the one that is larger by itself.
    assert sorted(seen) == [80, 80, 80, 80, 160]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(3)}, r"a matrix or a stack of matrices, got a tensor of shape \(3,\)"),
        ({"x": torch.ones(3, 3), "steps": 0}, "steps must be at least 1, got 0"),
        ({"x": torch.ones(3, 3), "coefficients": "other"}, "coefficients must be one of .*'jordan'.*got 'other'"),
    ],
)
def test_misuse_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        orthogonalize(**arguments)


@pytest.mark.parametrize(
    ("shape", "coefficients", "algorithm"),
    [
        ((24, 24), "jordan", "standard"),
        ((40, 26), "polar_express", "standard"),
        ((40, 26), "jordan", "gram"),
        ((3, 4, 27), "polar_express", "gram"),
    ],
)
def test_the_result_does_not_depend_on_the_scale(shape: tuple[int, ...], coefficients: str, algorithm: str) -> None:
    options = {"coefficients": coefficients, "algorithm": algorithm}
    matrix = random(*shape)
    expected = orthogonalize(matrix, dtype=torch.float64, **options)
    for scale in (1e-37, 1e-20, 1e-11, 1.0, 1e17, 1e37):
        scaled = (matrix * scale).float()
        found = orthogonalize(scaled, dtype=torch.float32, **options)
        assert (found.double() - expected).abs().max() <= 2e-5, scale
        stack = scaled.reshape(-1, *shape[-2:])
        (batched,) = orthogonalize_all([stack.clone()], 5, coefficients, torch.float32, algorithm=algorithm)
        assert torch.equal(batched.reshape(shape), found)


def test_zeros_stay_zero_and_non_finite_values_propagate() -> None:
    stack = random(4, 5, 6, dtype=torch.float32)
    stack[1], stack[2, 0, 0], stack[3, 0, 0] = 0.0, torch.inf, torch.nan
    result = orthogonalize(stack, dtype=torch.float32)
    assert not result[1].any()
    assert torch.equal(result[0], orthogonalize(stack[0], dtype=torch.float32))
    assert result[2].isnan().any() and result[3].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scaled_in_float32(dtype: torch.dtype) -> None:
    matrix = (random(24, 40) * 1e-4).to(dtype)
    result = orthogonalize(matrix, dtype=torch.float32)
    assert (result - orthogonalize(matrix.float(), dtype=torch.float32)).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_entries_that_are_no_real_numbers_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="floating-point"):
        orthogonalize(torch.ones(3, 4, dtype=dtype))
    with pytest.raises(ValueError, match="floating-point"):
        orthogonalize(torch.ones(3, 4), dtype=dtype)


@pytest.mark.parametrize(
    ("shape", "algorithm", "coefficients"),
    [((3, 4), "standard", "jordan"), ((4, 3), "gram", "polar_express"), ((2, 3, 5), "gram", "jordan")],
)
def test_gradients_flow_through(shape: tuple[int, ...], algorithm: str, coefficients: str) -> None:
    matrix = random(*shape).requires_grad_()

    def function(x: Tensor) -> Tensor:
        return orthogonalize(x, 3, coefficients, torch.float64, algorithm)

    assert torch.autograd.gradcheck(function, (matrix,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_flow_through_the_gram_side_of_large_matrices(dtype: torch.dtype) -> None:
    def gradient(dtype: torch.dtype, algorithm: str) -> Tensor:
        matrix = random(72, 300, dtype=torch.float32).requires_grad_()
        (orthogonalize(matrix, 3, dtype=dtype, algorithm=algorithm).float() * random(72, 300).float()).sum().backward()
        assert matrix.grad is not None
        return matrix.grad

    expected = gradient(torch.float32, "standard")
    difference = (gradient(dtype, "gram") - expected).norm() / expected.norm()
    assert difference <= {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
