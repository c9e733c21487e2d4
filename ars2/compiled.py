"""Compile the functions of a step with ``torch.compile``.

Numbers that change from step to step become tensors, so that they cause no recompilation.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Maps a function to itself or to its compiled version.
MaybeCompile = Callable[[Callable[..., Any]], Callable[..., Any]]


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
            return compiled(*map(_without_numbers, args), **static)
        except BackendCompilerFailed as error:
            reason = " ".join(str(error.inner_exception).split())[:200]
            raise RuntimeError(
                "compile=True: the optimizer step could not be compiled: install a C++ compiler such as g++ (for a GPU"
                f" also Triton), or set compile=False ({reason})"
            ) from error

    return call


def _without_numbers(argument: Any) -> Any:
    if isinstance(argument, (int, float)):
        # A kernel on any device accepts a CPU scalar as an argument; float64 represents the number exactly.
        return torch.tensor(float(argument), dtype=torch.float64, device="cpu")
    if isinstance(argument, tuple) and argument and not isinstance(argument[0], Tensor):
        return tuple(map(_without_numbers, argument))
    return argument
