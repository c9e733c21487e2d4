"""Check that a task module can be trained.

One error lists everything that is missing, before training starts.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from experiment.library_internals import sets_learning_rate
from modules.optimizers import moves_parameters


def check_complete(module: L.LightningModule, base: type[L.LightningModule]) -> None:
    """Check that a subclass of ``base`` (TwoPassModule) is complete.

    It must not replace the methods of ``base`` that train.

    Raises:
        ValueError: it replaces the training step or the optimizers, lacks its loss, network or metrics, or has
            parameters outside the network.
    """
    kind, network = type(module), getattr(module, "network", None)
    needed = {
        "leave training_step() to TwoPassModule, which makes both passes": not _replaces(kind, base, "training_step"),
        "leave configure_optimizers() to TwoPassModule, which makes the one that model.optimizer names": (
            not _replaces(kind, base, "configure_optimizers")
        ),
        "implement compute_loss(batch, metrics), which returns the mean loss of a batch": (
            inspect.getattr_static(kind, "compute_loss") is not inspect.getattr_static(base, "compute_loss")
            and _takes(getattr(kind, "compute_loss", None), module, "batch", "metrics")
        ),
        "set self.network in __init__()": isinstance(network, nn.Module),
        "call self.set_metrics({...}) in __init__()": hasattr(module, "train_metrics"),
        "give it an optimizer, which load_from_checkpoint(path, optimizer=...) takes too": (
            getattr(module, "make_optimizer", None) is not None
        ),
    }
    if missing := [sentence for sentence, is_there in needed.items() if not is_there]:
        raise ValueError(f"{kind.__name__} cannot be trained yet: {'; '.join(missing)}")
    assert isinstance(network, nn.Module)
    trained = set(network.parameters())
    left = [name for name, param in module.named_parameters() if param.requires_grad and param not in trained]
    if left:
        raise ValueError(
            f"{kind.__name__} has parameters outside self.network, which would not be trained: {', '.join(left[:3])}"
            f"{' and others' if len(left) > 3 else ''}; put them into it, or freeze them (requires_grad_(False))"
        )


# What to do instead of using a callback that cannot work.
_INSTEAD: dict[type[L.Callback], str] = {
    GradientAccumulationScheduler: (
        "changes the Trainer's accumulation, which manual optimization does not have: set accumulate_grad_batches of"
        " the module, which is the same in every epoch"
    ),
    ModelPruning: (
        "replaces weights by masked copies, which a network that reads its weights directly does not update, and which"
        " no checkpoint contains: prune the trained network with torch.nn.utils.prune"
    ),
    BaseFinetuning: (
        "changes the optimizer's groups in the run, so that it could not be resumed: freeze parameters with"
        " requires_grad_(False) before training, and unfreeze them in a second run, from load_from_checkpoint()"
    ),
}


def check_trainer(module: L.LightningModule) -> None:
    """Check for options of the Trainer that manual optimization does not have.

    Raises:
        ValueError: it clips or accumulates. The message names the module's option.
    """
    trainer: Any = module.trainer
    algorithm = trainer.gradient_clip_algorithm
    options = {
        "gradient_clip_val": trainer.gradient_clip_val or None,  # 0 does not clip
        "gradient_clip_algorithm": None if algorithm is None else algorithm.value,
        "accumulate_grad_batches": None if trainer.accumulate_grad_batches == 1 else trainer.accumulate_grad_batches,
    }
    if given := [f"{name}={value!r}" for name, value in options.items() if value is not None]:
        raise ValueError(
            f"{type(module).__name__} makes its own optimizer steps, on which options of the Trainer have no effect:"
            f" give {', '.join(given)} to {type(module).__name__} instead"
        )


def check_callbacks(module: L.LightningModule) -> None:
    """Check for callbacks that do not work with manual optimization.

    Raises:
        ValueError: a callback of Lightning would silently do something else.
    """
    for callback in vars(module.trainer)["callbacks"]:
        name = type(callback).__name__
        for kind, why in _INSTEAD.items():
            if isinstance(callback, kind):
                raise ValueError(f"{name} {why}")
        if isinstance(callback, LearningRateFinder) and sets_learning_rate(callback):
            raise ValueError(
                f"{name} cannot set the learning rate, which is an option of the optimizer: call"
                " Tuner(trainer).lr_find(module, update_attr=False) and give the optimizer its suggestion(), or search"
                " settings with sweep.py"
            )
        if isinstance(callback, StochasticWeightAveraging) and callback.pl_module_contains_batch_norm(module):
            # It skips the backward pass in an extra epoch, which manual optimization ignores.
            raise ValueError(
                f"{name} would train its average for one more epoch to update the statistics of BatchNorm, since"
                f" {type(module).__name__} uses manual optimization: use WeightAveraging, which averages them"
            )
        if isinstance(callback, BatchSizeFinder):
            raise ValueError(
                f"{name} would replace the method batch_size() of {type(module).__name__} by a number: remove it and"
                " set the batch_size of the data module"
            )
        if isinstance(callback, WeightAveraging):
            if isinstance(module.trainer.strategy, ModelParallelStrategy):
                raise ValueError(f"{name} does not support a sharded network: use strategy ddp, or remove it")
            check_saves_average(module.trainer, name)


def check_average(module: L.LightningModule, optimizer: Any) -> None:
    """Check that the weights are not averaged twice.

    Raises:
        ValueError: a callback would average the parameters to train on of a schedule-free optimizer.
    """
    for callback in vars(module.trainer)["callbacks"]:
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)) and moves_parameters(optimizer):
            raise ValueError(
                f"{type(callback).__name__} would average parameters that {type(optimizer).__name__} does not evaluate,"
                " since it averages them itself: remove the callback, or use another optimizer"
            )


def check_saves_average(trainer: L.Trainer, name: str) -> None:
    """Check that every checkpoint has the average of :class:`WeightAveraging`.

    Raises:
        ValueError: a checkpoint callback saves only weights, and would save those that were not averaged.
    """
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "save_weights_only", False):
            raise ValueError(
                f"{name} saves its average only in full checkpoints, and {type(callback).__name__} saves only"
                " weights: set its save_weights_only to false (--checkpoint.save_weights_only false)"
            )


def _takes(function: Any, *arguments: Any) -> bool:
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    return True


def _replaces(kind: type, base: type, name: str) -> bool:
    """Return whether a subclass of ``base`` replaces a method without calling it."""
    between = kind.__mro__[: kind.__mro__.index(base)]
    methods = [inspect.unwrap(vars(one)[name]) for one in between if name in vars(one)]
    return any(inspect.isfunction(method) and name not in method.__code__.co_names for method in methods)


def examples_in(batch: Any) -> set[int]:
    """Return the lengths of the tensors with a dimension in ``batch``.

    Nested mappings and sequences are searched.
    """
    if isinstance(batch, Tensor):
        return {len(batch)} if batch.ndim else set()
    parts = batch.values() if isinstance(batch, Mapping) else batch
    if not isinstance(batch, (Mapping, Sequence)) or isinstance(batch, str):
        return set()
    return set().union(*map(examples_in, parts))
