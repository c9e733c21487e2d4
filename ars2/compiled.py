"""``torch.compile`` for the functions that a step is made of, so that a number that changes compiles nothing anew."""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Gives the function that is called in the place of another one: itself, or compiled.
MaybeCompile = Callable[[Callable[..., Any]], Callable[..., Any]]


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function``: the step is not compiled."""
    return function


class Compiler:
    """Compiles each function once, when it is first called.

    Positional numbers (learning rates, decays, step counts) are handed over as tensors without dimensions, whose values
    a compiled function does not depend on; keyword arguments are compiled in.
    """

    def __init__(self) -> None:
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if function not in self._compiled:
            self._compiled[function] = _compile(function)
        return self._compiled[function]


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    from torch._dynamo.exc import BackendCompilerFailed  # takes a second to import

    # torch counts and limits the compilations of a code object: every optimizer's groups get one of their own.
    own = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__
    )
    own.__kwdefaults__ = function.__kwdefaults__
    compiled = torch.compile(own, fullgraph=True, dynamic=False)

    def call(*args: Any, **static: Any) -> Any:
        try:
            return compiled(*map(_without_numbers, args), **static)
        except BackendCompilerFailed as error:
            reason = " ".join(str(error.inner_exception).split())[:200]
            raise RuntimeError(
                "compile=True: the optimizer step could not be compiled; install a C++ compiler such as g++ (for a GPU"
                f" Triton as well), or say compile=False ({reason})"
            ) from error

    return call


def _without_numbers(argument: Any) -> Any:
    if isinstance(argument, (int, float)):
        # On the CPU, from where a kernel of any device takes it as an argument; float64 loses nothing.
        return torch.tensor(float(argument), dtype=torch.float64, device="cpu")
    if isinstance(argument, tuple) and argument and not isinstance(argument[0], Tensor):
        return tuple(map(_without_numbers, argument))
    return argument
