"""A subclass replaces the orthogonal factors of a step."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ars2 import ARS2Neo, Muon
from tests.ars2.reference import polar_factor
from tests.helpers.launching import become, launch

LR = 0.1
SHAPES = [(4, 6), (9, 4), (2, 3, 5), (5, 2, 3, 3)]
SEEN = [(1, 4, 6), (1, 9, 4), (2, 3, 5), (1, 5, 18)]


class Polar:
    """Use exact orthogonal factors, and record the shapes of the stacks."""

    seen: list[tuple[int, ...]]

    def orthogonalize(self, stacks: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        self.__dict__.setdefault("seen", []).extend(tuple(stack.shape) for stack in stacks)
        return [torch.stack([polar_factor(matrix) for matrix in stack]) for stack in stacks]


class PolarARS2(Polar, ARS2Neo):
    pass


class PolarMuon(Polar, Muon):
    pass


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in SHAPES]


def step(cls: Any, params: list[nn.Parameter], group: dict[str, Any] | None = None) -> tuple[list[Tensor], Any]:
    """Return how the parameters move in a first step, over the learning rate."""
    optimizer = cls([{"params": params, **(group or {})}], lr=LR, weight_decay=0.0, ns_dtype="float64")
    before = [param.detach().clone() for param in params]
    if dist.is_initialized():
        optimizer.distribute(dist.group.WORLD)
    for index, param in enumerate(params):
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
    optimizer.step()
    return [(old - new.detach()) / LR for old, new in zip(before, params, strict=True)], optimizer


@pytest.mark.parametrize("cls", [PolarARS2, PolarMuon])
def test_a_step_uses_the_factors_of_a_subclass(cls: Any) -> None:
    moves, optimizer = step(cls, parameters())
    assert sorted(optimizer.seen) == sorted(SEEN)
    for move, shape in zip(moves, SEEN, strict=True):
        values = torch.linalg.svdvals(move.reshape(shape))
        torch.testing.assert_close(values, values.max().expand_as(values), rtol=1e-10, atol=0)
    # Newton-Schulz only comes near.
    plain = torch.linalg.svdvals(step(cls.__mro__[2], parameters())[0][0])
    assert (plain - plain.max()).abs().max() > 1e-3


@pytest.mark.parametrize("cls", [PolarARS2, PolarMuon])
def test_the_blocks_of_fused_weights_are_separate_stacks(cls: Any) -> None:
    param = nn.Parameter(torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    (move,), optimizer = step(cls, [param], {"splits": (6, 4, 2)})
    assert sorted(optimizer.seen) == [(1, 2, 5), (1, 4, 5), (1, 6, 5)]
    for block in move.split([6, 4, 2]):
        values = torch.linalg.svdvals(block)
        torch.testing.assert_close(values, values.max().expand_as(values), rtol=1e-10, atol=0)


@pytest.mark.parametrize("cls", [ARS2Neo, Muon])
@pytest.mark.parametrize(
    ("shape", "flatten", "same_as"),
    [((1, 1, 4, 6), False, (4, 6)), ((1, 1, 4, 6), True, (1, 24)), ((1, 1, 1, 4, 6), False, (1, 4, 6))],
)
def test_leading_unit_dimensions_are_left_out(
    cls: Any, shape: tuple[int, ...], flatten: bool, same_as: tuple[int, ...]
) -> None:
    start = torch.randn(4, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (move,), _ = step(cls, [nn.Parameter(start.reshape(shape))], {"flatten": flatten})
    (expected,), _ = step(cls, [nn.Parameter(start.reshape(same_as))])
    (other,), _ = step(cls, [nn.Parameter(start.reshape((4, 6) if flatten else (1, 24)))])
    torch.testing.assert_close(move.flatten(), expected.flatten(), rtol=1e-12, atol=1e-14)
    assert (move.flatten() - other.flatten()).abs().max() > 1e-2


def on_rank(rank: int, ranks: int, port: int, folder: Path) -> None:
    become(rank, ranks, port)
    dist.init_process_group("gloo")
    moves, optimizer = step(PolarARS2, parameters())
    fused, _ = step(PolarARS2, parameters()[:1], {"splits": (1, 3)})
    torch.save(([*moves, *fused], getattr(optimizer, "seen", [])), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_each_rank_orthogonalises_the_matrices_that_it_owns(tmp_path: Path) -> None:
    (first, seen), (second, seen_by_second) = launch(on_rank, 2, tmp_path)
    assert sorted(seen + seen_by_second) == sorted(SEEN) and seen and seen_by_second
    one_process = [*step(PolarARS2, parameters())[0], *step(PolarARS2, parameters()[:1], {"splits": (1, 3)})[0]]
    for here, there, alone in zip(first, second, one_process, strict=True):
        assert torch.equal(here, there)
        torch.testing.assert_close(here, alone, rtol=1e-12, atol=1e-14)
