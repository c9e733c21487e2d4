"""How far the log was when a checkpoint was written, so that a resumed run neither doubles nor misses a row."""

from typing import Any

import lightning.pytorch as L

from experiment.csv_log import RunCSVLogger
from experiment.library_internals import row_to_come


class LogPosition(L.Callback):
    """Keeps in every checkpoint the number of rows in the run's CSV file, and puts the file back to it on resuming.

    A checkpoint at an epoch's end is older than the epoch's own row, which Lightning writes after the last hook; so
    that row goes into the checkpoint. Only a run that goes on in its own folder touches rows that are there already.
    """

    changes_training = False

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        row = row_to_come(trainer)
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
                logger.go_back(log["rows"])
                if log["row"]:
                    logger.log_metrics(dict(log["row"]), log["step"])
                    logger.save()
