"""The operations that torch dispatches inside a block, for tests of what a step does besides its arithmetic."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Dispatched(TorchDispatchMode):
    """Record the names of all dispatched operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))

    def count(self, part: str) -> int:
        """Return how many operations have ``part`` in their name."""
        return sum(part in name for name in self.names)
