"""Sharing Newton-Schulz among processes gives every rank the same result.

It is the one that one process would compute.
"""

from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ars2.distributed import Local, Replicated, Sharded, assign_to_ranks, newton_schulz_cost
from ars2.orthogonalize import orthogonalize_all, stack_shape
from tests.helpers.launching import become, launch

# Fewer tensors than ranks is a case too; 2 rows over 3 ranks leave one without any.
SHAPES = [torch.Size(shape) for shape in ((6, 4), (3, 2, 5), (2, 9), (16, 16), (1, 1))]
STACKED = [stack_shape(shape, flatten=False) for shape in SHAPES]


def tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


def newton_schulz(matrices: list[Tensor]) -> list[Tensor]:
    return orthogonalize_all(matrices, 5, "jordan", torch.float64)


def on_rank(rank: int, ranks: int, port: int, folder: Path) -> None:
    become(rank, ranks, port)
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    seen: list[int] = []

    def count(matrices: list[Tensor]) -> list[Tensor]:
        seen.append(len(matrices))
        return newton_schulz(matrices)

    exact, rounding = Replicated(group), Replicated(group, torch.bfloat16)
    replicated = exact.orthogonalize(tensors(), SHAPES, STACKED, count, torch.float64)
    rounded = rounding.orthogonalize(tensors(), SHAPES, STACKED, newton_schulz, torch.float64)
    one = exact.orthogonalize(tensors()[:1], SHAPES[:1], STACKED[:1], newton_schulz, torch.float64)
    # Uneven rows, as torch.chunk splits them; the last ranks may have none.
    parts = [tensor.chunk(ranks) for tensor in tensors()]
    shards = [part[rank] if rank < len(part) else part[0][:0] for part in parts]
    sharded = Sharded(group).orthogonalize(shards, SHAPES, STACKED, count, torch.float64)
    numbers = torch.full((2,), float(rank + 1))
    Sharded(group).reduce_(numbers)
    agreed = torch.full((2,), float(rank + 1))
    exact.agree_(agreed)
    torch.save((replicated, rounded, one, sharded, seen, numbers, agreed), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_every_rank_gets_the_result_of_one_process(ranks: int, tmp_path: Path) -> None:
    found = launch(on_rank, ranks, tmp_path)
    alone = Local().orthogonalize(tensors(), SHAPES, STACKED, newton_schulz, torch.float64)
    for replicated, rounded, one, *_ in found:
        for here, there, full in zip(replicated, found[0][0], alone, strict=True):
            assert torch.equal(here, there)
            assert (here - full).abs().max() < 1e-12
        for here, full in zip(rounded, replicated, strict=True):
            assert torch.equal(here, full.to(torch.bfloat16))
        assert len(one) == 1 and (one[0] - alone[0]).abs().max() < 1e-12
    for index, full in enumerate(alone):
        together = torch.cat([sharded[index] for _, _, _, sharded, *_ in found])
        assert (together - full).abs().max() < 1e-12
    # Nothing was computed twice.
    for call in (0, 1):
        assert sum(seen[call] for *_, seen, _, _ in found) == len(SHAPES)
    for *_, numbers, agreed in found:
        assert numbers.tolist() == [ranks * (ranks + 1) / 2] * 2 and agreed.tolist() == [1.0, 1.0]


def test_work_is_shared_out_by_cost_and_not_by_count() -> None:
    costs = [newton_schulz_cost(1, 512, 4608), *[newton_schulz_cost(1, 64, 64)] * 6]
    assert assign_to_ranks(costs, 2) == [[0], [1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_no_rank_has_a_third_more_work_than_need_be(ranks: int) -> None:
    generator = torch.Generator().manual_seed(ranks)
    for _ in range(20):
        costs: list[int] = torch.randint(1, 100, (6,), generator=generator).tolist()
        owned = assign_to_ranks(costs, ranks)
        assert sorted(index for indices in owned for index in indices) == list(range(6))
        greatest = max(sum(costs[index] for index in indices) for indices in owned)
        best = min(
            max(sum(cost for cost, one in zip(costs, owner, strict=True) if one == r) for r in range(ranks))
            for owner in product(range(ranks), repeat=6)
        )
        assert greatest <= (4 / 3 - 1 / (3 * ranks)) * best


def test_the_cost_of_a_matrix_is_that_of_its_transpose() -> None:
    assert newton_schulz_cost(2, 3, 7) == newton_schulz_cost(2, 7, 3) == 2 * 9 * (14 + 3)
