"""Find the callbacks of a trainer and the folder of its run."""

from pathlib import Path
from typing import TypeVar

import lightning.pytorch as L
from lightning.pytorch.loggers import CSVLogger

Kind = TypeVar("Kind", bound=L.Callback)


def callbacks_of(trainer: L.Trainer, kind: type[Kind]) -> list[Kind]:
    """Return the trainer's callbacks of a class, subclasses included, in their order."""
    callbacks: list[L.Callback] = vars(trainer)["callbacks"]
    return [callback for callback in callbacks if isinstance(callback, kind)]


def folder_of(trainer: L.Trainer) -> Path | None:
    """Return the folder of the run, if it has one.

    It is ``trainer.log_dir``. Unlike that property, which is a collective, this function may be called on one rank.
    """
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    first = trainer.loggers[0]
    folder = first.log_dir if isinstance(first, CSVLogger) else first.save_dir
    return None if folder is None else Path(folder)
