"""Wrap private APIs of libraries that have no public equivalent.

Private names that a subclass overrides stay with that subclass, and torch's ``_foreach`` functions are used directly.
ars2/ imports only torch and has its own. tests/experiment/test_library_internals.py lists all of them and fails when a
library removes one.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase as NormBase

if TYPE_CHECKING:
    import lightning.pytorch as L
    from torchmetrics import Metric

__all__ = ["NormBase"]


def is_compiled(network: nn.Module) -> bool:
    """Return whether ``network.compile()`` was called."""
    return network._compiled_call_impl is not None


def sparse_values(gradient: Tensor) -> Tensor:
    """Return the values of a sparse tensor, even of an uncoalesced one."""
    return gradient._values()


def set_updates(metric: "Metric", updates: int) -> None:
    """Set the number of updates behind a metric's state, and clear its cached result."""
    metric._update_count, metric._computed = updates, None


def pending_row(trainer: "L.Trainer") -> dict[str, float]:
    """Return the unlogged row of a finished epoch; empty within an epoch."""
    connector = trainer._logger_connector
    if connector._first_loop_iter is not None:
        return {}
    logged: dict[str, Any] = connector.metrics["log"]
    values = {name: value.item() if isinstance(value, Tensor) else value for name, value in logged.items()}
    return {**values, "epoch": trainer.current_epoch} if values else {}


def is_within_epoch(trainer: "L.Trainer") -> bool:
    """Return whether the current epoch has more batches."""
    return not trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def is_attached(module: "L.LightningModule") -> bool:
    """Return whether a module has a Trainer; ``module.trainer`` raises without."""
    return module._trainer is not None


def has_validated(trainer: "L.Trainer") -> bool:
    """Return whether a validation has run during training."""
    return bool(trainer.fit_loop.epoch_loop.val_loop._has_run)


def disable_sigterm_broadcast(trainer: "L.Trainer") -> None:
    """Disable the training loop's SIGTERM broadcast with every batch."""
    loop: Any = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):
        loop._broadcast_sigterm_tensor = lambda: None


def sets_learning_rate(finder: "L.callbacks.LearningRateFinder") -> bool:
    """Return whether a learning-rate finder writes its suggestion to an attribute."""
    return bool(finder._update_attr)


def actions_of(parser: Any) -> list[Any]:
    """Return the actions of an argparse or jsonargparse parser."""
    found: list[Any] = parser._actions
    return found
