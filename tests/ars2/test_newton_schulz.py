"""Compare the standard and the Gram Newton-Schulz iterations.

They are equal in float64, and Gram is no less accurate than standard where it is used.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ars2 import newton_schulz, orthogonalize
from ars2.newton_schulz import COEFFICIENTS, Coefficients, _end_of_block, choose, schedule
from ars2.orthogonalize import orthogonalize_all
from benchmarks.newton_schulz import relative_errors
from tests.ars2.reference import reference_newton_schulz

CPU = torch.device("cpu")
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
def test_gram_is_as_accurate_as_standard_where_it_is_chosen(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Random, low-rank, of condition 1e6, and tiny. The means over seeds differ by chance by a few percent.
    monkeypatch.setattr(newton_schulz, "_HAS_MATRIX_UNITS", False)
    assert choose("auto", *shape, torch.bfloat16, CPU)[0] == "gram"
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


def block_lengths(steps: list[Coefficients], dtype: torch.dtype) -> list[int]:
    ends = [0]
    while ends[-1] < len(steps):
        ends.append(_end_of_block(steps, ends[-1], dtype))
    return [end - start for start, end in pairwise(ends)]


def test_the_gram_matrix_is_formed_anew_before_rounding_has_grown_too_much() -> None:
    assert block_lengths(schedule("jordan", 5), torch.float64) == [3, 2]
    assert block_lengths(schedule("jordan", 7), torch.float64) == [3, 3, 1]
    assert block_lengths(schedule("polar_express", 5), torch.float64) == [2, 2, 1]


def test_in_the_next_wider_precision_the_gram_matrix_is_formed_once() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        assert block_lengths(schedule("jordan", 5), dtype) == [5]
        assert block_lengths(schedule("jordan", 8), dtype) == [5, 3]
        assert block_lengths(schedule("polar_express", 5), dtype) == [4, 1]


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


def test_the_iteration_can_be_differentiated() -> None:
    small, large = random(40, 60, dtype=torch.float32), random(400, 450, dtype=torch.float32)
    for matrix in (small, large):
        matrix.requires_grad_()
        orthogonalize(matrix, dtype=torch.float32).sum().backward()
        assert matrix.grad is not None and matrix.grad.isfinite().all() and matrix.grad.any()


@pytest.mark.parametrize("shape", [(7, 40), (27, 64), (64, 64), (48, 200)])
def test_small_matrices_are_multiplied_in_float32(shape: tuple[int, int]) -> None:
    assert choose("auto", *shape, torch.bfloat16, CPU)[1] == torch.float32
    assert choose("auto", 65, 66, torch.bfloat16, CPU) == ("standard", torch.bfloat16)
    assert choose("auto", *shape, torch.float64, CPU) == ("standard", torch.float64)
    assert choose("auto", *shape, torch.bfloat16, torch.device("meta")) == ("standard", torch.bfloat16)
    matrix = random(*shape, dtype=torch.float32)
    exact = orthogonalize(matrix.double(), dtype=torch.float64)
    found = orthogonalize(matrix).double()
    # Half a unit of bfloat16 in the last place, and a little for float32.
    assert ((found - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()


@pytest.mark.parametrize("matrix_units", [False, True])
def test_the_choice_is_by_shape_dtype_and_device(matrix_units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newton_schulz, "_HAS_MATRIX_UNITS", matrix_units)

    def chosen(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, device: torch.device = CPU) -> str:
        return choose("auto", rows, columns, dtype, device)[0]

    large = "standard" if matrix_units else "gram"
    assert chosen(512, 4608) == chosen(512, 1536) == chosen(129, 600) == large
    assert chosen(64, 192) == chosen(128, 512) == "gram"
    assert chosen(512, 512) == chosen(65, 195) == chosen(511, 1536) == chosen(8, 400) == "standard"
    assert chosen(64, 576, torch.float32) == chosen(64, 576, torch.float64) == "standard"
    assert chosen(64, 576, device=torch.device("meta")) == "standard"


@pytest.mark.parametrize("shape", [(1, 160, 640), (2, 70, 80)])
def test_the_choice_can_be_traced_by_the_compiler(shape: tuple[int, ...]) -> None:
    stack = random(*shape, dtype=torch.float32)
    traced = torch.compile(orthogonalize_all, backend="eager", fullgraph=True, dynamic=False)
    (found,) = traced([stack], 5, "jordan", torch.bfloat16)
    assert torch.equal(found, orthogonalize(stack))


@pytest.mark.parametrize("shape", [(64, 576), (576, 64)])
def test_auto_uses_the_algorithm_chosen_by_shape(shape: tuple[int, int]) -> None:
    matrix = random(*shape, dtype=torch.float32)
    auto, gram, standard = (orthogonalize(matrix, algorithm=a) for a in ("auto", "gram", "standard"))
    assert torch.equal(auto, gram) and not torch.equal(auto, standard)


def test_an_unknown_algorithm_is_named() -> None:
    with pytest.raises(ValueError, match=r"algorithm .*'gram'.*got 'other'"):
        orthogonalize(torch.ones(3, 3), algorithm="other")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("algorithm", ["standard", "gram"])
def test_zeros_are_padded_to_share_a_batch_at_no_loss(
    dtype: torch.dtype, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(1, 100, 130), (2, 150, 98), (1, 128, 160), (1, 128, 90), (1, 20, 60), (1, 20, 59)]
    stacks = [random(*shape, dtype=torch.float32 if dtype != torch.float64 else dtype) for shape in shapes]
    together, calls = _shapes_multiplied(monkeypatch, stacks, dtype, algorithm)
    assert calls >= {(4, 128, 160), (1, 90, 128), (1, 20, 60), (1, 20, 59)}
    for stack, result in zip(stacks, together, strict=True):
        assert result.shape == stack.shape
        tolerance = 1e-12 if dtype == torch.float64 else 5e-2
        torch.testing.assert_close(
            result, orthogonalize(stack, dtype=dtype, algorithm=algorithm), rtol=0, atol=tolerance
        )


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
