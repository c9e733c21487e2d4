"""How far the log was when a checkpoint was written, so that a resumed run neither doubles nor misses a row."""

from typing import Any

import lightning.pytorch as L
from torch import Tensor

from csv_rows import RunCSVLogger


class LogPosition(L.Callback):
    """Keeps in every checkpoint the number of rows in the run's CSV file, and puts the file back to it on resuming.

    A checkpoint at an epoch's end is older than the epoch's own row, which Lightning writes after the last hook; so
    that row goes into the checkpoint. Only a run that goes on in its own folder touches rows that are there already.
    """

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        row = self._row_to_come(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, RunCSVLogger):
                logger.save()
                checkpoint["log"] = {"rows": logger.count, "row": row, "step": trainer.fit_loop.total_batch_idx}

    @staticmethod
    def _row_to_come(trainer: L.Trainer) -> dict[str, float]:
        """Return the row of an epoch that has ended and is not in the log yet; empty in the middle of one."""
        connector = trainer._logger_connector
        if connector._first_loop_iter is not None:
            return {}
        values = {
            name: value.item() if isinstance(value, Tensor) else value
            for name, value in connector.metrics["log"].items()
        }
        return {**values, "epoch": trainer.current_epoch} if values else {}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit" or "log" not in checkpoint:
            return
        log = checkpoint["log"]
        for logger in trainer.loggers:
            if isinstance(logger, RunCSVLogger) and logger.resumes:
                logger.go_back(log["rows"])
                if log["row"]:
                    logger.log_metrics(dict(log["row"]), log["step"])
                    logger.save()
