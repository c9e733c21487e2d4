"""Compare the standard and the Gram Newton-Schulz iterations.

They are equal in float64, and Gram is no less accurate than standard where it is used.
"""

import pytest
import torch
from torch import Tensor

from ars2 import orthogonalize
from ars2.newton_schulz import COEFFICIENTS, _blocks, _symmetric, faster_algorithm, products_dtype, schedule
from ars2.orthogonalize import orthogonalize_all
from benchmarks.newton_schulz import relative_errors
from tests.ars2.reference import reference_newton_schulz

SHAPES = [(24, 216), (40, 40), (96, 48)]


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("steps", [1, 3, 5, 8])
def test_gram_equals_the_reference_in_float64(steps: int) -> None:
    for shape in SHAPES:
        matrix = random(*shape)
        result = orthogonalize(matrix, steps, dtype=torch.float64, algorithm="gram")
        # Measured: 3.5e-15. Without forming A anew, rounding would be amplified by 3.4445^2 a step.
        assert (result - reference_newton_schulz(matrix, steps)).abs().max() <= 5e-14, shape


@pytest.mark.parametrize("steps", [3, 9])
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_gram_equals_standard_under_every_schedule(coefficients: str, steps: int) -> None:
    matrix = random(3, 32, 160)
    standard, gram = (
        orthogonalize(matrix, steps, coefficients, torch.float64, algorithm) for algorithm in ("standard", "gram")
    )
    assert (standard - gram).abs().max() <= 5e-14


@pytest.mark.parametrize(
    "shape", [(64, 576), *(pytest.param(s, marks=pytest.mark.slow) for s in ((128, 1152), (256, 1024), (512, 1536)))]
)
def test_gram_is_as_accurate_as_standard_where_it_is_chosen(shape: tuple[int, int]) -> None:
    # Random, low-rank, of condition 1e6, and tiny. The means over seeds differ by chance by a few percent.
    assert faster_algorithm(*shape, torch.bfloat16, torch.device("cpu")) == "gram"
    standard, gram = (
        torch.tensor([relative_errors(*shape, torch.bfloat16, algorithm, seed) for seed in range(4)]).mean(dim=0)
        for algorithm in ("standard", "gram")
    )
    assert (gram <= 1.05 * standard).all(), f"standard {standard.tolist()}, gram {gram.tolist()}"


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gram_keeps_zero_and_never_blows_up(dtype: torch.dtype, coefficients: str) -> None:
    assert not orthogonalize(torch.zeros(2, 8, 64), 5, coefficients, dtype, "gram").any()
    for seed in range(20):
        nearly_rank_one = random(64, 1) @ random(1, 384, seed=seed) + 1e-6 * random(64, 384, seed=seed)
        for matrix in (random(64, 384, seed=seed), nearly_rank_one):
            result = orthogonalize(matrix.float(), 5, coefficients, dtype, "gram").float()
            assert torch.linalg.matrix_norm(result, 2) < 2.0


def test_the_gram_matrix_is_formed_anew_before_rounding_has_grown_too_much() -> None:
    assert [len(block) for block in _blocks(schedule("jordan", 5))] == [3, 2]
    assert [len(block) for block in _blocks(schedule("jordan", 7))] == [3, 3, 1]
    assert [len(block) for block in _blocks(schedule("polar_express", 5))] == [2, 2, 1]


def test_for_half_precision_the_gram_matrix_is_in_float32_and_formed_once() -> None:
    assert [len(block) for block in _blocks(schedule("jordan", 5), 2e4)] == [5]
    assert [len(block) for block in _blocks(schedule("jordan", 8), 2e4)] == [5, 3]
    assert [len(block) for block in _blocks(schedule("polar_express", 5), 2e4)] == [4, 1]


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(96, 400), pytest.param((300, 1300), marks=pytest.mark.slow)])
def test_gram_is_as_accurate_as_standard_under_every_schedule(shape: tuple[int, int], coefficients: str) -> None:
    exact, standard, gram = (
        orthogonalize(random(*shape).to(given), 7, coefficients, dtype, algorithm).double()
        for given, dtype, algorithm in (
            (torch.float64, torch.float64, "standard"),
            (torch.float32, torch.bfloat16, "standard"),
            (torch.float32, torch.bfloat16, "gram"),
        )
    )
    assert (gram - exact).norm() <= (standard - exact).norm()


