"""Sharing Newton-Schulz among processes gives every rank the same result.

It is the one that one process would compute.
"""

from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ars2.orthogonalize import orthogonalize_all
from ars2.sharing import assign_to_ranks, newton_schulz_cost, orthogonalize_replicated, orthogonalize_sharded
from tests.helpers.launching import become, launch

# Fewer tensors than ranks is a case too; 2 rows over 3 ranks leave one without any.
SHAPES = [(1, 6, 4), (3, 2, 5), (1, 2, 9), (1, 16, 16), (1, 1, 1)]


def stacks(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


def newton_schulz(matrices: list[Tensor]) -> list[Tensor]:
    return orthogonalize_all(matrices, 5, "jordan", torch.float64)


def by_rows(rows: int, ranks: int) -> list[int]:
    """Return the rows of each rank, as torch.chunk splits them.

    They are uneven, and the last ranks may have none.
    """
    parts = [len(part) for part in torch.arange(rows).chunk(ranks)]
    return parts + [0] * (ranks - len(parts))


def on_rank(rank: int, ranks: int, port: int, folder: Path) -> None:
    become(rank, ranks, port)
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    seen: list[int] = []

    def count(matrices: list[Tensor]) -> list[Tensor]:
        seen.append(len(matrices))
        return newton_schulz(matrices)

    replicated = orthogonalize_replicated(stacks(), count, torch.float64, group)
    rounded = orthogonalize_replicated(stacks(), newton_schulz, torch.bfloat16, group)
    one = orthogonalize_replicated(stacks()[:1], newton_schulz, torch.float64, group)
    shards, numels = [], []
    for stack in stacks():
        flat = stack.flatten(0, 1)
        rows = by_rows(len(flat), ranks)
        shards.append(flat.split(rows)[rank])
        numels.append([count * flat.shape[1] for count in rows])
    shapes = [torch.Size(shape) for shape in SHAPES]
    sharded = orthogonalize_sharded(shards, shapes, numels, count, torch.float64, group)
    torch.save((replicated, rounded, one, sharded, seen), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_every_rank_gets_the_result_of_one_process(ranks: int, tmp_path: Path) -> None:
    found = launch(on_rank, ranks, tmp_path)
    alone = newton_schulz(stacks())
    for replicated, rounded, one, _, _ in found:
        for here, there, full in zip(replicated, found[0][0], alone, strict=True):
            assert torch.equal(here, there)
            assert (here - full).abs().max() < 1e-12
        for here, full in zip(rounded, replicated, strict=True):
            assert torch.equal(here, full.to(torch.bfloat16))
        assert len(one) == 1 and (one[0] - alone[0]).abs().max() < 1e-12
    for index, full in enumerate(alone):
        together = torch.cat([sharded[index] for _, _, _, sharded, _ in found])
        assert (together - full.flatten()).abs().max() < 1e-12
    # Nothing was computed twice.
    for call in (0, 1):
        assert sum(seen[call] for *_, seen in found) == len(SHAPES)


def test_work_is_shared_out_by_cost_and_not_by_count() -> None:
    costs = [newton_schulz_cost(1, 512, 4608), *[newton_schulz_cost(1, 64, 64)] * 6]
    owner = assign_to_ranks(costs, 2)
    assert owner[0] == 0 and set(owner[1:]) == {1}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_no_rank_has_a_third_more_work_than_need_be(ranks: int) -> None:
    generator = torch.Generator().manual_seed(ranks)
    for _ in range(20):
        costs: list[int] = torch.randint(1, 100, (6,), generator=generator).tolist()
        owner = assign_to_ranks(costs, ranks)

        def greatest(owner: tuple[int, ...] | list[int], costs: list[int] = costs) -> int:
            return max(sum(cost for cost, one in zip(costs, owner, strict=True) if one == r) for r in range(ranks))

        best = min(greatest(other) for other in product(range(ranks), repeat=6))
        assert greatest(owner) <= (4 / 3 - 1 / (3 * ranks)) * best


def test_the_cost_of_a_matrix_is_that_of_its_transpose() -> None:
    assert newton_schulz_cost(2, 3, 7) == newton_schulz_cost(2, 7, 3) == 2 * 9 * (14 + 3)
