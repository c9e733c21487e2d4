"""Finding one callback from another."""

from typing import TypeVar

import lightning.pytorch as L

Kind = TypeVar("Kind", bound=L.Callback)


def callbacks_of(trainer: L.Trainer, kind: type[Kind]) -> list[Kind]:
    """Return the trainer's callbacks of the class ``kind``, subclasses included, in their order."""
    callbacks: list[L.Callback] = vars(trainer)["callbacks"]
    return [callback for callback in callbacks if isinstance(callback, kind)]
