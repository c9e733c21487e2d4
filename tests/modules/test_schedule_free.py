"""The module switches a schedule-free optimizer to evaluation parameters.

Such an optimizer trains at other parameters than it is evaluated at.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from pytorch_optimizer import ScheduleFreeAdamW
from torch import Tensor, nn

from ars2 import param_groups
from tests.modules.small_task import (
    SmallNetwork,
    SmallTask,
    assert_equal_states,
    batches,
    data,
    fit,
    make_optimizer,
    state_of,
)


def make(params: Any) -> torch.optim.Optimizer:
    return ScheduleFreeAdamW(params, lr=1e-2)


def by_hand(epochs: int) -> tuple[nn.Module, list[float]]:
    """Train as the optimizer's authors describe.

    Return the network to evaluate, and its losses after each epoch.
    """
    torch.manual_seed(0)
    network = SmallNetwork()
    optimizer: Any = make(param_groups(network))
    loader, losses = batches(), []
    for _ in range(epochs):
        network.train()
        optimizer.train()
        for images, classes in loader:
            optimizer.zero_grad()
            F.cross_entropy(network(images), classes).backward()
            optimizer.step()
        network.eval()
        optimizer.eval()
        losses.append(F.cross_entropy(network(data()[0]), data()[1]).item())
    return network, losses


class Validates(L.Callback):
    """Record evaluation losses at the end of each epoch, as probing callbacks do."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.network.eval()
        self.losses.append(F.cross_entropy(pl_module.network(data()[0]), data()[1]).item())
        pl_module.network.train()


@pytest.mark.parametrize("resumed", [False, True])
def test_a_schedule_free_optimizer_is_evaluated_at_its_averaged_parameters(resumed: bool, tmp_path: Path) -> None:
    network, losses = by_hand(4)
    seen = Validates()
    module = SmallTask(optimizer=make)
    checkpoint = ModelCheckpoint(tmp_path, filename="end", save_on_train_epoch_end=True)
    fit(module, 2 if resumed else 4, enable_checkpointing=True, callbacks=[checkpoint, seen])  # type: ignore[arg-type]
    if resumed:
        module = SmallTask(optimizer=make)
        fit(module, 4, ckpt_path=str(tmp_path / "end.ckpt"), callbacks=[seen])  # type: ignore[arg-type]
    assert seen.losses == pytest.approx(losses, rel=1e-6)
    for actual, expected in zip(module.network.parameters(), network.parameters(), strict=True):
        assert torch.allclose(actual, expected, rtol=1e-6, atol=1e-7)
    if not resumed:
        saved: dict[str, Tensor] = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
        assert torch.equal(saved["network.head.weight"], module.network.head.weight)


class SavesWithinAnEpoch(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 9:  # the third batch of the second epoch
            trainer.save_checkpoint(self.path)


def test_a_checkpoint_within_an_epoch_has_evaluation_parameters_and_resumes_exactly(tmp_path: Path) -> None:
    path = tmp_path / "within.ckpt"
    uninterrupted, saving, again = (SmallTask(optimizer=make) for _ in range(3))
    fit(uninterrupted, 3)
    fit(saving, 3, callbacks=[SavesWithinAnEpoch(path)])  # type: ignore[arg-type]
    fit(again, 3, ckpt_path=str(path))  # type: ignore[arg-type]
    for module in (saving, again):
        assert_equal_states(state_of(module), state_of(uninterrupted))
    evaluated: Any = make(param_groups(network := SmallNetwork()))
    checkpoint = torch.load(path, weights_only=True)
    network.load_state_dict(
        {key.removeprefix("network."): v for key, v in checkpoint["training_parameters"].items()}, strict=False
    )
    evaluated.load_state_dict(checkpoint["optimizer_states"][0])
    evaluated.eval()
    loaded = SmallTask.load_from_checkpoint(path).network
    for name, param in network.named_parameters():
        assert torch.equal(loaded.get_parameter(name), param)
        assert not torch.equal(checkpoint["training_parameters"][f"network.{name}"], param)


def test_checkpoints_of_other_optimizers_have_no_extra_weights(tmp_path: Path) -> None:
    fit(SmallTask(optimizer=make_optimizer("sync")), callbacks=[SavesWithinAnEpoch(tmp_path / "run.ckpt")])  # type: ignore[arg-type]
    assert "training_parameters" not in torch.load(tmp_path / "run.ckpt", weights_only=True)


def test_parameters_that_are_averaged_already_are_not_averaged_by_a_callback() -> None:
    with pytest.raises(ValueError, match="WeightAveraging would average parameters that ScheduleFreeAdamW does not"):
        fit(SmallTask(optimizer=make), callbacks=[WeightAveraging()])
