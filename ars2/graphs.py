"""Compile the functions of a step, or let a CUDA graph capture it.

Both need the same: a number that changes from step to step must be a tensor. ``torch.compile`` then compiles nothing
anew, and a graph, which is replayed without Python, sees the value of each step.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Maps a function to itself or to its compiled version.
MaybeCompile = Callable[[Callable[..., Any]], Callable[..., Any]]
COUNTERS = ("step", "sync_steps", "last_sync")
NUMBERS = (*COUNTERS, "lr", "initial_lr")


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` unchanged, for a step that is not compiled."""
    return function


class Compiler:
    """Compile each function at its first call.

    Positional numbers (learning rates, decays, step counts) become scalar tensors, so the compiled code does not depend
    on their values. Keyword arguments are compile-time constants.
    """

    def __init__(self) -> None:
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if function not in self._compiled:
            self._compiled[function] = _compile(function)
        return self._compiled[function]


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    from torch._dynamo.exc import BackendCompilerFailed  # takes a second to import

    # torch limits the recompilations of a code object, so the groups of every optimizer get a copy.
    copy = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    compiled = torch.compile(copy, fullgraph=True, dynamic=False)

    def call(*args: Any, **static: Any) -> Any:
        try:
            return compiled(*map(as_scalar_tensors, args), **static)
        except BackendCompilerFailed as error:
            reason = " ".join(str(error.inner_exception).split())[:200]
            raise RuntimeError(
                "compile=True: the optimizer step could not be compiled: install a C++ compiler such as g++ (for a GPU"
                f" also Triton), or set compile=False ({reason})"
            ) from error

    return call


def as_scalar_tensors(argument: Any) -> Any:
    """Return a number, or each number of a tuple, as a scalar tensor on the host.

    A kernel on any device accepts it as an argument. float64 represents the number exactly.
    """
    if isinstance(argument, (int, float)) and not isinstance(argument, bool):
        return torch.tensor(float(argument), dtype=torch.float64, device="cpu")
    if isinstance(argument, tuple):
        return tuple(map(as_scalar_tensors, argument))
    return argument


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
