"""Define ordinary LightningModules, and fit them with TwoPass."""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torchmetrics.classification import MulticlassAccuracy

from ars2 import ARS2Neo, param_groups
from ars2.lightning import TwoPass
from tests.ars2.sharded_training import full
from tests.helpers.launching import become
from tests.modules.small_task import SmallNetwork, SmallTask, make_optimizer, state_of
from tests.modules.small_task import fit as fit_suite


class Ordinary(L.LightningModule):
    """Train the network of the suite's small task as a tutorial would."""

    def __init__(self, name: str, dropout: float = 0.0, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = SmallNetwork(dropout)
        self.accuracy = MulticlassAccuracy(3)
        self.make_optimizer = make_optimizer(name, **options)
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.network(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.accuracy(logits, batch[1])
        self.losses.append(loss.item())
        self.log("train/loss", loss, on_epoch=True, on_step=True)
        self.log_dict({"train/accuracy": self.accuracy}, on_epoch=True, on_step=True)
        return loss

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(param_groups(self.network))


class Shardable(Ordinary):
    """Train a network without statistics, which is sharded where there is a mesh."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 3))  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])


class Disagreeing(ARS2Neo):
    """Want second passes in the first process only, as rounding could have it."""

    decides_alike = always_two_pass = False  # type: ignore[assignment]

    def __init__(self, params: Any) -> None:
        super().__init__(params, mode="sync")

    def wants_second_pass(self, grad_scale: float = 1.0) -> bool:
        return super().wants_second_pass() and torch.distributed.get_rank() == 0


def fit_sharded(name: str, ranks: int) -> dict[str, Tensor]:
    """Return the complete parameters after training on so many processes."""
    module = Shardable(name, ns_dtype="float32")
    strategy = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1) if ranks > 1 else "auto"
    fit(module, strategy=strategy, devices=ranks, accumulate_grad_batches=2)
    return {key: full(param.detach()) for key, param in module.network.named_parameters()}


def fit(module: L.LightningModule, epochs: int = 2, callbacks: Any = (), **options: Any) -> tuple[L.Trainer, TwoPass]:
    """Fit with the callback, on the batches of the suite's small task."""
    two_pass = TwoPass()
    trainer: L.Trainer = fit_suite(module, epochs, callbacks=[two_pass, *callbacks], **options)  # type: ignore[arg-type]
    return trainer, two_pass


def both(
    name: str, dropout: float = 0.0, suite: dict[str, Any] | None = None, trainer: Any = dict, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the states of an ordinary and a suite module after the same training.

    Args:
        name: of the optimizer.
        dropout: of the network.
        suite: options of the suite's module.
        trainer: returns options of a Trainer, new ones in each call.
        options: of the ordinary module's Trainer alone.
    """
    ordinary, task = Ordinary(name, dropout), SmallTask(dropout, optimizer=make_optimizer(name), **(suite or {}))
    _, two_pass = fit(ordinary, **trainer(), **options)
    reference = fit_suite(task, **trainer())
    assert two_pass.gradient_evaluations == task.gradient_evaluations
    # Lightning counts a step that a gradient scaler skips.
    assert ordinary.trainer.global_step == reference.global_step + task.skipped_steps
    return state_of(ordinary), state_of(task)  # type: ignore[arg-type]


def together(rank: int, ranks: int, port: int, folder: Path, names: list[str]) -> None:
    """Train as one of ``ranks`` processes; save the states of both modules."""
    become(rank, ranks, port)
    results: dict[str, Any] = {}
    for name in names:
        trainer = {"strategy": "ddp", "devices": ranks}
        results[name] = both(name, 0.3, {"accumulate_grad_batches": 2}, lambda t=trainer: t, accumulate_grad_batches=2)
    results["sharded"] = {name: fit_sharded(name, ranks) for name in names}
    disagreeing = Ordinary("sync")
    disagreeing.make_optimizer = Disagreeing
    _, two_pass = fit(disagreeing, strategy="ddp", devices=ranks)
    results["disagreeing"] = two_pass.gradient_evaluations
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
