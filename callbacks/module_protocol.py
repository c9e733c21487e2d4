"""Declare and find what callbacks need of the module that is trained."""

from collections.abc import Iterator
from typing import Any, Protocol

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from ars2.param_groups import Policy, Splits
from callbacks.lookup import callbacks_of
from callbacks.ordinary_module import OrdinaryModule


class TrainedModule(Protocol):
    """List the members that callbacks read; ``stop_asked`` is the only one they write.

    :class:`modules.two_pass.TwoPassModule` documents and provides them. For an ordinary LightningModule
    :class:`callbacks.ordinary_module.OrdinaryModule` does.
    """

    network: nn.Module
    policy: Policy
    splits: Splits | None
    val_metrics: Any
    unit: str
    gradient_evaluations: int
    fatal_error: str | None
    stop_asked: bool
    stop_agreed: bool | None

    @property
    def between_steps(self) -> bool: ...
    @property
    def device(self) -> torch.device: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def buffers(self) -> Iterator[Tensor]: ...
    def batch_size(self, batch: Any) -> int: ...
    def compute_loss(self, batch: Any, metrics: None) -> Tensor: ...


def trained(trainer: L.Trainer, pl_module: Any) -> TrainedModule:
    """Return what callbacks may use of the module that is trained."""
    module: Any = next(iter(callbacks_of(trainer, OrdinaryModule)), pl_module)
    found: TrainedModule = module
    return found
