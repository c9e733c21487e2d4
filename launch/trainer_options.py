"""Check the trainer's options, and move some of them to a two-pass module."""

import importlib
import inspect
from typing import Any

import lightning.pytorch as L

from callbacks.best_checkpoint import BestCheckpoint
from callbacks.last_checkpoint import LastCheckpoint
from callbacks.lookup import callbacks_of
from modules.checks import check_saves_average
from modules.two_pass import TwoPassModule

# Lightning's names of precisions, the short ones included.
PRECISIONS = {
    "16": "16-mixed",
    "bf16": "bf16-mixed",
    "32": "32-true",
    "64": "64-true",
    "16-mixed": "16-mixed",
    "16-true": "16-true",
    "bf16-mixed": "bf16-mixed",
    "bf16-true": "bf16-true",
    "32-true": "32-true",
    "64-true": "64-true",
}


def move_update_options(config: Any) -> None:
    """Move clipping and accumulation from the trainer's options to the module.

    Lightning refuses these options under manual optimization; a run is the same whichever name is given.

    Args:
        config: of a subcommand, parsed; changed in place.

    Raises:
        ValueError: the trainer and the module are given different values, or the trainer an unknown algorithm.
    """
    model, trainer = config.model, config.trainer
    if not issubclass_of(model.class_path, TwoPassModule):
        return
    for option, default in (
        ("gradient_clip_val", None),
        ("gradient_clip_algorithm", None),
        ("accumulate_grad_batches", 1),
    ):
        value = trainer[option]
        clips_nothing = option == "gradient_clip_val" and (value is None or value <= 0)
        if option not in model.init_args or value == default or clips_nothing:
            continue
        if option == "gradient_clip_algorithm" and value not in ("norm", "value"):
            raise ValueError(f"trainer.{option} must be 'norm' or 'value', got {value!r}")
        value = float(value) if option == "gradient_clip_val" else value
        module_value = model.init_args.get(option)
        if module_value not in (value, inspect.signature(TwoPassModule).parameters[option].default):
            raise ValueError(
                f"trainer.{option} is {value} and model.{option} is {module_value}, which are two names of one option:"
                " give one"
            )
        model.init_args[option], trainer[option] = value, default


def issubclass_of(class_path: str, base: type) -> bool:
    """Return whether the class at a dotted path is a subclass of ``base``."""
    module, _, name = class_path.rpartition(".")
    found = getattr(importlib.import_module(module), name) if module else None
    return inspect.isclass(found) and issubclass(found, base)


def check_precision(requested: str, trainer: L.Trainer) -> None:
    """Check that the accelerator supports the requested precision.

    Raises:
        ValueError: Lightning has replaced it by another one.
    """
    requested = PRECISIONS.get(requested, requested)
    if requested in PRECISIONS.values() and trainer.precision != requested:
        device = type(trainer.accelerator).__name__.removesuffix("Accelerator")
        raise ValueError(
            f"trainer.precision {requested} is not available on a {device}, where Lightning would use"
            f" {trainer.precision}: give --trainer.precision {trainer.precision}, or 32-true"
        )


def check_checkpoints(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Check the trainer's checkpoint callbacks.

    Raises:
        ValueError: one would lose something without a message.
    """
    for average in callbacks_of(trainer, L.callbacks.WeightAveraging):
        check_saves_average(trainer, type(average).__name__)
    for callback in trainer.checkpoint_callbacks:
        name, ours = type(callback).__name__, isinstance(callback, (BestCheckpoint, LastCheckpoint))
        timed = getattr(callback, "_train_time_interval", None) is not None
        if timed and not ours and not module.automatic_optimization:
            raise ValueError(
                f"{name} ignores train_time_interval, because {type(module).__name__} makes its own optimizer steps:"
                " give --checkpoint.train_time_interval"
            )
        if getattr(callback, "save_last", None) and not ours:
            raise ValueError(
                f"{name} with save_last would replace the last.ckpt of the run, which last_checkpoint.* writes: remove"
                " save_last"
            )
        if isinstance(callback, L.callbacks.OnExceptionCheckpoint):
            raise ValueError(
                f"{name} would let Lightning resume from its file, even if another run wrote that: give"
                " --checkpoint.save_on_exception true, which writes exception.ckpt to the run's folder"
            )
