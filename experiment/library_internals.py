"""The private names of torch, Lightning, torchmetrics and jsonargparse that nothing public stands for, in one place.

Names that a subclass overrides or inherits stay with it, and so do torch's ``_foreach`` functions; the optimizer in
ars2/ needs torch alone and has its own. tests/test_library_internals.py knows them all, and notices when one goes.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase as NormBase

if TYPE_CHECKING:
    import lightning.pytorch as L
    from torchmetrics import Metric

__all__ = ["NormBase"]


def is_compiled(network: nn.Module) -> bool:
    """Say whether ``network.compile()`` was called."""
    return network._compiled_call_impl is not None


def sparse_values(gradient: Tensor) -> Tensor:
    """Return the values of a sparse tensor, also of one that has an index twice, which ``values()`` refuses."""
    return gradient._values()


def set_updates(metric: "Metric", updates: int) -> None:
    """Say how many updates the state that ``metric`` was given is made of; what it had computed is forgotten."""
    metric._update_count, metric._computed = updates, None


def row_to_come(trainer: "L.Trainer") -> dict[str, float]:
    """Return the row of an epoch that has ended and is not in the log yet; empty in the middle of one."""
    connector = trainer._logger_connector
    if connector._first_loop_iter is not None:
        return {}
    logged: dict[str, Any] = connector.metrics["log"]
    values = {name: value.item() if isinstance(value, Tensor) else value for name, value in logged.items()}
    return {**values, "epoch": trainer.current_epoch} if values else {}


def is_within_epoch(trainer: "L.Trainer") -> bool:
    """Say whether there are more batches in the epoch under way."""
    return not trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def is_attached(module: "L.LightningModule") -> bool:
    """Say whether a Trainer has taken the module, whose ``trainer`` is an error before."""
    return module._trainer is not None


def has_validated(trainer: "L.Trainer") -> bool:
    """Say whether a validation was made while training."""
    return bool(trainer.fit_loop.epoch_loop.val_loop._has_run)


def ask_for_no_sigterm(trainer: "L.Trainer") -> None:
    """Let the training loop not ask the first process for a SIGTERM with every batch."""
    loop: Any = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):
        loop._broadcast_sigterm_tensor = lambda: None


def actions_of(parser: Any) -> list[Any]:
    """Return the actions of an argparse or jsonargparse parser."""
    found: list[Any] = parser._actions
    return found
