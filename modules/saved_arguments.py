"""Save the arguments of a module in its checkpoints.

load_from_checkpoint() makes the module from them.
"""

import inspect
from collections.abc import Mapping
from types import FrameType
from typing import Any

from torch import Tensor, nn


def arguments_of(module: nn.Module, frame: FrameType | None) -> dict[str, Any]:
    """Return the plain arguments of the outermost running ``__init__`` of ``module``.

    Other arguments, such as a function that makes an optimizer, cannot be loaded without running code, and are left
    out. ``optimizer`` becomes ``None``, since a module can be evaluated without one.

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
    """Return whether ``value`` consists only of plain values.

    These are numbers, strings, None, lists, tuples and dictionaries.
    """
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(map(is_plain, (*value, *value.values())))
    return value is None or type(value) in (bool, int, float, str)


def check_same_network(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Check that ``module`` has the tensors of ``state``.

    Raises:
        ValueError: names or shapes differ.
    """
    actual, saved = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (module.state_dict(), state)
    )
    for name in {**saved, **actual}:
        if actual.get(name) != saved.get(name):
            raise ValueError(
                f"{name} is {saved.get(name, 'missing')} in the checkpoint and {actual.get(name, 'missing')} in the"
                f" {type(module).__name__} made for it: pass load_from_checkpoint() the arguments in the run's"
                " config.yaml, such as width=8, if the checkpoint is too old to have them"
            )
