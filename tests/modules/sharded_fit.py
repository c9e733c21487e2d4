"""Fit under Lightning's ModelParallelStrategy, or in one process.

:func:`together` is one of several processes.
"""

import csv
import math
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ars2.distributed import local
from callbacks.cost_counters import CostCounters
from callbacks.flatness_probe import FlatnessProbe
from callbacks.optimizer_internals import OptimizerInternals
from callbacks.training_state import RandomStates
from datamodules.modular_addition import ModularAdditionData
from modules.modular_addition import ModularAddition
from modules.two_pass import TwoPassModule
from tests.ars2.sharded_training import full
from tests.helpers.launching import become
from tests.modules import evaluations, exchanges, language
from tests.modules.ddp_fit import BATCH, OPTIONS, SecondPasses
from tests.modules.small_task import SmallTask, batches, make_optimizer

STEPS, HALF = 8, 6  # the half is in the middle of an epoch of 4 batches
# The time, and the operations, of which only those of the first process are counted.
MEASURED = ("cost/training_seconds", "cost/flops")
# A network with BatchNorm cannot be sharded; text in full batches is the case of sums again.
NOT_EVALUATED = ("images", "packed")
COUNTED = ("muon", "base", "aga", "accumulated")
Run = tuple[str, dict[str, Any]]


class Damaged(ModularAddition):
    """Have one loss, of the last process alone, that is not finite."""

    calls, damaged_call = 0, 0

    def compute_loss(self, batch: Any, metrics: Any) -> Tensor:
        loss = super().compute_loss(batch, metrics)
        self.calls += 1
        last = self.trainer.global_rank == self.trainer.world_size - 1
        return loss * math.nan if last and self.calls == self.damaged_call else loss


class SaveHalf(L.Callback):
    """Save a checkpoint of the first half of the steps."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == HALF:
            trainer.save_checkpoint(self.path)


def strategy(ranks: int, distributed: bool = True) -> Any:
    """Return the sharding strategy for any number of processes.

    It is ``"auto"`` for 0 of them, which is one process without the strategy.
    """
    if ranks == 0:
        return "auto"
    return ModelParallelStrategy(
        data_parallel_size=ranks, tensor_parallel_size=1, save_distributed_checkpoint=distributed
    )


def result(module: TwoPassModule) -> dict[str, Any]:
    """Return parameters and optimizer state as full tensors, by name.

    The numbers of local entries of the parameters come with them.
    """
    optimizer = module.optimizers().optimizer  # type: ignore[union-attr]
    if isinstance(module, FSDPModule):
        module.reshard()  # validation leaves parameters outside of blocks gathered
    named = dict(module.network.named_parameters())
    tensors = {name: full(param.detach()) for name, param in named.items()}
    for name, param in named.items():
        tensors |= {f"{name}.{key}": full(value) for key, value in optimizer.state[param].items()}
    return {"tensors": tensors, "local_numels": {name: local(param).numel() for name, param in named.items()}}


def fit(
    name: str,
    ranks: int = 0,
    folder: Path | None = None,
    saves: Path | None = None,
    resumes: Path | None = None,
    distributed: bool = True,
    precision: Any = "32-true",
    damaged: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Train 8 steps and return what was measured.

    These are parameters, state, evaluations, logged metrics and, with a folder, the logged rows. With ``saves`` it
    leaves a checkpoint of the first 6 steps there.
    """
    torch.manual_seed(0)
    small = {"p": 11, "width": 16, "heads": 2, "mlp_width": 16}
    module = Damaged(**small, optimizer=make_optimizer(name, **OPTIONS[name]), **options)
    module.damaged_call = damaged
    second_passes = SecondPasses()
    callbacks: list[L.Callback] = [second_passes, CostCounters(), OptimizerInternals(every_n_steps=5), RandomStates()]
    if saves is not None:
        callbacks.append(SaveHalf(saves))
    trainer = L.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=max(1, ranks),
        strategy=strategy(ranks, distributed),
        precision=precision,
        logger=CSVLogger(folder, name=None, version="") if folder is not None else False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=callbacks,
    )
    data = ModularAdditionData(p=11, batch_size=BATCH, val_batch_size=50)
    trainer.fit(module, data, ckpt_path=resumes, weights_only=True)
    metrics = {key: value.item() for key, value in trainer.callback_metrics.items() if key not in MEASURED}
    rows: list[dict[str, float]] = []
    if folder is not None and trainer.is_global_zero:
        with open(folder / "metrics.csv", encoding="utf-8") as file:
            rows = [
                {key: float(value) for key, value in row.items() if value and key not in MEASURED}
                for row in csv.DictReader(file)
            ]
    found = {
        "evaluations": second_passes.evaluations,
        "metrics": metrics,
        "rows": rows,
        "skipped": module.skipped_steps,
    }
    return {**result(module), **found}


