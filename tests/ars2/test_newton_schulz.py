"""The two Newton-Schulz algorithms: equal in float64, Gram no less accurate than standard where it is used."""

import pytest
import torch
from torch import Tensor

from ars2 import orthogonalize
from ars2.newton_schulz import COEFFICIENTS, _blocks, faster_algorithm, schedule
from ars2.orthogonalize import orthogonalize_all
from benchmarks.newton_schulz import relative_errors
from tests.ars2.reference import reference_newton_schulz

SHAPES = [(24, 216), (64, 576), (40, 40), (128, 512), (96, 48)]


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_gram_is_the_reference_in_float64(shape: tuple[int, int], steps: int) -> None:
    matrix = random(*shape)
    result = orthogonalize(matrix, steps, dtype=torch.float64, algorithm="gram")
    # Measured: 3.5e-15. Without forming A anew, rounding would be amplified by 3.4445^2 a step.
    assert (result - reference_newton_schulz(matrix, steps)).abs().max() <= 5e-14


@pytest.mark.parametrize("steps", [1, 3, 5, 9])
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_gram_is_standard_under_every_schedule(coefficients: str, steps: int) -> None:
    matrix = random(3, 32, 160)
    standard, gram = (
        orthogonalize(matrix, steps, coefficients, torch.float64, algorithm) for algorithm in ("standard", "gram")
    )
    assert (standard - gram).abs().max() <= 5e-14


@pytest.mark.parametrize("shape", [(64, 576), (128, 1152), (256, 1024)])
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


def test_the_choice_is_by_shape_dtype_and_device() -> None:
    cpu = torch.device("cpu")
    assert faster_algorithm(512, 4608, torch.bfloat16, cpu) == "gram"
    assert faster_algorithm(512, 512, torch.bfloat16, cpu) == "standard"
    assert faster_algorithm(8, 400, torch.bfloat16, cpu) == "standard"
    assert faster_algorithm(512, 4608, torch.float32, cpu) == "standard"
    assert faster_algorithm(512, 4608, torch.float64, cpu) == "standard"
    assert faster_algorithm(512, 4608, torch.bfloat16, torch.device("meta")) == "standard"


@pytest.mark.parametrize("shape", [(64, 576), (576, 64)])
def test_auto_takes_what_the_choice_says(shape: tuple[int, int]) -> None:
    matrix = random(*shape, dtype=torch.float32)
    auto, gram, standard = (orthogonalize(matrix, algorithm=a) for a in ("auto", "gram", "standard"))
    assert torch.equal(auto, gram) and not torch.equal(auto, standard)


def test_an_unknown_algorithm_is_named() -> None:
    with pytest.raises(ValueError, match=r"algorithm must be one of .*'gram'.*got 'other'"):
        orthogonalize(torch.ones(3, 3), algorithm="other")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_columns_are_padded_to_share_a_batch_at_no_loss(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(1, 20, 60), (2, 57, 20), (1, 20, 55), (1, 20, 40)]
    stacks = [random(*shape, dtype=torch.float32 if dtype != torch.float64 else dtype) for shape in shapes]
    calls: list[tuple[int, ...]] = []
    bmm = torch.bmm

    def counting(left: Tensor, right: Tensor) -> Tensor:
        calls.append(tuple(left.shape))
        return bmm(left, right)

    monkeypatch.setattr(torch, "bmm", counting)
    together = orthogonalize_all(stacks, 5, "jordan", dtype)
    assert set(calls) == {(4, 20, 60), (1, 20, 40)}
    monkeypatch.undo()
    for stack, result in zip(stacks, together, strict=True):
        assert result.shape == stack.shape
        tolerance = 1e-13 if dtype == torch.float64 else 5e-2
        torch.testing.assert_close(result, orthogonalize(stack, dtype=dtype), rtol=0, atol=tolerance)
