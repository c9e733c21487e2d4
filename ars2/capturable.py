"""Numbers that change from step to step, held on the device: what it takes to capture a step in a CUDA graph.

A captured step is repeated without Python, so whatever changes must be a tensor that is changed in place.
"""

from typing import Any

import torch
from torch import Tensor

COUNTERS = ("step", "sync_steps", "last_sync")
NUMBERS = (*COUNTERS, "lr", "initial_lr")


def to_device_(group: dict[str, Any]) -> None:
    """Put the counters and learning rates of ``group`` into float32 tensors without dimensions, beside its first
    parameter. torch's schedulers change such a learning rate in place.

    Raises:
        ValueError: a mode whose steps are decided in Python.
    """
    if group["mode"] not in ("base", "sync"):
        raise ValueError(f'capturable needs mode "base" or "sync", got {group["mode"]!r}, which decides each step anew')
    device = group["params"][0].device if group["params"] else None
    for name in NUMBERS:
        if isinstance(group.get(name), Tensor):
            group[name] = group[name].to(device, torch.float32)
        elif name in group:
            group[name] = torch.tensor(float(group[name]), device=device)


def to_host_(group: dict[str, Any]) -> None:
    """Make plain numbers of them, as they are saved; reads the device."""
    for name in NUMBERS:
        if isinstance(group.get(name), Tensor):
            group[name] = int(group[name]) if name in COUNTERS else float(group[name])