def read(ranks: int = 0, folder: Path | None = None) -> dict[str, Any]:
    """Train a language model with tied weights for 6 steps, and continue a text.

    Its second passes are functional.
    """
    assert folder is not None
    module = language.model("aga", projections="per_head", policy="hidden", second_loss="functional")
    module.make_optimizer = make_optimizer("aga", lr=1e-3, ns_dtype="float32")
    devices = max(1, ranks)
    trainer = language.trainer(max_steps=6, limit_val_batches=2, devices=devices, strategy=strategy(ranks))
    data = language.data(folder)
    trainer.fit(module, data)
    blocks = [type(block).__name__ for block in module.network.model.layers]
    text = module.continue_text(data.prompt_tokens()[0])
    return {**result(module), "text": text, "blocks": blocks}


def refusals(ranks: int) -> dict[str, str]:
    """Return the errors of fits that cannot be sharded."""
    options = {"optimizer": make_optimizer("sync"), "p": 11, "width": 16, "heads": 2, "mlp_width": 16}
    tensor_parallel = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=ranks)
    cases: dict[str, tuple[TwoPassModule, Any, list[L.Callback]]] = {
        "batch norm": (SmallTask(optimizer=make_optimizer("sync")), strategy(ranks), []),
        "tensor parallel": (ModularAddition(**options), tensor_parallel, []),
        "local first pass": (ModularAddition(**options, local_first_pass=True), strategy(ranks), []),
        "probe": (ModularAddition(**options), strategy(ranks), [FlatnessProbe()]),
    }
    messages = {}
    for label, (module, its, callbacks) in cases.items():
        data: Any = batches() if label == "batch norm" else ModularAdditionData(p=11, batch_size=BATCH)
        trainer = language.trainer(max_steps=1, devices=ranks, strategy=its, callbacks=callbacks)
        try:
            trainer.fit(module, data)
        except ValueError as error:
            messages[label] = str(error)
    try:
        fit("sync", ranks, damaged=5)
    except FloatingPointError as error:
        messages["damage"] = str(error)
    return messages


def together(rank: int, ranks: int, port: int, folder: Path, runs: dict[str, Run], text: Path | None) -> None:
    """Train as one of ``ranks`` processes, started as torchrun starts them.

    The results go to ``<rank>.pt``.
    """
    become(rank, ranks, port)
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        results = {label: fit(name, ranks, folder=folder / label, **options) for label, (name, options) in runs.items()}
        if text is not None:
            results["text"] = read(ranks, text)
            results["exchanged"] = exchanges.count(folder, ranks, strategy, COUNTED)
            results["stopped"] = exchanges.stop(folder, ranks, strategy)
            results["evaluated"] = evaluations.evaluate(text, NOT_EVALUATED, ranks, strategy)
            results["refused"] = refusals(ranks)
    results["advised"] = [str(warning.message) for warning in messages if "sync_dist" in str(warning.message)]
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
