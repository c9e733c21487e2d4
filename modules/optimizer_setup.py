"""From a network and a config to an optimizer with its parameter groups, and to a scheduler."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ars2.param_groups import Policy, param_groups
from ars2.validation import check_known


def build_optimizer(
    network: nn.Module,
    make_optimizer: OptimizerCallable,
    policy: Policy,
    matrix: Mapping[str, Any] | None,
    vector: Mapping[str, Any] | None,
) -> Optimizer:
    """Return the optimizer over the network's groups, ``matrix`` and ``vector`` being options of one track alone.

    Raises:
        ValueError: one of these is an option that the optimizer does not have.
    """
    groups: Iterable[Any] = param_groups(network, policy, matrix, vector)
    optimizer = make_optimizer(groups)
    for track, options in (("matrix", matrix), ("vector", vector)):
        known = getattr(optimizer, "group_options", optimizer.defaults)
        check_known(options or {}, known, f"{type(optimizer).__name__} ({track} group)")
    return optimizer


def build_scheduler(optimizer: Optimizer, make_scheduler: LRSchedulerCallable) -> LRScheduler:
    """Return the scheduler.

    Raises:
        ValueError: it is one that watches a metric.
    """
    scheduler = make_scheduler(optimizer)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError("ReduceLROnPlateau needs a metric to watch, which is not supported: name another scheduler")
    return scheduler
