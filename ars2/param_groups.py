"""Decide which parameters are matrices.

Their roles in the model decide, not their names, except for LoRA's factors. There are two policies. ``"all"`` takes
every trainable parameter with two or more dimensions whose largest dimension is below 10,000. ``"hidden"``, recommended
by Muon's authors, leaves out embeddings, output heads, normalisation gains, LoRA's A, and bare parameters that are
broadcast. The latter are those with a leading dimension of 1, as a vision transformer's position embeddings (1, N, D)
and class token (1, 1, D), and those with at most one dimension above 1, as a layer scale (C, 1, 1). Weights of linear
layers and convolutions are matrices whatever their shape.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from ars2.output_heads import Head, find_heads, unwrapped

Policy = Literal["all", "hidden"]
Splits = Mapping[str, int | Sequence[int]]
LARGEST_MATRIX_DIMENSION = 10_000

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NOT_HIDDEN = ("embedding", "tied embedding", "output head", "norm", "token or position", "bias or gain", "LoRA A")
_LORA = re.compile(r"\blora_(?:embedding_)?([AB])\b")


def is_matrix(shape: Sequence[int]) -> bool:
    """Return whether policy ``"all"`` takes a tensor of this shape for a matrix."""
    return len(shape) >= 2 and max(shape) < LARGEST_MATRIX_DIMENSION


class Assignment(NamedTuple):
    """Describe a parameter; ``flatten`` and ``splits`` are options of its group."""

    name: str
    param: nn.Parameter
    role: str
    track: str
    reason: str
    flatten: bool
    splits: int | tuple[int, ...] | None = None


def assign(
    model: nn.Module, policy: Policy = "all", head: Head | None = None, splits: Splits | None = None
) -> list[Assignment]:
    """Assign every trainable parameter of ``model`` to a track.

    The order is that of registration. A tied parameter appears once. Arguments and errors are those of
    :func:`param_groups`.
    """
    if policy not in ("all", "hidden"):
        raise ValueError(f"policy must be 'all' or 'hidden', got {policy!r}")
    heads, wrapped, splits = find_heads(model, head).modules, unwrapped(model), splits or {}
    prefixes = [f"{name}." if name else "" for name, module in model.named_modules() if module in wrapped]
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    names: dict[nn.Parameter, str] = {}
    for prefix, module in model.named_modules():
        for name, param in module.named_parameters(prefix, recurse=False):
            if is_lazy(param):
                raise ValueError(f"parameter {name} has no shape yet: run one forward pass before building the groups")
            if param.requires_grad:
                owners.setdefault(param, []).append(module)
                names.setdefault(param, name)
    if not owners:
        raise ValueError("the model has no trainable parameter")
    items, unmatched = [], set(splits)
    for param, name in names.items():
        role = _role(name, param, owners[param], heads)
        track = "vector"
        if param.ndim < 2:
            reason = "fewer than two dimensions"
        elif not is_matrix(param.shape):
            reason = f"a dimension of {LARGEST_MATRIX_DIMENSION} or more"
        elif policy == "hidden" and role in _NOT_HIDDEN:
            reason = f"policy hidden leaves out every {role}"
        else:
            track, reason = "matrix", "two dimensions or more"
        # Optimizers read these shapes as a stack of matrices, or as a matrix (kh, kw), unless they are flattened.
        ambiguous = param.ndim == 3 or param.shape[:2] == (1, 1)
        flatten = track == "matrix" and isinstance(owners[param][0], _CONVOLUTIONS) and ambiguous
        item = Assignment(name, param, role, track, reason, flatten)
        patterns = [p for p in splits if any(fnmatchcase(name.removeprefix(prefix), p) for prefix in prefixes)]
        items.append(_split(item, splits[patterns[0]]) if patterns else item)
        unmatched.difference_update(patterns)
    if unmatched:
        raise ValueError(f"splits: no parameter matches {sorted(unmatched)}: report(model) lists the names")
    return items


def _role(name: str, param: nn.Parameter, owners: list[nn.Module], heads: frozenset[nn.Module]) -> str:
    if param.ndim < 2:
        return "norm" if isinstance(owners[0], _NORMS) else "bias or gain"
    if factor := _LORA.search(name):
        return f"LoRA {factor[1]}"
    if any(isinstance(owner, _EMBEDDINGS) for owner in owners):
        return "tied embedding" if len(owners) > 1 else "embedding"
    if not heads.isdisjoint(owners):
        return "output head"
    if isinstance(owners[0], _NORMS):
        return "norm"
    if isinstance(owners[0], _CONVOLUTIONS):
        return "convolution"
    if not isinstance(owners[0], nn.Linear):
        if param.shape[0] == 1:
            return "token or position"
        if param.numel() == max(param.shape):
            return "bias or gain"
    return "stack" if param.ndim == 3 else "hidden"


def _split(item: Assignment, blocks: int | Sequence[int]) -> Assignment:
    """Return ``item`` with its rows split into ``blocks``."""
    what = f"splits: parameter {item.name} of shape {tuple(item.param.shape)}"
    if item.track == "vector":
        raise ValueError(f"{what} is on the vector track ({item.reason}): match matrices only")
    if item.param.ndim > 2:
        raise ValueError(f"{what} is not a matrix (rows, cols): match weights of two dimensions only")
    rows, listed = item.param.shape[0], isinstance(blocks, Sequence)
    counts: tuple[Any, ...] = tuple(blocks) if isinstance(blocks, Sequence) else (blocks,)
    positive = counts and all(isinstance(count, Integral) and int(count) > 0 for count in counts)
    if not positive or (sum(counts) != rows if listed else rows % counts[0]):
        raise ValueError(f"{what} cannot be split into {blocks}: give a divisor of {rows}, or row counts of this sum")
    number = len(counts) if listed else counts[0]
    splits = tuple(map(int, counts)) if listed else int(counts[0])
    return item._replace(reason=f"{item.reason}, split into {number} blocks", splits=splits)


def param_groups(
    model: nn.Module,
    policy: Policy = "all",
    matrix: Mapping[str, Any] | None = None,
    vector: Mapping[str, Any] | None = None,
    head: Head | None = None,
    named: bool = True,
    splits: Splits | None = None,
) -> list[dict[str, Any]]:
    """Build the parameter groups of ``model`` for any optimizer.

    Optimizers without tracks ignore the extra options of the groups.

    Args:
        model: all its trainable parameters are included, tied ones once.
        policy: ``"all"`` or ``"hidden"``.
        matrix, vector: options for the groups of that track, such as ``{"lr": 1e-2, "weight_decay": 0.0}``.
        head: the module that makes the outputs, its name, or several of either. By default :func:`find_heads
            <ars2.output_heads.find_heads>` finds it. Policy ``"hidden"`` warns if that is a guess.
        named: whether the groups contain (name, parameter) pairs, by which errors and checkpoints name a parameter.
            ``False`` gives plain parameters, for users that accept no pairs, such as ``ZeroRedundancyOptimizer``.
        splits: fused weights, whose row blocks are updated as separate matrices. The keys are patterns of parameter
            names, as in ``{"*.qkv.weight": 3}``, the values numbers of equal blocks, or the rows of each block. The
            first pattern that matches decides.

    Returns:
        One group for each track that has parameters. Kernels that are flattened, such as those of 1-D convolutions,
        form a separate group, as do weights with the same splits.

    Raises:
        TypeError: not a model, such as ``model.parameters()``.
        ValueError: unknown policy or head, no trainable parameter, a lazy parameter without a shape, ``splits`` that do
            not fit, or an option that the groups set themselves.
    """
    for track, options in (("matrix", matrix), ("vector", vector)):
        if reserved := {"params", "track", "flatten", "splits"} & set(options or {}):
            raise ValueError(f"options of the {track} track may not contain {sorted(reserved)}: the policy sets these")
    if policy == "hidden" and (warning := _guess(model, head)):
        warnings.warn(warning, stacklevel=2)
    groups: dict[Any, dict[str, Any]] = {}
    for item in assign(model, policy, head, splits):
        key = {"track": item.track, "flatten": item.flatten, "splits": item.splits}
        options = {name: value for name, value in key.items() if value}
        options |= (matrix if item.track == "matrix" else vector) or {}
        group = groups.setdefault(tuple(key.values()), {"params": [], **options})
        group["params"].append((item.name, item.param) if named else item.param)
    return list(groups.values())


def report(model: nn.Module, policy: Policy = "all", head: Head | None = None, splits: Splits | None = None) -> str:
    """Return a table of tracks and reasons, with the share of each track last."""
    items = assign(model, policy, head, splits)
    rows = [("track", "role", "shape", "parameter", "reason")]
    rows += [(i.track, i.role, "x".join(map(str, i.param.shape)), i.name, i.reason) for i in items]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]) for row in rows]
    lines += filter(None, [_guess(model, head)])
    shares = []
    for track in sorted({item.track for item in items}):
        numels = [item.param.numel() for item in items if item.track == track]
        percent = 100 * sum(numels) / sum(item.param.numel() for item in items)
        tensors = "1 tensor" if len(numels) == 1 else f"{len(numels)} tensors"
        shares.append(f"{track} {tensors}, {sum(numels):,} numbers ({percent:.1f} %)")
    return "\n".join([*lines, f"policy {policy}: {', '.join(shares)}"])


def _guess(model: nn.Module, head: Head | None) -> str:
    """Return a sentence about a guessed head, or nothing."""
    name = find_heads(model).guessed if head is None else None
    if name is None:
        return ""
    return f"the output head {name!r} is a guess, the last linear layer: confirm it with head={name!r}, or name another"
