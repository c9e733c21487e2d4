"""Make any optimizer from its class path, or say why it cannot be used.

torch's optimizers and those of other libraries share a constructor and ``step()``, and little else. Some accept only
groups of plain parameters, some keep objects in their state that no checkpoint can contain, and some evaluate the loss
or differentiate the gradient themselves.
"""

import traceback
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from ars2.param_groups import Policy, Splits, param_groups
from ars2.validation import check_known


def name_of(optimizer: Optimizer) -> str:
    """Return the library and the class of an optimizer."""
    return f"{type(optimizer).__module__.partition('.')[0]}.{type(optimizer).__name__}"


def moves_parameters(optimizer: Optimizer) -> bool:
    """Return whether an optimizer is schedule-free (Defazio et al. 2024).

    Its ``train()`` and ``eval()`` move the parameters between those to train on and those to evaluate.
    """
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def build_optimizer(
    network: nn.Module,
    make_optimizer: OptimizerCallable,
    policy: Policy,
    matrix: Mapping[str, Any] | None,
    vector: Mapping[str, Any] | None,
    splits: Splits | None = None,
) -> Optimizer:
    """Return the optimizer of the network's groups, where a track may have options.

    Raises:
        ValueError: the optimizer lacks one of these options, or cannot be made of groups of parameters.
    """
    tracks = {"matrix": dict(matrix or {}), "vector": dict(vector or {})}

    def make(tracks: dict[str, dict[str, Any]]) -> Optimizer:
        def groups(named: bool = True) -> list[dict[str, Any]]:
            return param_groups(network, policy, tracks["matrix"], tracks["vector"], named=named, splits=splits)

        try:
            return make_optimizer(groups())
        except (AssertionError, AttributeError, KeyError, TypeError) as error:
            try:
                return _make_of_plain_groups(make_optimizer, groups(named=False))
            except Exception:
                raise error from None

    try:
        optimizer = make(tracks)
    except (AssertionError, AttributeError, KeyError) as error:
        raise ValueError(
            "the optimizer cannot be made of groups of parameters, and may need the model or another optimizer instead"
            f" ({type(error).__name__}: {error}): see docs/other_optimizers.md"
        ) from error
    except ValueError as error:
        advice = next((advice for part, advice in _ADVICE.items() if part in str(error)), None)
        raise ValueError(f"{str(error).rstrip('.')}: {advice}") if advice else error from None
    for track, options in tracks.items():
        known = set(getattr(optimizer, "group_options", optimizer.defaults))
        for name in options.keys() - known:
            # pytorch-optimizer's Muon reads options from its groups that are not among its defaults.
            if _needs(make, tracks, track, name):
                known.add(name)
        check_known(options, known, f"{type(optimizer).__name__} ({track} group)")
    if moves_parameters(optimizer):
        try:
            optimizer.train()  # type: ignore[attr-defined]
        except AttributeError:
            raise ValueError(
                f"{name_of(optimizer)} wraps an optimizer without train() and eval(): name the latter"
            ) from None
    if not hasattr(optimizer, "group_options"):  # The optimizers of ars2 load exactly.
        _load_in_saved_precision(optimizer)
    return optimizer


# What to do after an error of a constructor that does not say it.
_ADVICE = {
    "Muon only supports 2D parameters": (
        "name ars2.Muon, which updates the other parameters by AdamW, or pytorch_optimizer.Muon with the options"
        " matrix: {use_muon: true} and vector: {use_muon: false}"
    ),
    "`use_muon` must be set": "give the module the options matrix: {use_muon: true} and vector: {use_muon: false}",
    "doesn't support per-parameter options": (
        "it evaluates the loss several times in a step and has a single group, which the modules here do not support"
    ),
    "need to pass `params`": "it wraps another optimizer; name that one",
}


def _make_of_plain_groups(make_optimizer: OptimizerCallable, groups: list[dict[str, Any]]) -> Optimizer:
    """Make an optimizer of plain parameters, and add the suite's keys to its groups.

    Some optimizers reject named parameters or unknown keys.
    """
    extra = ("track", "flatten", "splits")
    keys: list[dict[str, Any]] = [{key: group.pop(key) for key in extra if key in group} for group in groups]
    optimizer = make_optimizer(groups)
    for group, added in zip(optimizer.param_groups, keys, strict=True):
        group.update(added)
    return optimizer


