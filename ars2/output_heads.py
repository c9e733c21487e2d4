"""Find the output heads of a model.

The caller names them, the model declares them, or the last linear layer is taken. A model has the same heads in a
wrapper: DistributedDataParallel, a compiled module, peft's models, and any module with a single child and no parameter
outside it.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import NamedTuple

from torch import nn

Head = str | nn.Module | Iterable[str | nn.Module]


class OutputHeads(NamedTuple):
    """List the head modules with all their submodules, and the name of a guessed head."""

    modules: frozenset[nn.Module]
    guessed: str | None = None


def find_heads(model: nn.Module, named: Head | None = None) -> OutputHeads:
    """Return the output heads of ``model``.

    Heads ``named`` by the caller come first. Otherwise the model or its submodules may declare them by
    ``get_output_embeddings()``, as those of transformers do. Outside of their ``base_model``, modules with as many
    outputs as labels are heads too. Where no module declares heads, a linear layer tied to an embedding is one. Failing
    all these, the head is the last registered linear layer outside of those bases, with its alternatives in a
    ModuleDict. That is a guess if there are other linear layers and it does not end a plain ``nn.Sequential``. The
    matrices of adapters (LoRA) are not heads.

    Raises:
        TypeError: ``model`` is not a module, or ``named`` is neither a module nor the name of one.
        ValueError: ``named`` is not a module of the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"parameter groups are built from a model, got {type(model).__name__}: pass model, not"
            " model.parameters() or the like"
        )
    chain = unwrapped(model)
    if named is not None:
        items = [named] if isinstance(named, (str, nn.Module)) else named
        return OutputHeads(_contents(_module(chain, item) for item in items))
    adapters = _contents(child for module in model.modules() for child in _adapters(module))
    # A wrapper forwards attributes of the module inside, so the class decides which modules declare heads.
    declaring = [module for module in model.modules() if hasattr(type(module), "get_output_embeddings")]
    inside = _contents(child for module in declaring for child in module.children())
    outermost = [module for module in declaring if module not in inside]
    bases = [base if isinstance(base := getattr(m, "base_model", m), nn.Module) else m for m in outermost]
    body = _contents(bases) | adapters
    declared: list[object] = [module.get_output_embeddings() for module in declaring]  # type: ignore[operator]
    heads = [head for head in declared if isinstance(head, nn.Module)]
    for module in outermost:
        if labels := getattr(getattr(module, "config", None), "num_labels", None):
            outside = [inner for inner in module.modules() if inner not in body]
            heads += [m for m in outside if labels in (getattr(m, "out_features", 0), getattr(m, "out_channels", 0))]
    if not declaring:
        embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
        heads = [module for module in model.modules() if isinstance(module, nn.Linear) and module.weight in embeddings]
    linears = _linears(chain[-1], adapters) or _linears(model, adapters)
    outside = [linear for linear in linears if linear not in body]
    if heads or not outside:
        return OutputHeads(_contents(heads) - adapters)
    # A ModuleDict has one head for each task or adapter.
    dicts = [module for module in model.modules() if isinstance(module, nn.ModuleDict)]
    beside = [child for module in dicts if outside[-1] in module.values() for child in module.values()]
    heads = [linear for linear in outside if linear in beside or linear is outside[-1]]
    # A guess is irrelevant where no linear layer is trained, as beside adapters.
    is_guess = len(outside) > 1 and any(p.requires_grad for linear in linears for p in linear.parameters())
    name = next(name for name, module in model.named_modules() if module is outside[-1])
    return OutputHeads(_contents(heads), name if is_guess else None)


def unwrapped(model: nn.Module) -> list[nn.Module]:
    """Return ``model`` and the modules that it wraps, outermost first."""
    chain = [model]
    while True:
        children = list(chain[-1].children())
        if type(chain[-1]).forward is nn.Sequential.forward:
            children = [child for child in children if any(p.ndim >= 2 for p in child.parameters())][-1:]
        if len(children) != 1 or list(chain[-1].parameters(recurse=False)):
            return chain
        chain += children


def _module(chain: list[nn.Module], item: object) -> nn.Module:
    """Return the module that ``item`` is or names, also in a wrapped model."""
    names = {name: module for outer in reversed(chain) for name, module in outer.named_modules() if name}
    if isinstance(item, str) and item not in names:
        close = get_close_matches(item, names, 1)
        raise ValueError(f"head: the model has no module {item!r}" + (f": did you mean {close[0]!r}?" if close else ""))
    module = names[item] if isinstance(item, str) else item
    if not isinstance(module, nn.Module):
        raise TypeError(f"head must be a module of the model or its name, or several, got {type(item).__name__}")
    if module not in chain[0].modules():
        raise ValueError(f"head is a {type(item).__name__} that is not a module of the model")
    return module


def _contents(modules: Iterable[nn.Module]) -> frozenset[nn.Module]:
    return frozenset(inner for module in modules for inner in module.modules())


def _adapters(module: nn.Module) -> list[nn.Module]:
    """Return the modules that adapters add beside a layer (``base_layer`` in peft)."""
    children = dict(module.named_children())
    adapted = "base_layer" in children
    return [c for n, c in children.items() if n.lower().startswith("lora_") or (adapted and n != "base_layer")]


def _linears(module: nn.Module, adapters: frozenset[nn.Module]) -> list[nn.Module]:
    """Return the linear layers, or only peft's ``modules_to_save`` if any."""
    named = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear) and m not in adapters]
    return [m for n, m in named if "modules_to_save" in n.split(".")] or [m for _, m in named]
