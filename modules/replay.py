"""What a second pass needs in order to be one: the first one's random numbers, and running statistics left alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from library_internals import NormBase


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Normalise with batch statistics, as in training, and leave running statistics and their counters alone."""
    tracking = [m for m in module.modules() if isinstance(m, NormBase) and m.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True


def random_state(device: torch.device) -> Callable[[], None]:
    """Remember the random state of the host and of ``device``; calling the result goes back to it."""
    host = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def go_back() -> None:
        torch.set_rng_state(host)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)

    return go_back
