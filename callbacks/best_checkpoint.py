"""Lightning's checkpoint of the best epoch, which also works where a module makes its own optimizer steps."""

from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from experiment.library_internals import has_validated


class BestCheckpoint(ModelCheckpoint):
    """``ModelCheckpoint`` for manual optimization.

    Lightning's own ignores ``train_time_interval`` there, advises at length against ``every_n_train_steps``, drops a
    save that is due before the first validation unless it saves after validations, saves in the middle of a window of
    accumulated batches, and warns where an epoch ends before the first validation. A checkpoint of an exception is
    ``exception.ckpt``, so that the best one stays.

    Raises:
        ValueError: several checkpoints are to be kept under one name, or one under that of the last checkpoint.
    """

    changes_training = False

    @property
    def state_key(self) -> str:
        # That of checkpoints from before this class.
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.save_top_k not in (0, 1) and "{" not in (self.filename or "{") and not self._enable_version_counter:
            raise ValueError(
                f"checkpoint.save_top_k is {self.save_top_k}, and all of them would be {self.filename}.ckpt: give them"
                " names such as --checkpoint.filename best-{epoch}"
            )
        if self.save_last:
            raise ValueError(
                "checkpoint.save_last would write over last.ckpt, which last_checkpoint.* sees to: drop it"
            )
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if getattr(pl_module, "between_steps", True):
            # All that Lightning asks the module here.
            module = cast(L.LightningModule, SimpleNamespace(automatic_optimization=True))
            super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        kept = self._save_on_train_epoch_end
        if self._defer_save_until_validation:
            self._save_on_train_epoch_end = False
        super().on_validation_end(trainer, pl_module)
        self._save_on_train_epoch_end = kept

    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        # Before the first validation there is no best epoch of it. After that, a metric that is missing is an error.
        if self.monitor in (None, *monitor_candidates) or has_validated(trainer):
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.monitor not in (None, *trainer.callback_metrics) and trainer.is_global_zero:
            print(f"no best checkpoint: {self.monitor} was not logged")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        kept, self.filename = self.filename, "exception"
        super().on_exception(trainer, pl_module, exception)
        self.filename = kept
