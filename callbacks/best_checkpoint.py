"""Save the checkpoint of the best epoch, also under manual optimization."""

from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from callbacks.direction import higher_is_better
from callbacks.module_protocol import trained
from experiment.library_internals import has_validated
from experiment.metric_names import with_slash


class BestCheckpoint(ModelCheckpoint):
    """Adapt ``ModelCheckpoint`` to manual optimization.

    Under manual optimization Lightning's class ignores ``train_time_interval`` and warns against
    ``every_n_train_steps``. It skips a save that is due before the first validation unless it saves after validations.
    It saves within a window of accumulated batches, and it warns where an epoch ends before the first validation. This
    class does none of that. The checkpoint of an exception is ``exception.ckpt``, so that the best one stays.

    Raises:
        ValueError: several checkpoints would have one name, one would have that of the last checkpoint, a validation
            metric is monitored and there is no validation, or the mode would take its worst value for the best.
    """

    changes_training = False

    @property
    def state_key(self) -> str:
        # Checkpoints that are older than this class have the key of its parent.
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.save_top_k not in (0, 1) and "{" not in (self.filename or "{") and not self._enable_version_counter:
            raise ValueError(
                f"checkpoint.save_top_k is {self.save_top_k}, but every checkpoint would be {self.filename}.ckpt:"
                " give them different names, such as --checkpoint.filename best-{epoch}"
            )
        if self.save_last:
            raise ValueError(
                "checkpoint.save_last would overwrite last.ckpt, which last_checkpoint.* writes: remove it"
            )
        # A module without metrics gets an error that lists everything it lacks.
        higher = higher_is_better(self.monitor or "", getattr(trained(trainer, pl_module), "val_metrics", {}))
        if stage == "fit" and higher is not None and self.mode != ("max" if higher else "min"):
            more, mode = ("more", "max") if higher else ("less", "min")
            raise ValueError(
                f"checkpoint.mode is {self.mode}, but {more} of {self.monitor} is better: give --checkpoint.mode {mode}"
            )
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        validation = with_slash(str(self.monitor)).startswith("val/")
        if validation and trainer.limit_val_batches != 0 and not trainer.enable_validation:
            data: Any = getattr(trainer, "datamodule", None) or pl_module
            parts = {"validation_step() to the module": ("validation_step", pl_module)}
            parts["val_dataloader() to the data"] = ("val_dataloader", data)
            missing = [part for part, (name, owner) in parts.items() if not is_overridden(name, owner)]
            raise ValueError(
                f"checkpoint.monitor is {self.monitor}, but there is no validation: add {' and '.join(missing)}, or"
                " monitor another metric, such as --checkpoint.monitor train/loss"
            )
        super().on_train_start(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        module = trained(trainer, pl_module)
        if module.between_steps:
            # The parent reads nothing else of the module here.
            automatic = cast(L.LightningModule, SimpleNamespace(automatic_optimization=True))
            super().on_train_batch_end(trainer, automatic, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        at_epoch_end = self._save_on_train_epoch_end
        if self._defer_save_until_validation:
            self._save_on_train_epoch_end = False
        super().on_validation_end(trainer, pl_module)
        self._save_on_train_epoch_end = at_epoch_end

    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        # There is no best epoch before the first validation. After it, a missing metric is an error.
        if self.monitor in (None, *monitor_candidates) or has_validated(trainer):
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.monitor is None and trainer.is_global_zero:
            print("no best checkpoint: give --checkpoint.monitor a logged metric; best.ckpt is of the last epoch")
        elif self.monitor not in trainer.callback_metrics and trainer.is_global_zero:
            print(f"no best checkpoint: {self.monitor} was not logged")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        filename, self.filename = self.filename, "exception"
        super().on_exception(trainer, pl_module, exception)
        self.filename = filename
