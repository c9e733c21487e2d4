"""Build the optimizer with its parameter groups, and the scheduler."""

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
    """Return the optimizer of the network's parameter groups.

    ``matrix`` and ``vector`` are options of one track.

    Raises:
        ValueError: the optimizer lacks one of these options.
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
        ValueError: the scheduler needs a metric.
    """
    scheduler = make_scheduler(optimizer)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError("ReduceLROnPlateau needs a metric, which is not supported: use another scheduler")
    return scheduler
