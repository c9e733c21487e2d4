"""Save in every checkpoint the random states and the length of the log."""

import random
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch

from experiment.csv_log import RunCSVLogger
from experiment.distributed import gather_per_rank, local_share
from experiment.library_internals import is_within_epoch, pending_row


def random_states() -> dict[str, Any]:
    """Return the states of all generators of this process.

    Their types can be read by ``torch.load`` with ``weights_only=True``.
    """
    algorithm, keys, *rest = np.random.get_state()
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [algorithm, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if (accelerator := _accelerator()) is not None:
        kind, devices = accelerator
        states[kind] = [torch.get_device_module(kind).get_rng_state(device) for device in devices]
    return states


def _accelerator() -> tuple[str, list[torch.device]] | None:
    """Return the kind of accelerator (cuda, mps, ...) and its devices, or ``None``."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or not hasattr(torch.get_device_module(accelerator.type), "get_rng_state"):
        return None
    return accelerator.type, [torch.device(accelerator.type, i) for i in range(torch.accelerator.device_count())]


def set_random_states(states: dict[str, Any]) -> None:
    """Set all generators to what :func:`random_states` returned."""
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    algorithm, numbers, *rest = states["numpy"]
    np.random.set_state((algorithm, numbers.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    if (accelerator := _accelerator()) is not None:
        kind, devices = accelerator
        if len(states.get(kind, [])) == len(devices):
            for device, state in zip(devices, states[kind], strict=True):
                torch.get_device_module(kind).set_rng_state(state.cpu(), device)


class RandomStates(L.Callback):
    """Save the random states of every process in each checkpoint, and restore them.

    They are restored before data loaders make their iterators, which draw from them as they did at the epoch's start.
    Within an epoch, where that draw came long before the checkpoint, they are restored once more after it. A run that
    resumes with another number of processes gets the states of rank zero in all of them.
    """

    changes_training = False

    def __init__(self) -> None:
        self._again: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        states = gather_per_rank(trainer, random_states())
        middle = is_within_epoch(trainer)
        checkpoint["random_states"] = {"processes": states, "middle": middle}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit" or "random_states" not in checkpoint:
            return
        saved = checkpoint["random_states"]
        states = local_share(trainer, saved["processes"]) or saved["processes"][0]
        set_random_states(states)
        self._again = states if saved["middle"] else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._again is not None:
            set_random_states(self._again)
        self._again = None


class LogPosition(L.Callback):
    """Save the number of rows in the run's CSV log, and cut the log to it on resuming.

    A resumed run then neither doubles nor misses a row. Lightning writes the row of an epoch after the last hook of
    that epoch. A checkpoint at an epoch's end is older than that row and therefore contains it. Only a run that resumes
    in its original folder changes rows in the log.
    """

    changes_training = False

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        row = pending_row(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, RunCSVLogger):
                logger.save()
                checkpoint["log"] = {"rows": logger.count, "row": row, "step": trainer.fit_loop.total_batch_idx}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit" or "log" not in checkpoint:
            return
        log = checkpoint["log"]
        for logger in trainer.loggers:
            if isinstance(logger, RunCSVLogger) and logger.resumes:
                logger.truncate(log["rows"])
                if log["row"]:
                    logger.log_metrics(dict(log["row"]), log["step"])
                    logger.save()
