"""Save the checkpoint to resume from, regularly, at the end, and on a signal."""

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging

from callbacks.lookup import callbacks_of
from callbacks.module_protocol import trained
from experiment.checkpoints import PARTIAL
from experiment.folders import PREVIOUS
from experiment.library_internals import disable_sigterm_broadcast

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = b"\nStopping after this step and saving a checkpoint. Press Ctrl-C again to quit now.\n"


class Stopped(SystemExit):
    """Report that a signal stopped training after a checkpoint was written.

    The exit code is that of the signal.
    """

    def __init__(self, received: signal.Signals, saved: str) -> None:
        super().__init__(128 + received)
        self.received, self.saved = received, saved


class StopSignals(L.Callback):
    """Catch SIGINT and SIGTERM in training, so that :class:`LastCheckpoint` saves.

    After the first signal, training continues to the next place where a checkpoint is complete: the end of a window of
    batches, or of the epoch's validation. A second signal acts as if this callback did not exist.
    """

    changes_training = False

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.saved: str | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # This hook comes after Lightning has set its own SIGTERM handler, which would also stop within a validation.
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.getsignal(number) for number in SIGNALS}
            for number in SIGNALS:
                signal.signal(number, self._on_signal)
            # Lightning's loop would ask rank zero for a SIGTERM in every batch, which is handled here.
            disable_sigterm_broadcast(trainer)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number)
        self._restore_handlers()
        os.write(2, NOTICE)  # The signal may have interrupted print(), which must not be entered again.

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self._raise_if_saved()
        module = trained(trainer, pl_module)
        module.stop_asked = self.received is not None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._raise_if_saved()

    def _raise_if_saved(self) -> None:
        if self.saved is not None and self.received is not None:
            raise Stopped(self.received, self.saved)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_handlers()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()


def asked_to_stop(trainer: L.Trainer, agreed: bool | None = None) -> list[StopSignals]:
    """Return the trainer's signal callbacks if any rank received a signal, else none.

    Unless ``agreed`` is given this is a collective: all ranks must call it.

    Args:
        trainer: whose callbacks are meant.
        agreed: whether any rank received a signal, if all ranks know already; ``None`` reduces over them.
    """
    callbacks = callbacks_of(trainer, StopSignals)
    asked = any(callback.received is not None for callback in callbacks)
    if callbacks and (trainer.strategy.reduce_boolean_decision(asked, all=False) if agreed is None else agreed):
        for callback in callbacks:
            callback.received = callback.received or signal.SIGTERM
        return callbacks
    return []


class LastCheckpoint(ModelCheckpoint):
    """Write ``last.ckpt`` every n epochs or steps, and when training ends.

    It is also written when a signal stops training. If a loss or gradient that is not finite stops training, it has
    the state before that step. The checkpoint before it stays as ``last-previous.ckpt``. Where ``max_steps`` ends
    training within an epoch, it is written after the last step, not after the epoch end that Lightning then runs early.
    A resumed run continues from it as if training had not ended.

    ``ModelCheckpoint.save_last`` does not replace it, because it is written only when another checkpoint is due.

    Args:
        every_n_epochs: epochs from one save to the next, at least 1; a killed run loses at most these.
        dirpath: the folder of the checkpoints; ``None`` is ``checkpoints`` in the run folder.
        every_n_steps: optimizer steps after which to save within an epoch, at least 1; ``None`` does not.

    Raises:
        ValueError: ``every_n_epochs`` or ``every_n_steps`` below 1.
    """

    changes_training = False

    def __init__(self, every_n_epochs: int = 10, dirpath: str | None = None, every_n_steps: int | None = None) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, got {every_n_epochs}")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, or null, got {every_n_steps}")
        super().__init__(
            dirpath=dirpath,
            filename="last",
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        self.every_n_steps = every_n_steps
        self._saved_at_step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero and self.dirpath:
            # A killed process may have left them.
            for partial in Path(self.dirpath).glob(f"*{PARTIAL}"):
                partial.unlink(missing_ok=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved_at_step = trainer.global_step
        self._last_global_step_saved = 0  # An earlier fit with this object may have set it.

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        module = trained(trainer, pl_module)
        if not module.between_steps:
            return
        stopping = asked_to_stop(trainer, module.stop_agreed)
        if module.fatal_error is not None:
            self._save(trainer)
        # The last batch of an epoch is followed by its validation and its row in the log. The save at the epoch's end
        # includes both.
        elif not trainer.is_last_batch and (stopping or self._is_due(trainer) or _ends_within_epoch(trainer)):
            self._save(trainer)
            for callback in stopping:
                callback.saved = self.best_model_path

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if _ends_within_epoch(trainer):
            return
        stopping = asked_to_stop(trainer)
        # When training ends, the average replaces the weights to resume from.
        averaged = _ends_with_epoch(trainer) and callbacks_of(trainer, WeightAveraging)
        if stopping or averaged or self._is_due(trainer):
            self._save(trainer)
            for callback in stopping:
                callback.saved = self.best_model_path
        else:
            super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not _ends_within_epoch(trainer):
            self._save(trainer)

    def _is_due(self, trainer: L.Trainer) -> bool:
        return self.every_n_steps is not None and trainer.global_step - self._saved_at_step >= self.every_n_steps

    def _save(self, trainer: L.Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        place = Path(filepath)
        new, previous = place.with_name(f"{place.stem}-new{place.suffix}"), place.with_name(PREVIOUS)
        super()._save_checkpoint(trainer, str(new))
        if trainer.is_global_zero:
            # A run that is killed between the two moves resumes from the previous checkpoint.
            if place.exists():
                if previous.is_dir():
                    shutil.rmtree(previous)
                os.replace(place, previous)
            os.replace(new, place)
        trainer.strategy.barrier()
        self._last_checkpoint_saved, self._saved_at_step = filepath, trainer.global_step


def _ends_within_epoch(trainer: L.Trainer) -> bool:
    """Return whether ``max_steps`` ends training now, with batches left in the epoch."""
    return 0 <= trainer.max_steps <= trainer.global_step and not trainer.is_last_batch


def _ends_with_epoch(trainer: L.Trainer) -> bool:
    """Return whether training ends with this epoch, or may end with it."""
    # Not fit_loop.done, which would count this epoch as completed before its row is logged.
    epochs = trainer.current_epoch + 1
    return trainer.should_stop or epochs == trainer.max_epochs or 0 <= trainer.max_steps <= trainer.global_step
