"""Count the collectives of every step of a short fit, and device reads."""

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from callbacks.last_checkpoint import LastCheckpoint, Stopped, StopSignals
from datamodules.modular_addition import ModularAdditionData
from modules.modular_addition import ModularAddition
from tests.helpers.dispatched import Dispatched
from tests.modules.small_task import make_optimizer

# Labels and options of the fits. Of four batches the last is a separate window where three accumulate.
FITS: dict[str, tuple[str, dict[str, Any]]] = {
    "muon": ("muon", {}),
    "base": ("base", {}),
    "periodic": ("periodic", {}),
    "aga": ("aga", {}),
    "accumulated": ("sync", {"accumulate_grad_batches": 3}),
}
NAMES = {
    "c10d.allreduce_.default": "all_reduce",
    "c10d._reduce_scatter_base_.default": "reduce_scatter",
    "c10d._allgather_base_.default": "all_gather of parameters",
    "c10d.allgather_.default": "all_gather",
    "c10d.alltoall_base_.default": "all_to_all",
    "c10d.broadcast_.default": "broadcast",
    "c10d.barrier.default": "barrier",
    "aten._local_scalar_dense.default": "read",
}


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
            self.steps.append(dict(Counter(NAMES[name] for name in self.operations.names if name in NAMES)))
            self.operations = None


class StopsTheLast(L.Callback):
    """Send a signal to the last process alone, in its third step."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2 and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def stop(folder: Path, ranks: int, strategy: Any) -> dict[str, Any]:
    """Return after how many steps this process stopped, and the signal it had."""
    trainer = trainer_with(
        [StopsTheLast(), StopSignals(), LastCheckpoint(dirpath=str(folder / "stop"))], ranks, strategy
    )
    try:
        trainer.fit(*task("sync"))
    except Stopped as leaving:
        return {"steps": trainer.global_step, "signal": int(leaving.received)}
    return {}


def trainer_with(callbacks: list[L.Callback], ranks: int, strategy: Any) -> L.Trainer:
    return L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=ranks,
        strategy=strategy(ranks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=callbacks,
    )


def task(name: str, **options: Any) -> tuple[ModularAddition, ModularAdditionData]:
    """Return a network and 40 training pairs in batches of 12, 12, 12 and 4."""
    module = ModularAddition(p=11, width=16, heads=2, mlp_width=16, optimizer=make_optimizer(name), **options)
    return module, ModularAdditionData(p=11, train_fraction=40.5 / 121, batch_size=12)


def count(folder: Path, ranks: int, strategy: Any) -> dict[str, list[dict[str, int]]]:
    """Return the collectives and reads of the second epoch of each of FITS.

    Args:
        folder: where checkpoints go.
        ranks: the number of processes.
        strategy: returns a strategy for them.
    """
    found = {}
    for label, (name, options) in FITS.items():
        exchanges = Exchanges()
        last = LastCheckpoint(dirpath=str(folder / label), every_n_epochs=9)
        trainer_with([StopSignals(), last, exchanges], ranks, strategy).fit(*task(name, **options))
        found[label] = exchanges.steps
    return found
