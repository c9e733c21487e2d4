"""The checkpoint to resume from: where training really ended, and every so often on the way there."""

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.lookup import callbacks_of
from experiment.checkpoints import PARTIAL
from experiment.folders import PREVIOUS
from experiment.library_internals import disable_sigterm_broadcast

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = b"\nstopping: the step under way (or a validation) is finished and saved; once more to leave at once\n"


class Stopped(SystemExit):
    """A signal stopped training, after a checkpoint was written; its exit code is the signal's."""

    def __init__(self, received: signal.Signals, saved: str) -> None:
        super().__init__(128 + received)
        self.received, self.saved = received, saved


class StopSignals(L.Callback):
    """Waits for SIGINT and SIGTERM while a model trains; :class:`LastCheckpoint` saves.

    The first signal lets training come to where a checkpoint is whole: the end of a window of batches, or of the
    epoch's validation. A second one is handled as if this callback were not there.
    """

    changes_training = False

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.saved: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Here, after Lightning's own handler of SIGTERM, which would also stop in the middle of a validation.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
            for number in SIGNALS:
                signal.signal(number, self._take)
            # With every batch Lightning's loop asks the first process for a SIGTERM, which is taken here.
            disable_sigterm_broadcast(trainer)

    def _take(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number)
        self._put_back()
        os.write(2, NOTICE)  # print() may have been interrupted in the middle of itself

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self._leave()
        pl_module.stop_asked = self.received is not None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._leave()

    def _leave(self) -> None:
        if self.saved is not None and self.received is not None:
            raise Stopped(self.received, self.saved)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._put_back()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._put_back()


def asked_to_stop(trainer: L.Trainer, agreed: bool | None = None) -> list[StopSignals]:
    """Return the callbacks that were told to stop, in this process or another; call it in all of them at once.

    Args:
        trainer: whose callbacks they are.
        agreed: whether any process was, as all of them know already; ``None`` asks them.
    """
    callbacks = callbacks_of(trainer, StopSignals)
    asked = any(callback.received is not None for callback in callbacks)
    if callbacks and (trainer.strategy.reduce_boolean_decision(asked, all=False) if agreed is None else agreed):
        for callback in callbacks:
            callback.received = callback.received or signal.SIGTERM
        return callbacks
    return []


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt``: of every n-th epoch's end, of every n-th step if wanted, and of the end of training.

    It is also written when a signal asks training to stop, and when training stops for a loss or gradient that is not
    finite, before that has touched anything. The one before it stays as ``last-previous.ckpt``. Where ``max_steps``
    ends training within an epoch, it is of the last step, not of the end that Lightning then makes of that epoch: from
    there training goes on as if it had not ended.

    Lightning's own ``save_last`` follows its other saves: with a period above 1 it leaves the last multiple of it.

    Args:
        every_n_epochs: epochs from one save to the next, at least 1; what a killed run can lose.
        dirpath: where to; ``None`` is ``checkpoints`` in the run folder.
        every_n_steps: optimizer steps after which to save in between too, at least 1; ``None`` does not.

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
            for left_by_a_killed_process in Path(self.dirpath).glob(f"*{PARTIAL}"):
                left_by_a_killed_process.unlink(missing_ok=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved_at_step = trainer.global_step
        self._last_global_step_saved = 0  # by another fit with this object

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not getattr(pl_module, "between_steps", True):
            return
        stopping = asked_to_stop(trainer, getattr(pl_module, "stop_agreed", None))
        if getattr(pl_module, "damage", None) is not None:
            self._save(trainer)
        # After an epoch's last batch come its validation and its row in the log: the epoch's end saves them too.
        elif not trainer.is_last_batch and (stopping or self._is_due(trainer) or _ends_within_epoch(trainer)):
            self._save(trainer)
            for callback in stopping:
                callback.saved = self.best_model_path

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if _ends_within_epoch(trainer):
            return
        stopping = asked_to_stop(trainer)
        if stopping or self._is_due(trainer):
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
            # Killed in between, a run goes on from the previous one.
            if place.exists():
                if previous.is_dir():
                    shutil.rmtree(previous)
                os.replace(place, previous)
            os.replace(new, place)
        trainer.strategy.barrier()
        self._last_checkpoint_saved, self._saved_at_step = filepath, trainer.global_step


def _ends_within_epoch(trainer: L.Trainer) -> bool:
    """Say whether ``max_steps`` ends training after the last batch so far, and there are more in its epoch."""
    return 0 <= trainer.max_steps <= trainer.global_step and not trainer.is_last_batch
