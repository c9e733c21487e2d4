"""Check optimizer options.

Every error names the option, its value and what is allowed.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

_SYNONYMS = {"learning_rate": "lr", "wd": "weight_decay", "l2": "weight_decay", "epsilon": "eps", "beta": "betas"}


def check_number(
    options: Mapping[str, Any],
    name: str,
    minimum: float,
    maximum: float = math.inf,
    *,
    open_minimum: bool = False,
    closed_maximum: bool = False,
) -> None:
    """Check that ``options[name]`` is a finite number in [minimum, maximum).

    ``open_minimum`` and ``closed_maximum`` exclude and include the ends.

    Raises:
        ValueError: missing, not a number, not finite, or out of range.
    """
    left, right = "(" if open_minimum else "[", "]" if closed_maximum else ")"
    value = options.get(name, "nothing")
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if (
        not number
        or value < minimum
        or value > maximum
        or (open_minimum and value == minimum)
        or (not closed_maximum and value == maximum)
    ):
        raise ValueError(f"{name} must be a number in {left}{minimum:g}, {maximum:g}{right}, got {value!r}")


def plain_numbers(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``options`` with Python numbers in place of NumPy's and others.

    The safe loader of checkpoints accepts no other numbers.
    """

    def plain(value: Any) -> Any:
        if type(value) in (bool, int, float) or not isinstance(value, Real):  # NumPy's float64 is a float too
            return value
        return int(value) if isinstance(value, Integral) else float(value)

    return {
        name: tuple(map(plain, value)) if isinstance(value, tuple) else plain(value) for name, value in options.items()
    }


def check_integer(options: Mapping[str, Any], name: str, minimum: int) -> None:
    """Check that ``options[name]`` is an integer of at least ``minimum``.

    Raises:
        ValueError: missing, not an integer, or too small.
    """
    value = options.get(name, "nothing")
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")


def check_betas(options: Mapping[str, Any]) -> None:
    """Check that ``options["betas"]`` is a pair of numbers in [0, 1).

    Raises:
        ValueError: anything else.
    """
    betas = options.get("betas", "nothing")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers in [0, 1), got {betas!r}")
    for index, beta in enumerate(betas):
        check_number({f"betas[{index}]": beta}, f"betas[{index}]", 0.0, 1.0)


def check_choice(options: Mapping[str, Any], name: str, allowed: Collection[Any]) -> None:
    """Check that ``options[name]`` is one of ``allowed``.

    Raises:
        ValueError: anything else.
    """
    value = options.get(name, "nothing")
    if not any(isinstance(value, type(item)) and value == item for item in allowed):
        raise ValueError(f"{name} must be one of {', '.join(repr(item) for item in allowed)}, got {value!r}")


def check_known(names: Iterable[str], known: Collection[str], of: str) -> None:
    """Check that every name is one of the ``known`` options.

    Raises:
        ValueError: a name is unknown. The message suggests the closest known one.
    """
    for name in sorted(set(names) - set(known)):
        # Synonyms in other libraries are not close in spelling.
        near = _SYNONYMS.get(name.lower(), name)
        close = [near] if near in known else get_close_matches(name, sorted(known), 1)
        hint = f"did you mean {close[0]!r}?" if close else f"it knows {', '.join(sorted(known))}"
        raise ValueError(f"{of} has no option {name!r}: {hint}")


def check_same_options(groups: list[dict[str, Any]], names: Collection[str]) -> None:
    """Check that every group has the same values of the shared options.

    Raises:
        ValueError: two groups differ.
    """
    for name in names:
        if any(group.get(name) != groups[0].get(name) for group in groups):
            found = " and ".join(sorted({repr(group.get(name)) for group in groups}))
            raise ValueError(f"{name} must be the same in all groups, but is {found}: set it for the optimizer only")


def check_parameter(param: Any, name: str, track: str) -> None:
    """Check that one parameter can be optimized on its track.

    Raises:
        TypeError: not a tensor.
        ValueError: complex or integer values, a sparse layout, no shape yet, flattened by FSDP1, or fewer than two
            dimensions on the matrix track.
    """
    if not isinstance(param, Tensor):
        raise TypeError(f"parameter {name} must be a tensor, got {type(param).__name__}")
    if getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            f"parameter {name} belongs to FullyShardedDataParallel, which flattens matrices: shard the model with"
            " torch.distributed.fsdp.fully_shard instead"
        )
    if is_lazy(param):
        raise ValueError(f"parameter {name} has no shape yet: run one forward pass before making the optimizer")
    if param.is_complex():
        raise ValueError(
            f"parameter {name} is complex ({param.dtype}), which is not supported: optimize torch.view_as_real of it"
        )
    if param.layout is not torch.strided:
        raise ValueError(f"parameter {name} is sparse ({param.layout}), which is not supported: make it dense")
    if not param.is_floating_point():
        raise ValueError(f"parameter {name} must be of a floating-point dtype, got {param.dtype}")
    if track == "matrix" and param.ndim < 2:
        raise ValueError(
            f"parameter {name} of shape {tuple(param.shape)} is on the matrix track, which needs two dimensions:"
            ' build the groups with ars2.param_groups(model), or set track="vector" in its group'
        )


def check_splits(param: Tensor, name: str, group: Mapping[str, Any]) -> None:
    """Check that the rows of a parameter split into the blocks of its group.

    Raises:
        ValueError: neither a number of blocks nor row counts, or another number of rows.
    """
    splits = group["splits"]
    sizes = splits if isinstance(splits, tuple) else (splits,)
    if not sizes or not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise ValueError(f"splits must be a number of row blocks, or the row counts of each, got {splits!r}")
    if splits == 1 and isinstance(splits, int):
        return
    rows = param.shape[0] if param.ndim == 2 and group["track"] == "matrix" else None
    if rows is None or (rows % splits if isinstance(splits, int) else rows != sum(splits)):
        raise ValueError(
            f"parameter {name} of shape {tuple(param.shape)} on the {group['track']} track cannot be split into"
            f" {splits!r} row blocks: use a number that divides its rows, or row counts that add up to them"
        )


def check_state(saved: Mapping[str, Any], name: str, param: Tensor, keys: Collection[str]) -> None:
    """Check that a saved per-parameter state has exactly the tensors ``keys``.

    Each must have the parameter's shape.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape.
    """
    if set(saved) != set(keys):
        raise ValueError(
            f"the saved state of parameter {name} has {sorted(saved) or 'nothing'}, not {sorted(keys)}:"
            " load it into an optimizer of the same class and mode"
        )
    for key in keys:
        if not isinstance(saved[key], Tensor) or saved[key].shape != param.shape:
            shape = tuple(saved[key].shape) if isinstance(saved[key], Tensor) else type(saved[key]).__name__
            raise ValueError(
                f"the saved {key} of parameter {name} is {shape}, not {tuple(param.shape)}: load it into a"
                " model of the same shapes"
            )


DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
