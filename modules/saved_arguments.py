"""The arguments that a module was made with, in its checkpoints: what load_from_checkpoint() makes it of again."""

import inspect
from collections.abc import Mapping
from types import FrameType
from typing import Any

from torch import Tensor, nn


def arguments_of(module: nn.Module, frame: FrameType | None) -> dict[str, Any]:
    """Return the arguments of the outermost ``__init__`` of ``module`` that is under way, if they are plain values.

    Others, such as a function that makes an optimizer, are not for a checkpoint that is read without running code. Of
    these ``optimizer`` becomes ``None``: a module can be evaluated without one.

    Args:
        module: under construction.
        frame: of one of its ``__init__`` methods.
    """
    arguments: dict[str, Any] = {}
    while frame is not None and frame.f_code.co_name == "__init__":
        names, _, keywords, values = inspect.getargvalues(frame)
        if not names or values[names[0]] is not module:
            break
        arguments = {name: values[name] for name in names[1:]} | (values[keywords] if keywords else {})
        frame = frame.f_back
    without = {"optimizer": None} if "optimizer" in arguments else {}
    return {name: value for name, value in arguments.items() if is_plain(value)} | without


def is_plain(value: Any) -> bool:
    """Say whether ``value`` is made of numbers, texts, lists, tuples and dictionaries alone."""
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(map(is_plain, (*value, *value.values())))
    return value is None or type(value) in (bool, int, float, str)


def check_same_network(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Check that ``module`` is made of the tensors of ``state``.

    Raises:
        ValueError: it is not.
    """
    here, there = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (module.state_dict(), state)
    )
    for name in {**there, **here}:
        if here.get(name) != there.get(name):
            raise ValueError(
                f"{name} is {there.get(name, 'not there')} in the checkpoint and {here.get(name, 'not there')} in the"
                f" {type(module).__name__} that was made for it: give load_from_checkpoint() the arguments of the run's"
                " config.yaml, such as width=8, if the checkpoint is older than those that hold them"
            )
