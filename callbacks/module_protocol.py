"""Declare what callbacks need of the module that is trained."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ars2.param_groups import Policy, Splits


class TrainedModule(Protocol):
    """List the members that callbacks read; ``stop_asked`` is the only one they write.

    :class:`modules.two_pass.TwoPassModule` documents and provides them.
    """

    network: nn.Module
    policy: Policy
    splits: Splits | None
    val_metrics: nn.ModuleDict
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
    def buffers(self) -> Iterator[Tensor]: ...
    def batch_size(self, batch: Any) -> int: ...
    def compute_loss(self, batch: Any, metrics: None) -> Tensor: ...
