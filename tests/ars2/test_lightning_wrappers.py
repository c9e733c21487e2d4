"""The optimizers work behind the wrappers of Fabric and Lightning."""

from collections.abc import Callable

import lightning.fabric
import lightning.pytorch as L
import pytest
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer

from ars2 import ARS2Neo
from tests.ars2.problems import SmallProblem
from tests.ars2.training import assert_identical, setup, snapshot, step_by_parts


def by_fabric(model: SmallProblem, optimizer: ARS2Neo) -> ARS2Neo:
    fabric = lightning.fabric.Fabric(accelerator="cpu", devices=1)
    fabric.setup_module(model)
    wrapped = fabric.setup_optimizers(optimizer)
    assert wrapped is not optimizer and isinstance(wrapped, ARS2Neo)
    return wrapped


def by_lightning(model: SmallProblem, optimizer: ARS2Neo) -> ARS2Neo:
    module = L.LightningModule()
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
    module.trainer.strategy.connect(module)
    wrapped = LightningOptimizer._to_lightning_optimizer(optimizer, module.trainer.strategy)
    assert isinstance(wrapped, ARS2Neo)
    return wrapped


@pytest.mark.parametrize(
    ("mode", "wrap"), [("base", by_lightning), ("sync", by_fabric), ("aga", by_lightning), ("aga", by_fabric)]
)
def test_the_separate_calls_work_on_a_wrapper(mode: str, wrap: Callable[[SmallProblem, ARS2Neo], ARS2Neo]) -> None:
    (model, optimizer), (plain, plain_optimizer) = setup(mode), setup(mode)
    wrapped = wrap(model, optimizer)
    for step in range(6):
        assert step_by_parts(model, wrapped, step) == step_by_parts(plain, plain_optimizer, step)
        assert wrapped.diagnostics() == plain_optimizer.diagnostics()
    assert_identical(snapshot(optimizer), snapshot(plain_optimizer))


@pytest.mark.parametrize(("mode", "wrap"), [("sync", by_lightning), ("aga", by_fabric)])
def test_the_wrapper_and_the_optimizer_may_take_turns(
    mode: str, wrap: Callable[[SmallProblem, ARS2Neo], ARS2Neo]
) -> None:
    model, optimizer = setup(mode)
    wrapped = wrap(model, optimizer)
    model.loss(0).backward()
    assert wrapped.wants_second_pass()
    optimizer.perturb()
    with pytest.raises(RuntimeError, match=r"call restore\(\) first"):
        wrapped.wants_second_pass()
    assert wrapped.first_gradients
    model.loss(0).backward()
    wrapped.restore()
    optimizer.step()
    assert not wrapped.first_gradients


@pytest.mark.parametrize("wrap", [by_fabric, by_lightning])
def test_distribute_on_a_wrapper_distributes_the_optimizer(
    wrap: Callable[[SmallProblem, ARS2Neo], ARS2Neo],
) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, optimizer = setup("aga")
        wrapped = wrap(model, optimizer)
        assert not optimizer.decides_alike
        wrapped.distribute(dist.group.WORLD)
        assert optimizer.decides_alike
    finally:
        dist.destroy_process_group()