@pytest.mark.parametrize(("rows", "matrices"), [(384, 1), (511, 2)])
def test_a_symmetric_product_by_blocks_is_the_product(rows: int, matrices: int) -> None:
    x = torch.stack([random(rows, 40, seed=seed) for seed in range(matrices)])
    gram = torch.bmm(x, x.mT)
    torch.testing.assert_close(_symmetric(None, x, x.mT), gram, rtol=0, atol=1e-12)
    expected = 0.5 * gram + 2.0 * torch.bmm(gram, gram)
    found = _symmetric(gram, gram, gram, beta=0.5, alpha=2.0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9)
    assert torch.equal(found[:, rows // 2 :, : rows // 4], found[:, : rows // 4, rows // 2 :].mT)
    assert found.untyped_storage().nbytes() > found.numel() * 8  # by blocks, for only these pad their rows


@pytest.mark.parametrize("rows", [512, pytest.param(700, marks=pytest.mark.slow)])
def test_a_symmetric_product_by_blocks_in_half_precision_is_the_product_rounded_once(rows: int) -> None:
    a = torch.stack([random(rows, rows, seed=seed) for seed in range(2)])
    a = (a + a.mT).bfloat16()
    found = _symmetric(a, a, a, beta=0.5, alpha=2.0)
    exact = 0.5 * a.double() + 2.0 * torch.bmm(a.double(), a.double())
    # Half a unit in the last place; sums that cancel keep the rounding of float32 (measured: 1.4e-5).
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()
    assert torch.equal(found, found.mT)


def test_the_iteration_can_be_differentiated_where_it_would_multiply_by_blocks() -> None:
    small, large = random(40, 60, dtype=torch.float32), random(400, 450, dtype=torch.float32)
    for matrix in (small, large):
        matrix.requires_grad_()
        orthogonalize(matrix, dtype=torch.float32).sum().backward()
        assert matrix.grad is not None and matrix.grad.isfinite().all() and matrix.grad.any()


@pytest.mark.parametrize("shape", [(7, 40), (27, 64), (64, 64), (48, 200)])
def test_small_matrices_are_multiplied_in_float32(shape: tuple[int, int]) -> None:
    cpu = torch.device("cpu")
    assert products_dtype(shape[0], torch.bfloat16, cpu) == torch.float32
    assert products_dtype(65, torch.bfloat16, cpu) == torch.bfloat16
    assert products_dtype(shape[0], torch.float64, cpu) == torch.float64
    assert products_dtype(shape[0], torch.bfloat16, torch.device("meta")) == torch.bfloat16
    matrix = random(*shape, dtype=torch.float32)
    exact = orthogonalize(matrix.double(), dtype=torch.float64)
    found = orthogonalize(matrix).double()
    # Half a unit of bfloat16 in the last place, and a little for float32.
    assert ((found - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()


def test_the_choice_is_by_shape_dtype_and_device() -> None:
    cpu = torch.device("cpu")
    assert faster_algorithm(512, 4608, torch.bfloat16, cpu) == "gram"
    assert faster_algorithm(512, 512, torch.bfloat16, cpu) == "standard"
    assert faster_algorithm(64, 192, torch.bfloat16, cpu) == "gram"
    assert faster_algorithm(65, 195, torch.bfloat16, cpu) == "standard"
    assert faster_algorithm(511, 1536, torch.bfloat16, cpu) == "standard"
    assert faster_algorithm(512, 1536, torch.bfloat16, cpu) == "gram"
    assert faster_algorithm(8, 400, torch.bfloat16, cpu) == "standard"
    assert faster_algorithm(512, 4608, torch.float32, cpu) == "standard"
    assert faster_algorithm(512, 4608, torch.float64, cpu) == "standard"
    assert faster_algorithm(512, 4608, torch.bfloat16, torch.device("meta")) == "standard"


@pytest.mark.parametrize("shape", [(64, 576), (576, 64)])
def test_auto_uses_the_algorithm_chosen_by_shape(shape: tuple[int, int]) -> None:
    matrix = random(*shape, dtype=torch.float32)
    auto, gram, standard = (orthogonalize(matrix, algorithm=a) for a in ("auto", "gram", "standard"))
    assert torch.equal(auto, gram) and not torch.equal(auto, standard)


def test_an_unknown_algorithm_is_named() -> None:
    with pytest.raises(ValueError, match=r"algorithm .*'gram'.*got 'other'"):
        orthogonalize(torch.ones(3, 3), algorithm="other")


@pytest.mark.parametrize(
    ("shapes", "batches"),
    [
        ([(1, 20, 60), (2, 57, 20), (1, 20, 55), (1, 20, 40)], {(4, 20, 60), (1, 20, 40)}),
        ([(1, 32, 40), (2, 37, 29), (1, 30, 40), (1, 27, 40)], {(4, 32, 40), (1, 27, 40)}),
    ],
    ids=["columns", "rows"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_zeros_are_padded_to_share_a_batch_at_no_loss(
    dtype: torch.dtype, shapes: list, batches: set, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks = [random(*shape, dtype=torch.float32 if dtype != torch.float64 else dtype) for shape in shapes]
    together, calls = _shapes_multiplied(monkeypatch, stacks, dtype, "auto")
    assert calls == batches
    for stack, result in zip(stacks, together, strict=True):
        assert result.shape == stack.shape
        tolerance = 1e-13 if dtype == torch.float64 else 5e-2
        torch.testing.assert_close(result, orthogonalize(stack, dtype=dtype), rtol=0, atol=tolerance)


def test_rows_are_not_padded_where_the_gram_side_or_many_rows_would_pay_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, wide = [random(1, rows, 40) for rows in (32, 30)], [random(1, rows, 300) for rows in (288, 280)]
    assert _shapes_multiplied(monkeypatch, narrow, torch.float64, "gram")[1] == {(1, 32, 40), (1, 30, 40)}
    assert len(_shapes_multiplied(monkeypatch, wide, torch.bfloat16, "standard")[1]) == 2


def test_rows_multiplied_in_float32_are_not_padded_into_a_batch_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    stacks = [random(1, rows, 80, dtype=torch.float32) for rows in (66, 62)]
    assert _shapes_multiplied(monkeypatch, stacks, torch.bfloat16, "auto")[1] == {(1, 66, 80), (1, 62, 80)}
    assert _shapes_multiplied(monkeypatch, stacks, torch.bfloat16, "standard")[1] == {(2, 66, 80)}


def _shapes_multiplied(
    monkeypatch: pytest.MonkeyPatch, stacks: list[Tensor], dtype: torch.dtype, algorithm: str
) -> tuple[list[Tensor], set[tuple[int, ...]]]:
    """Orthogonalise together; return the results and the shapes multiplied."""
    calls: set[tuple[int, ...]] = set()
    bmm = torch.bmm

    def counting(left: Tensor, right: Tensor) -> Tensor:
        if left.shape[1] < left.shape[2]:
            calls.add(tuple(left.shape))
        return bmm(left, right)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "bmm", counting)
        return orthogonalize_all(stacks, 5, "jordan", dtype, algorithm=algorithm), calls
