"""Count the collectives and the host reads of every step of a short fit."""

import os
import signal
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from ars2 import ARS2Neo
from callbacks.last_checkpoint import LastCheckpoint, Stopped, StopSignals
from datamodules.modular_addition import ModularAdditionData
from modules.modular_addition import ModularAddition
from tests.helpers.dispatched import Dispatched
from tests.modules.small_task import OPTIMIZERS, make_optimizer


class CountsTokens(ModularAddition):
    """Count units that its loader does not know."""

    def batch_size(self, batch: Any) -> int:
        return 2 * len(batch[0])


class Votes(ARS2Neo):
    """Lack the optional attributes, and request second passes on the last rank alone."""

    never_two_pass = always_two_pass = decides_alike = False

    def wants_second_pass(self, *arguments: Any) -> bool:
        return super().wants_second_pass(*arguments) and os.environ.get("RANK", "1") == "1"


# Options of the fits. Of four batches the last is a separate window where three accumulate.
FITS: dict[str, dict[str, Any]] = {
    **{name: {"optimizer": make_optimizer(name)} for name in OPTIMIZERS},
    "local": {"optimizer": make_optimizer("sync"), "local_first_pass": True},
    "accumulated": {"optimizer": make_optimizer("sync"), "accumulate_grad_batches": 3},
    "other units": {"optimizer": make_optimizer("base"), "module": CountsTokens},
    "votes": {"optimizer": lambda params: Votes(params, lr=1e-2, mode="periodic", k=3)},
    "scaled": {"optimizer": make_optimizer("sync"), "precision": "16-mixed"},
}
COLLECTIVES = {
    "c10d.allreduce_.default": "all_reduce",
    "c10d._reduce_scatter_base_.default": "reduce_scatter",
    "c10d._allgather_base_.default": "all_gather of parameters",
    "c10d.allgather_.default": "all_gather",
    "c10d.alltoall_base_.default": "all_to_all",
    "c10d.broadcast_.default": "broadcast",
    "c10d.barrier.default": "barrier",
}
# Each makes the device wait for Python.
READS = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default", "tolist")


def counted(operations: Dispatched) -> dict[str, int]:
    """Return the numbers of collectives and of host reads.

    The all-reduces of gradients, which a backward pass makes, are separate.
    """
    found = Counter(COLLECTIVES[name] for name in operations.names if name in COLLECTIVES)
    gradients = operations.in_backward.count("c10d.allreduce_.default")
    found["all_reduce"] -= gradients
    found["all_reduce of gradients"] = gradients
    found["read"] = sum(name in READS for name in operations.names)
    return {name: count for name, count in found.items() if count}


class Exchanges(L.Callback):
    """Count from each batch's start to the next one's, in the second epoch.

    All buffers are laid out by then.
    """

    def __init__(self) -> None:
        self.operations: Dispatched | None = None
        self.steps: list[dict[str, int]] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._close()
        if trainer.current_epoch == 1:
            self.operations = Dispatched(trainer.optimizers)
            self.operations.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.is_last_batch:  # an epoch's end is no part of its last step
            self._close()

    def _close(self) -> None:
        if self.operations is not None:
            self.operations.__exit__(None, None, None)
            self.steps.append(counted(self.operations))
            self.operations = None


class StopsTheLast(L.Callback):
    """Send a signal to the last process alone, in its third step."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2 and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def stop(folder: Path, ranks: int, strategy: Any) -> dict[str, Any]:
    """Return after how many steps this process stopped, and the signal it had."""
    callbacks = [StopsTheLast(), StopSignals(), LastCheckpoint(dirpath=str(folder / "stop"))]
    trainer = trainer_with(callbacks, ranks, strategy)
    try:
        trainer.fit(*task(make_optimizer("sync")))
    except Stopped as leaving:
        return {"steps": trainer.global_step, "signal": int(leaving.received)}
    return {}


def trainer_with(callbacks: list[L.Callback], ranks: int, strategy: Any, precision: Any = "32-true") -> L.Trainer:
    # By name 16-mixed becomes bf16-mixed on a CPU.
    half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    return L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=ranks,
        strategy=strategy(ranks),
        plugins=[half] if precision == "16-mixed" else [],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=callbacks,
    )


def task(
    optimizer: Any, module: type[ModularAddition] = ModularAddition, **options: Any
) -> tuple[ModularAddition, ModularAdditionData]:
    """Return a network and 40 training pairs in batches of 12, 12, 12 and 4."""
    network = module(p=11, width=16, heads=2, mlp_width=16, optimizer=optimizer, **options)
    return network, ModularAdditionData(p=11, train_fraction=40.5 / 121, batch_size=12)


def count(folder: Path, ranks: int, strategy: Any, labels: Iterable[str] = FITS) -> dict[str, list[dict[str, int]]]:
    """Return the collectives and reads of each step of the second epoch, by fit.

    Args:
        folder: where checkpoints go.
        ranks: the number of processes.
        strategy: returns a strategy for them.
        labels: of FITS.
    """
    found = {}
    for label in labels:
        options = dict(FITS[label])
        precision = options.pop("precision", "32-true")
        exchanges = Exchanges()
        last = LastCheckpoint(dirpath=str(folder / label), every_n_epochs=9)
        trainer_with([StopSignals(), last, exchanges], ranks, strategy, precision).fit(*task(**options))
        found[label] = exchanges.steps
    return found
