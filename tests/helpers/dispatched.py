"""Record the operations that torch dispatches inside a block.

Tests count with it what a step does besides its arithmetic.
"""

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode


class Dispatched(TorchDispatchMode):
    """Record the names of all dispatched operations.

    Step counts of ``optimizers`` are left out: they are on the host, and reading them waits for nothing.
    """

    def __init__(self, optimizers: Iterable[Optimizer] = ()) -> None:
        super().__init__()
        self.names: list[str] = []
        states = (state for optimizer in optimizers for state in optimizer.state.values())
        self.on_host = {id(state["step"]) for state in states if "step" in state}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not args or id(args[0]) not in self.on_host:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))

    def count(self, part: str) -> int:
        """Return how many operations have ``part`` in their name."""
        return sum(part in name for name in self.names)
