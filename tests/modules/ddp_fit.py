"""Fit under Lightning's DDP, or in one process with the same batches.

:func:`together` is one of several processes.
"""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import DDPStrategy

from datamodules.batches import world
from datamodules.modular_addition import ModularAdditionData
from modules.modular_addition import ModularAddition
from tests.helpers.launching import become
from tests.modules import evaluations, exchanges, language
from tests.modules.small_task import OPTIMIZERS, make_optimizer, state_of

STEPS = 8
# 36 training pairs: batches of 10, 10, 10 and 6, which neither 4 nor, for the last but one, all counts divide.
EPOCHS, BATCH = 2, 10
# In float32 throughout; in half precision the iteration itself would round by more than processes differ.
PRECISE = {name: {"lr": 1e-3, "ns_dtype": "float32"} for name in OPTIMIZERS if name != "adamw"}
OPTIONS: dict[str, dict[str, Any]] = {"adamw": {"lr": 1e-3}, **PRECISE}


class SecondPasses(L.Callback):
    """Record after which steps two gradients had been evaluated, and the batches."""

    def __init__(self) -> None:
        self.evaluations: list[int] = []
        self.batches: list[list[int]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.evaluations.append(pl_module.gradient_evaluations)
        self.batches.append((batch[0][:, 0] * 11 + batch[0][:, 1]).tolist())


class Units(ModularAddition):
    """Count several units an example, unknown to the loader of its batches."""

    units = 1

    def batch_size(self, batch: Any) -> int:
        return self.units * len(batch[0])


def fit(name: str, ranks: int = 1, units: int = 0, static_graph: bool = False, **options: Any) -> dict[str, Any]:
    """Train 8 steps.

    Return the state, the evaluations after each step and the logged metrics.
    """
    torch.manual_seed(0)
    small = {"p": 11, "width": 16, "heads": 2, "mlp_width": 16}
    kind = Units if units else ModularAddition
    module = kind(**small, optimizer=make_optimizer(name, **OPTIONS[name]), **options)
    if isinstance(module, Units):
        module.units = units
    second_passes = SecondPasses()
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        max_steps=STEPS,
        accelerator="cpu",
        devices=ranks,
        strategy=DDPStrategy(static_graph=static_graph) if ranks > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[second_passes],
    )
    trainer.fit(module, ModularAdditionData(p=11, batch_size=BATCH, val_batch_size=50))
    metrics = {key: value.item() for key, value in trainer.callback_metrics.items() if not key.startswith("cost")}
    return {
        "state": state_of(module),
        "evaluations": second_passes.evaluations,
        "batches": second_passes.batches,
        "metrics": metrics,
    }


def functional(text: Path, ranks: int = 1) -> dict[str, Any]:
    """Train a language model for 3 steps with functional second passes; return its state."""
    module = language.model("sync", accumulate_grad_batches=2, second_loss="functional")
    module.make_optimizer = make_optimizer("sync", **OPTIONS["sync"])
    strategy = DDPStrategy() if ranks > 1 else "auto"
    trainer = language.trainer(max_steps=3, limit_val_batches=0, devices=ranks, strategy=strategy, precision="64-true")
    trainer.fit(module, language.data(text, batch_size=5))
    return {"state": state_of(module)}


def together(
    rank: int, ranks: int, port: int, folder: Path, runs: dict[str, tuple[str, dict[str, Any]]], text: Path | None
) -> None:
    """Train as one of ``ranks`` processes, started as torchrun starts them.

    The results go to ``<rank>.pt``.
    """
    become(rank, ranks, port)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = {label: fit(name, ranks, **options) for label, (name, options) in runs.items()}
        if text is not None:
            results["exchanged"] = exchanges.count(folder, ranks, lambda ranks: "ddp")
            results["stopped"] = exchanges.stop(folder, ranks, lambda ranks: "ddp")
            results["functional"] = functional(text, ranks)
            results["evaluated"] = evaluations.evaluate(text, ranks=ranks, strategy=lambda ranks: "ddp")
    results["advised"] = [str(warning.message) for warning in caught if "sync_dist" in str(warning.message)]
    assert world() == (rank, ranks)
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
