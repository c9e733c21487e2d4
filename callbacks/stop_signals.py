"""Ctrl-C and SIGTERM: the step under way is finished and saved before the process leaves."""

import os
import signal
import threading
from typing import Any

import lightning.pytorch as L

from callbacks.lookup import callbacks_of
from experiment.library_internals import ask_for_no_sigterm

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = b"\nstopping: the step under way (or a validation) is finished and saved; once more to leave at once\n"


class Stopped(SystemExit):
    """A signal stopped training, after a checkpoint was written; its exit code is the signal's."""

    def __init__(self, received: signal.Signals, saved: str) -> None:
        super().__init__(128 + received)
        self.received, self.saved = received, saved


class StopSignals(L.Callback):
    """Waits for SIGINT and SIGTERM while a model trains; :class:`callbacks.last_checkpoint.LastCheckpoint` saves.

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
            ask_for_no_sigterm(trainer)

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
