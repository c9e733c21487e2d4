"""Keep the numbers that change from step to step on the device.

A captured CUDA graph is replayed without Python. Whatever changes must be a tensor that is updated in place.
"""

from typing import Any

import torch
from torch import Tensor

COUNTERS = ("step", "sync_steps", "last_sync")
NUMBERS = (*COUNTERS, "lr", "initial_lr")


def to_device_(group: dict[str, Any]) -> None:
    """Replace the counters and learning rates of ``group`` by float32 scalar tensors.

    They are on the device of the first parameter. torch's schedulers update such a learning rate in place.

    Raises:
        ValueError: the mode decides in Python whether a step is a two-pass step.
    """
    if group["mode"] not in ("base", "sync"):
        raise ValueError(f'capturable needs mode "base" or "sync", got {group["mode"]!r}: set another mode')
    device = group["params"][0].device if group["params"] else None
    for name in NUMBERS:
        if isinstance(group.get(name), Tensor):
            group[name] = group[name].to(device, torch.float32)
        elif name in group:
            group[name] = torch.tensor(float(group[name]), device=device)


def to_host_(group: dict[str, Any]) -> None:
    """Replace these tensors by plain numbers, as they are saved.

    This reads the device.
    """
    for name in NUMBERS:
        if isinstance(group.get(name), Tensor):
            group[name] = int(group[name]) if name in COUNTERS else float(group[name])
