"""Decide in which direction a validation metric improves."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.lookup import callbacks_of

# For metrics that do not say it themselves.
_HIGHER_IS_BETTER = {
    **dict.fromkeys(("loss", "perplexity", "word_perplexity", "bits_per_byte"), False),
    **dict.fromkeys(("accuracy", "acc"), True),
}


def higher_is_better(name: str, metrics: Mapping[str, Any]) -> bool | None:
    """Return whether more is better, or ``None`` if that is not known.

    Args:
        name: as logged, such as ``val/accuracy``.
        metrics: the torchmetrics of the stage, by the part of ``name`` after the slash.
    """
    short = name[len("val/") :]
    known: bool | None = getattr(metrics[short], "higher_is_better", None) if short in metrics else None
    return _HIGHER_IS_BETTER.get(short) if known is None else known


def lower_is_better(trainer: L.Trainer, name: str, metrics: Mapping[str, Any]) -> bool:
    """Return whether less is better.

    The checkpoint that monitors the metric has precedence over the metric itself.
    """
    for checkpoint in callbacks_of(trainer, ModelCheckpoint):
        if checkpoint.monitor == name:
            return checkpoint.mode == "min"
    return higher_is_better(name, metrics) is False