def _needs(
    make: Callable[[dict[str, dict[str, Any]]], Optimizer], tracks: dict[str, dict[str, Any]], track: str, name: str
) -> bool:
    """Return whether the optimizer needs an option of a track, or sets it itself."""
    options = {key: value for key, value in tracks[track].items() if key != name}
    try:
        optimizer = make({**tracks, track: options})
    except Exception:
        return True
    return any(name in group for group in optimizer.param_groups if group.get("track") == track)


def _load_in_saved_precision(optimizer: Optimizer) -> None:
    """Let ``load_state_dict()`` keep the precision of the saved state.

    torch casts it to that of the parameter, which changes heavyball's PSGD, whose bounds are in float64.
    """
    saved: dict[int, Any] = {}

    def before(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        saved.update(state_dict["state"])

    def after(optimizer: Optimizer) -> None:
        for index, param in enumerate(chain.from_iterable(group["params"] for group in optimizer.param_groups)):
            if index in saved:
                optimizer.state[param] = _restored(optimizer.state[param], saved[index])
        saved.clear()

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)


def _restored(loaded: Any, saved: Any) -> Any:
    """Return ``loaded`` with the tensors of ``saved`` where their precision differs."""
    if isinstance(saved, Tensor) and isinstance(loaded, Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device, copy=True)
    if isinstance(saved, dict) and isinstance(loaded, dict):
        return type(loaded)({key: _restored(value, saved.get(key)) for key, value in loaded.items()})
    if type(saved) in (list, tuple) and len(saved) == len(loaded):
        return type(saved)(map(_restored, loaded, saved))
    return loaded


def first_step(wrapped: Any, network: nn.Module, clips: bool, saves: bool) -> None:
    """Make the first update of a run, and check how the optimizer makes it.

    Args:
        wrapped: the optimizer, wrapped by Lightning.
        network: with gradients.
        clips: whether the gradient is clipped, which Lightning does after the closure.
        saves: whether the state will be saved.

    Raises:
        ValueError: the optimizer needs more than the gradient, or its state cannot be saved.
    """
    optimizer = wrapped.optimizer
    params = [param for param in network.parameters() if param.grad is not None]
    before = _norms(params)
    calls = 0

    def closure() -> None:
        nonlocal calls
        calls += 1
        if not torch.equal(_norms(params), before):
            raise ValueError(
                f"{name_of(optimizer)} evaluates the loss again after it has moved the parameters, which only the"
                " two-pass optimizers of ars2 can do here: use ars2.ARS2Neo in mode sync"
            )

    try:
        wrapped.step(closure)
    except (RuntimeError, TypeError) as error:
        if "does not require grad" in str(error):
            raise ValueError(
                f"{name_of(optimizer)} differentiates the gradient (backward(create_graph=True)), which the modules"
                " here do not compute: use another optimizer"
            ) from error
        # Hooks run within the step, too.
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if isinstance(error, TypeError) and package in ("torch", type(optimizer).__module__.partition(".")[0]):
            raise ValueError(
                f"{name_of(optimizer)} needs more than the gradient for its step, such as the loss ({error}): use"
                " another optimizer"
            ) from error
        raise
    if clips and not calls:
        raise ValueError(
            f"{name_of(optimizer)} does not call the closure that its step() gets, after which Lightning clips the"
            " gradient: call it first in step(), or remove gradient_clip_val"
        )
    ours = hasattr(optimizer, "group_options")
    if saves and not ours and (kinds := sorted(set(_unsafe(optimizer.state_dict())))):
        raise ValueError(
            f"{name_of(optimizer)} has objects in its state that cannot be loaded from a checkpoint"
            f" ({', '.join(kinds)}): use other options, another optimizer, or no checkpoints"
            " (--trainer.enable_checkpointing false)"
        )


def _norms(params: list[nn.Parameter]) -> Tensor:
    """Return the norms of this process' parts of parameters."""
    parts: list[Any] = [param.detach() for param in params]
    return torch.tensor([(part.to_local() if hasattr(part, "to_local") else part).norm().item() for part in parts])


def _unsafe(state: Any) -> Iterator[str]:
    """Yield the class names of values that ``torch.load(weights_only=True)`` refuses."""
    if isinstance(state, Mapping):
        state = [*state.keys(), *state.values()]
    if isinstance(state, (list, tuple, set)):
        for value in state:
            yield from _unsafe(value)
    elif type(state) not in _SAFE and not isinstance(state, Tensor):
        yield type(state).__name__


_SAFE = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
