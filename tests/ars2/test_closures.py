"""Closures handle gradients of earlier backward passes correctly.

Zeroed gradients do not count, and those that the closure adds to are not lost.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ars2 import ARS2Neo, Muon
from tests.ars2.problems import SmallProblem, problem_groups
from tests.ars2.test_efficiency import count, reads
from tests.ars2.training import CORE_MODES, MODES, assert_identical, closure_of, same, setup, snapshot
from tests.helpers.launching import alone

ADDS = r"step\(closure\): the closure adds to gradients of earlier backward passes"


def adding_closure(model: SmallProblem, step: int, create_graph: bool = False) -> Callable[[], Tensor]:
    """Return a closure that zeroes nothing."""

    def closure() -> Tensor:
        loss = model.loss(step)
        loss.backward(create_graph=create_graph)
        return loss.detach()

    return closure


# --- gradients that are added to ---


@pytest.mark.parametrize("name", ["base", "muon"])
def test_one_evaluation_adds_to_the_gradients_that_it_finds(name: str) -> None:
    def new() -> tuple[SmallProblem, Optimizer]:
        if name == "base":
            return setup("base")
        model = SmallProblem()
        return model, Muon(problem_groups(model), ns_dtype="float32")

    model, optimizer = new()
    model.loss(0).backward()
    optimizer.step(adding_closure(model, 1))
    other, other_optimizer = new()
    other.loss(0).backward()
    other.loss(1).backward()
    other_optimizer.step()
    assert_identical(snapshot(other_optimizer), snapshot(optimizer))


def test_a_one_pass_step_of_a_two_pass_mode_adds_to_gradients_too() -> None:
    model, optimizer = setup("periodic")
    other, other_optimizer = setup("periodic")
    for each, its_optimizer in ((model, optimizer), (other, other_optimizer)):
        its_optimizer.step(closure_of(each, its_optimizer, 0))
        its_optimizer.zero_grad()
        each.loss(1).backward()
    optimizer.step(adding_closure(model, 2))
    other.loss(2).backward()
    assert not other_optimizer.wants_second_pass()
    other_optimizer.step()
    assert_identical(snapshot(other_optimizer), snapshot(optimizer))


@pytest.mark.parametrize(("mode", "create_graph"), [("sync", True), ("aga", False)])
def test_two_evaluations_cannot_add_to_the_gradients_that_they_find(mode: str, create_graph: bool) -> None:
    model, optimizer = setup(mode)
    model.loss(0).backward()
    before = snapshot(optimizer)
    both = [grad * 2 for grad in before["grads"]]
    with pytest.raises(RuntimeError, match=ADDS):
        optimizer.step(adding_closure(model, 0, create_graph))
    after = snapshot(optimizer)
    assert same(both, [grad.detach() for grad in after.pop("grads")])
    before.pop("grads")
    assert_identical(before, after)


def test_two_evaluations_cannot_add_to_gradients_of_the_step_before() -> None:
    model, optimizer = setup("sync")
    optimizer.step(adding_closure(model, 0))
    with pytest.raises(RuntimeError, match=ADDS):
        optimizer.step(adding_closure(model, 1))


def test_a_closure_that_adds_to_some_gradients_only_is_an_error_too() -> None:
    model, optimizer = setup("sync")
    model.loss(0).backward()

    def closure() -> None:
        model.tall.zero_grad()
        model.loss(1).backward()

    with pytest.raises(RuntimeError, match=ADDS):
        optimizer.step(closure)


@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_])
def test_clipping_in_the_closure_does_not_hide_it(clip: Callable[..., Any]) -> None:
    model, optimizer = setup("sync")
    model.loss(0).backward()

    def closure() -> None:
        model.loss(1).backward()
        clip(model.parameters(), 1e-3)

    with pytest.raises(RuntimeError, match=ADDS):
        optimizer.step(closure)


def test_gradients_of_sharded_parameters_cannot_be_added_to_either() -> None:
    def step(zeroes: bool) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = ARS2Neo(
            [{"params": [p], "track": "matrix" if p.ndim == 2 else "vector"} for p in model.parameters()],
            mode="sync",
        )

        def closure() -> None:
            if zeroes:
                optimizer.zero_grad(set_to_none=False)
            model(torch.ones(2, 4)).square().sum().backward()

        model(torch.ones(2, 4)).sum().backward()
        optimizer.step(closure)

    with alone():
        step(zeroes=True)
        with pytest.raises(RuntimeError, match=ADDS):
            step(zeroes=False)


# --- gradients that are zeroed ---

ZERO: dict[str, Callable[[SmallProblem, ARS2Neo], None]] = {
    "optimizer, None": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer, in place": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model, None": lambda model, optimizer: model.zero_grad(),
    "model, in place": lambda model, optimizer: model.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize(("mode", "how"), [*(("sync", how) for how in ZERO), ("base", "model, in place")])
def test_zeroed_gradients_do_not_count(mode: str, how: str) -> None:
    model, optimizer = setup(mode)
    other, other_optimizer = setup(mode)
    model.loss(7).backward()
    for step in range(4):

        def closure(step: int = step) -> None:
            ZERO[how](model, optimizer)
            model.loss(step).backward()

        optimizer.step(closure)
        other_optimizer.step(closure_of(other, other_optimizer, step))
    assert_identical(snapshot(other_optimizer), snapshot(optimizer))


@pytest.mark.parametrize("mode", CORE_MODES)
def test_without_gradients_before_it_a_closure_need_not_zero_them(mode: str) -> None:
    model, optimizer = setup(mode)
    other, other_optimizer = setup(mode)
    for step in range(4):
        optimizer.zero_grad()
        optimizer.step(adding_closure(model, step))
        other_optimizer.step(closure_of(other, other_optimizer, step))
    assert_identical(snapshot(other_optimizer), snapshot(optimizer))


def test_the_check_reads_the_device_only_where_gradients_stay_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, optimizer = setup("sync")
    optimizer.step(closure_of(model, optimizer, 0))
    assert reads(count(monkeypatch, lambda: optimizer.step(closure_of(model, optimizer, 1)), optimizer)) == 0

    def closure() -> None:
        optimizer.zero_grad(set_to_none=False)
        model.loss(2).backward()

    assert reads(count(monkeypatch, lambda: optimizer.step(closure), optimizer)) == 1


# --- a Trainer's closures ---


class Automatic(L.LightningModule):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.problem, self.mode = SmallProblem(), mode

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.problem.loss(index)

    def configure_optimizers(self) -> ARS2Neo:
        return ARS2Neo(problem_groups(self.problem), ns_dtype="float32", **MODES[self.mode])


def fit(mode: str, **options: Any) -> Automatic:
    module = Automatic(mode)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    L.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet, **options).fit(
        module, DataLoader([0.0] * 4)
    )
    return module


@pytest.mark.parametrize("clipping", [{}, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}])
def test_lightning_accumulates_in_one_pass_and_not_in_two(clipping: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=f"{ADDS}.*accumulate_grad_batches"):
        fit("sync", accumulate_grad_batches=2, **clipping)


def test_the_closure_of_lightning_is_treated_like_any_other() -> None:
    model, optimizer = setup("sync")
    for step in range(4):
        optimizer.step(closure_of(model, optimizer, step))
    assert same(model.parameters(), fit("sync").problem.parameters())
    model, optimizer = setup("base")
    for step in (0, 2):
        optimizer.zero_grad()
        (model.loss(step) / 2).backward()
        (model.loss(step + 1) / 2).backward()
        optimizer.step()
    assert same(model.parameters(), fit("base", accumulate_grad_batches=2).problem.parameters())
