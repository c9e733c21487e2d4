"""What a run has spent, as columns of its log: every curve can then be drawn over any of them."""

from time import perf_counter
from typing import Any

import lightning.pytorch as L
import torch


class CostCounters(L.Callback):
    """Logs the costs so far with every row that an epoch's end or a validation writes.

    ``cost/optimizer_steps``; ``cost/gradient_evaluations`` (a step that looks twice makes two);
    ``cost/examples``, or ``cost/tokens`` where the module counts those (its ``unit``; handed to training, over all
    processes; a second look at the same batch adds none);
    ``cost/training_seconds`` (waiting for data included; evaluation, and saving checkpoints, excluded). All go on
    where they were when a run is resumed. Numbers are logged in double precision, where counts are exact up to 2**53.
    """

    def __init__(self) -> None:
        self.examples = 0
        self.training_seconds = 0.0
        self._mark: float | None = None

    def costs(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        """Return the four costs by log key, as they are now."""
        self._count()
        return {
            "cost/optimizer_steps": float(trainer.global_step),
            "cost/gradient_evaluations": float(pl_module.gradient_evaluations),  # type: ignore[arg-type]
            f"cost/{getattr(pl_module, 'unit', 'examples')}": float(self.examples),
            "cost/training_seconds": self.training_seconds,
        }

    def _count(self) -> None:
        """Add the time since the last mark, if the clock runs."""
        if self._mark is not None:
            now = perf_counter()
            self.training_seconds += now - self._mark
            self._mark = now

    def _pause(self, pl_module: L.LightningModule) -> None:
        if self._mark is not None and pl_module.device.type == "cuda":
            # Work that was queued for training would otherwise be waited for by what follows.
            torch.cuda.synchronize(pl_module.device)
        self._count()
        self._mark = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._mark = perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.examples += pl_module.batch_size(batch) * trainer.world_size  # type: ignore[operator]
        self._count()
        # A checkpoint paused the clock, or a run resumed within an epoch has not started it.
        self._mark = self._mark or perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._count()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pause(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._log(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pause(pl_module)
        self._log(trainer, pl_module)

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        shared = trainer.world_size > 1
        # Only a mean over processes needs the values on their device, which may not know doubles.
        device = pl_module.device if shared else torch.device("cpu")
        for name, value in self.costs(trainer, pl_module).items():
            pl_module.log(name, torch.tensor(value, dtype=torch.float64, device=device), batch_size=1, sync_dist=shared)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._pause(pl_module)

    def state_dict(self) -> dict[str, Any]:
        self._count()
        return {"examples": self.examples, "training_seconds": self.training_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.examples, self.training_seconds = state_dict["examples"], state_dict["training_seconds"]
