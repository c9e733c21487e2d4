"""Two processes that see the same global gradient stay equal.

Every rank has all moments and makes the same updates.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ars2 import ARS2Neo
from tests.ars2.problems import SmallProblem, problem_groups
from tests.ars2.training import CORE_MODES, MODES, step_by_parts, worst_difference
from tests.helpers.launching import become, launch

STEPS = 8
RANKS = 2
TRIED = [*CORE_MODES, "random"]


def average_gradients(model: SmallProblem) -> None:
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= RANKS


def gathered(tensors: list[Tensor]) -> list[Tensor]:
    flat = torch.cat([t.detach().flatten().double() for t in tensors])
    parts = [torch.empty_like(flat) for _ in range(RANKS)]
    dist.all_gather(parts, flat)
    return parts


def phis_of_different_gradients(rank: int) -> list[float]:
    """Return AGA's phi step by step where the gradients of the ranks differ.

    The difference stands for one in rounding.
    """
    model = SmallProblem()
    optimizer = ARS2Neo(problem_groups(model), ns_dtype="float32", **MODES["aga"])
    assert not optimizer.decides_alike
    optimizer.distribute(dist.group.WORLD)
    assert optimizer.decides_alike
    phis = []
    for step in range(3):
        step_by_parts(model, optimizer, RANKS * step + rank)
        phis.append(optimizer.diagnostics()["phi"])
    return phis


def train_rank(rank: int, ranks: int, port: int, folder: Path) -> None:
    become(rank, ranks, port)
    dist.init_process_group("gloo")
    trained = {}
    for mode in TRIED:
        options = MODES[mode]
        torch.manual_seed(rank)  # nothing may depend on the generator of a rank
        model = SmallProblem()
        optimizer = ARS2Neo(problem_groups(model), ns_dtype="float32", **options)
        for step in range(STEPS):
            optimizer.zero_grad()
            model.loss(RANKS * step + rank).backward()  # each rank has a different batch
            average_gradients(model)
            again = optimizer.wants_second_pass()
            assert len({part.item() for part in gathered([torch.tensor([float(again)])])}) == 1, mode
            if again:
                optimizer.perturb()
                left, right = gathered(list(model.parameters()))
                assert torch.equal(left, right), f"{mode}, step {step}: the adversarial points differ"
                model.loss(RANKS * step + rank).backward()
                average_gradients(model)
                optimizer.restore()
            optimizer.step()
        left, right = gathered([*model.parameters(), *(t for s in optimizer.state.values() for t in s.values())])
        assert torch.equal(left, right), f"{mode}: parameters or moments differ"
        trained[mode] = [p.detach() for p in model.parameters()]
    torch.save({**trained, "phi": phis_of_different_gradients(rank)}, folder / f"{rank}.pt")
    dist.barrier()  # neither leaves while the other still talks
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    return launch(train_rank, RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def trained(both: list[dict[str, list[Tensor]]]) -> dict[str, list[Tensor]]:
    return both[0]


def test_ranks_that_share_work_use_the_same_phi_despite_rounding(
    both: list[dict[str, list[Tensor]]],
) -> None:
    first, second = (results["phi"] for results in both)
    assert first == second and first[-1] != 0


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_but_aga_decides_by_options_and_step_only(mode: str) -> None:
    assert ARS2Neo(problem_groups(SmallProblem()), **MODES[mode]).decides_alike == (MODES[mode]["mode"] != "aga")


class BothBatches(SmallProblem):
    """Average the losses of both ranks in one process.

    Its gradient is the mean of their gradients.
    """

    def loss(self, step: int) -> Tensor:
        return (super().loss(RANKS * step) + super().loss(RANKS * step + 1)) / RANKS


@pytest.mark.parametrize("mode", TRIED)
def test_ranks_stay_equal_and_match_one_process(mode: str, trained: dict[str, list[Tensor]]) -> None:
    model = BothBatches()
    optimizer = ARS2Neo(problem_groups(model), ns_dtype="float32", **MODES[mode])
    for step in range(STEPS):
        step_by_parts(model, optimizer, step)
    assert worst_difference(model.parameters(), trained[mode]) <= 5e-7  # in float32; measured: 0
