"""Record the operations that torch dispatches inside a block.

Tests count with it what a step does besides its arithmetic.
"""

from collections.abc import Iterable
from types import TracebackType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode


class Dispatched(TorchDispatchMode):
    """Record the names of all dispatched operations.

    ``Tensor.tolist()`` counts as one, though a tensor on the CPU dispatches nothing for it. Step counts of
    ``optimizers`` are left out: they are on the host, and reading them waits for nothing.

    Attributes:
        names: of the operations, in order.
        in_backward: those of them that a backward pass has called.
    """

    def __init__(self, optimizers: Iterable[Optimizer] = ()) -> None:
        super().__init__()
        self.names: list[str] = []
        self.in_backward: list[str] = []
        states = (state for optimizer in optimizers for state in optimizer.state.values())
        self.on_host = {id(state["step"]) for state in states if "step" in state}
        tolist = Tensor.tolist

        def recorded(tensor: Tensor) -> Any:
            self.names.append("tolist")
            return tolist(tensor)

        self._recording = patch.object(Tensor, "tolist", recorded)

    def __enter__(self) -> "Dispatched":
        self._recording.start()
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._recording.stop()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not args or id(args[0]) not in self.on_host:
            self.names.append(str(function))
            if torch._C._current_graph_task_id() != -1:
                self.in_backward.append(str(function))
        return function(*args, **(kwargs or {}))

    def count(self, part: str) -> int:
        """Return how many operations have ``part`` in their name."""
        return sum(part in name for name in self.names)
