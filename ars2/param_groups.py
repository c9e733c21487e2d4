"""Decide which parameters are matrices.

Their roles in the model decide, not their names. There are two policies. ``"all"`` takes every trainable parameter with
two or more dimensions whose largest dimension is below 10,000. ``"hidden"``, recommended by Muon's authors, leaves out
embeddings, output heads, normalisation gains, and bare parameters that are broadcast. The latter are those with a
leading dimension of 1, as a vision transformer's position embeddings (1, N, D) and class token (1, 1, D), and those
with at most one dimension above 1, as a layer scale (C, 1, 1). Weights of linear layers and convolutions are matrices
whatever their shape.
"""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from ars2.output_heads import Head, OutputHeads, find_heads

Policy = Literal["all", "hidden"]
LARGEST_MATRIX_DIMENSION = 10_000

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS_1D = (nn.Conv1d, nn.ConvTranspose1d)
_NOT_HIDDEN = ("embedding", "tied embedding", "output head", "norm", "token or position", "bias or gain")


def is_matrix(shape: Sequence[int]) -> bool:
    """Return whether policy ``"all"`` takes a tensor of this shape for a matrix."""
    return len(shape) >= 2 and max(shape) < LARGEST_MATRIX_DIMENSION


class Assignment(NamedTuple):
    """Describe one trainable parameter.

    Its fields are its name and role in the model, its track, the reason, and whether its kernel is flattened.
    """

    name: str
    param: nn.Parameter
    role: str
    track: str
    reason: str
    flatten: bool


def assign(model: nn.Module, policy: Policy = "all", head: Head | None = None) -> list[Assignment]:
    """Assign every trainable parameter of ``model`` to a track.

    The order is that of registration. A tied parameter appears once.

    Raises:
        TypeError: not a model.
        ValueError: unknown policy or head, no trainable parameter, or a lazy parameter without a shape.
    """
    if policy not in ("all", "hidden"):
        raise ValueError(f"policy must be 'all' or 'hidden', got {policy!r}")
    heads = find_heads(model, head)
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
    return [_assign_one(names[param], param, modules, heads, policy) for param, modules in owners.items()]


def _role(param: nn.Parameter, owners: list[nn.Module], heads: OutputHeads) -> str:
    embeds = any(isinstance(owner, _EMBEDDINGS) for owner in owners)
    if param.ndim < 2:
        return "norm" if isinstance(owners[0], _NORMS) else "bias or gain"
    if embeds:
        return "tied embedding" if len(owners) > 1 else "embedding"
    if any(owner in heads.modules for owner in owners):
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


def _assign_one(
    name: str, param: nn.Parameter, owners: list[nn.Module], heads: OutputHeads, policy: Policy
) -> Assignment:
    role = _role(param, owners, heads)
    if param.ndim < 2:
        track, reason = "vector", "fewer than two dimensions"
    elif not is_matrix(param.shape):
        track, reason = "vector", f"a dimension of {LARGEST_MATRIX_DIMENSION} or more"
    elif policy == "hidden" and role in _NOT_HIDDEN:
        track, reason = "vector", f"policy hidden leaves out every {role}"
    else:
        track, reason = "matrix", "two dimensions or more"
    if role == "output head" and heads.guessed is not None:
        reason += "; the head is a guess: name it with head="
    flatten = track == "matrix" and param.ndim == 3 and isinstance(owners[0], _CONVOLUTIONS_1D)
    return Assignment(name, param, role, track, reason, flatten)


def param_groups(
    model: nn.Module,
    policy: Policy = "all",
    matrix: Mapping[str, Any] | None = None,
    vector: Mapping[str, Any] | None = None,
    head: Head | None = None,
    named: bool = True,
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

    Returns:
        One group for each track that has parameters. The kernels of 1-D convolutions, which are flattened, form a
        separate group.

    Raises:
        TypeError: not a model, such as ``model.parameters()``.
        ValueError: as :func:`assign`, or an option that the groups set themselves.
    """
    for track, options in (("matrix", matrix), ("vector", vector)):
        if reserved := {"params", "track", "flatten"} & set(options or {}):
            raise ValueError(f"options of the {track} track may not contain {sorted(reserved)}: the policy sets these")
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    if policy == "hidden" and head is None and (guessed := find_heads(model).guessed) is not None:
        warnings.warn(
            f"param_groups() guesses that the output head is {guessed!r}, the last registered linear layer: confirm it"
            f" with head={guessed!r}, or name another module",
            stacklevel=2,
        )
    for item in assign(model, policy, head):
        options = matrix if item.track == "matrix" else vector
        group = groups.setdefault((item.track, item.flatten), {"params": [], "track": item.track, **(options or {})})
        if item.flatten:
            group["flatten"] = True
        group["params"].append((item.name, item.param) if named else item.param)
    return list(groups.values())


def report(model: nn.Module, policy: Policy = "all", head: Head | None = None) -> str:
    """Return a table of tracks and reasons, one line a parameter, totals last."""
    items = assign(model, policy, head)
    rows = [("track", "role", "shape", "parameter", "reason")]
    rows += [(i.track, i.role, "x".join(map(str, i.param.shape)), i.name, i.reason) for i in items]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]) for row in rows]
    tensors, numbers = Counter(i.track for i in items), Counter[str]()
    for item in items:
        numbers[item.track] += item.param.numel()
    totals = ", ".join(f"{track} {tensors[track]} tensors, {numbers[track]:,} numbers" for track in sorted(tensors))
    return "\n".join([*lines, f"policy {policy}: {totals}"])
