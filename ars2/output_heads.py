"""Find the output heads of a model.

The caller names them, the model declares them, or they are guessed. Wrappers are unwrapped: DistributedDataParallel,
compiled modules, peft's models, and any module with a single child and no parameter outside it. A model has the same
heads with and without such a wrapper.
"""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import NamedTuple

from torch import nn

Head = str | nn.Module | Iterable[str | nn.Module]


class OutputHeads(NamedTuple):
    """List the head modules with all their submodules.

    ``guessed`` is the name of a guessed head, if any.
    """

    modules: frozenset[nn.Module]
    guessed: str | None = None


def find_heads(model: nn.Module, named: Head | None = None) -> OutputHeads:
    """Return the output heads of ``model``.

    Heads ``named`` by the caller come first. Otherwise the model may declare them by ``get_output_embeddings()``, as
    those of transformers do; their classifiers outside of ``base_model`` are heads too. Where only submodules declare
    heads, those count. If they declare none, the last linear layer outside of them is the head. Without any declaration
    the head is the linear layer tied to an embedding, the last layer of a plain ``nn.Sequential``, or the only linear
    layer. In other models the last registered linear layer is guessed. The matrices of adapters (LoRA) are not heads.

    Raises:
        TypeError: ``model`` is not a module, or ``named`` is neither a module nor the name of one.
        ValueError: ``named`` is not a module of the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"parameter groups are built from a model, got {type(model).__name__}: pass model, not"
            " model.parameters() or the like"
        )
    chain = _unwrapped(model)
    if named is not None:
        items = [named] if isinstance(named, (str, nn.Module)) else named
        return OutputHeads(_contents([_module(chain, item) for item in items]))
    adapters = _adapters(model)
    heads, last = _find(model, adapters)
    # The guess is irrelevant where no linear layer is trained, as beside adapters.
    trained = any(p.requires_grad for linear in _linears(model, adapters) for p in linear.parameters())
    guessed = [name for name, module in model.named_modules() if module is last and trained]
    return OutputHeads(_contents(heads) - adapters, guessed[0] if guessed else None)


def _find(model: nn.Module, adapters: frozenset[nn.Module]) -> tuple[list[nn.Module], nn.Module | None]:
    """Return the heads, and the one among them that is guessed, if any."""
    chain = _unwrapped(model)
    if declaring := [module for module in chain if _declares_head(module)]:
        declared = (module.get_output_embeddings() for module in declaring)  # type: ignore[operator]
        heads = [head for head in declared if isinstance(head, nn.Module)][:1]
        classifiers, guessed = _outside_of_base(declaring[-1], adapters, bool(heads))
        return heads + classifiers, classifiers[-1] if guessed else None
    linears = _linears(model, adapters)
    if parts := _declaring_parts(model):
        found = [_find(part, adapters) for part in parts]
        if heads := [head for heads, _ in found for head in heads]:
            return heads, next((last for _, last in found if last is not None), None)
        inside = _contents(parts)  # these declare none
        linears = [linear for linear in linears if linear not in inside]
    elif tied := _tied_to_embeddings(model):
        return tied, None
    else:
        linears = _linears(chain[-1], adapters) or linears
        if linears == [chain[-1]]:
            return linears, None
    return _alternatives(model, linears[-1], linears) if linears else [], linears[-1] if len(linears) > 1 else None


def _declares_head(module: nn.Module) -> bool:
    return callable(getattr(module, "get_output_embeddings", None))


def _declaring_parts(module: nn.Module) -> list[nn.Module]:
    """Return the outermost submodules that declare their heads."""
    children = list(module.children())
    return [part for child in children for part in ([child] if _declares_head(child) else _declaring_parts(child))]


def _unwrapped(model: nn.Module) -> list[nn.Module]:
    """Return ``model`` and the modules that it wraps, outermost first."""
    chain = [model]
    while (inner := _inner(chain[-1])) is not None:
        chain.append(inner)
    return chain


def _inner(module: nn.Module) -> nn.Module | None:
    if callable(get_base_model := getattr(module, "get_base_model", None)):  # peft's models
        base = get_base_model()
        return base if isinstance(base, nn.Module) and base is not module else None
    children = list(module.children())
    if type(module).forward is nn.Sequential.forward:
        children = [child for child in children if any(p.ndim >= 2 for p in child.parameters())][-1:]
    return children[0] if len(children) == 1 and not list(module.parameters(recurse=False)) else None


def _module(chain: list[nn.Module], item: object) -> nn.Module:
    """Return the module meant by ``item``.

    A name may be one in the model or in a module that it wraps.
    """
    if isinstance(item, nn.Module):
        if not any(module is item for module in chain[0].modules()):
            raise ValueError(f"head is a {type(item).__name__} that is not a module of the model")
        return item
    if not isinstance(item, str):
        raise TypeError(f"head must be a module of the model or its name, or several, got {type(item).__name__}")
    names = {name: module for outer in reversed(chain) for name, module in outer.named_modules() if name}
    if item not in names:
        close = get_close_matches(item, names, 1)
        raise ValueError(f"head: the model has no module {item!r}" + (f": did you mean {close[0]!r}?" if close else ""))
    return names[item]


def _contents(modules: Iterable[nn.Module]) -> frozenset[nn.Module]:
    return frozenset(inner for module in modules for inner in module.modules())


def _adapters(model: nn.Module) -> frozenset[nn.Module]:
    """Return the modules that adapters add beside a layer.

    peft keeps the layer itself under ``base_layer``.
    """

    def added(module: nn.Module) -> Iterator[nn.Module]:
        children = dict(module.named_children())
        for name, child in children.items():
            if name.lower().startswith("lora_") or ("base_layer" in children and name != "base_layer"):
                yield child

    return _contents(child for module in model.modules() for child in added(module))


def _linears(module: nn.Module, adapters: frozenset[nn.Module]) -> list[nn.Module]:
    """Return the linear layers, or only peft's ``modules_to_save`` if any."""
    named = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear) and m not in adapters]
    return [m for n, m in named if "modules_to_save" in n.split(".")] or [m for _, m in named]


def _tied_to_embeddings(model: nn.Module) -> list[nn.Module]:
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module.weight in embeddings]


def _outside_of_base(
    model: nn.Module, adapters: frozenset[nn.Module], only_by_labels: bool
) -> tuple[list[nn.Module], bool]:
    """Return the classifiers of a transformers model outside of its base.

    The second value is whether they are guessed.
    """
    base = getattr(model, "base_model", None)
    if not isinstance(base, nn.Module) or base is model:
        return [], False
    inside, labels = set(base.modules()), getattr(getattr(model, "config", None), "num_labels", None)
    outside = [module for module in model.modules() if module not in inside and module not in adapters]
    by_labels = [
        module
        for module in outside
        if labels in (getattr(module, "out_features", None), getattr(module, "out_channels", None)) and labels
    ]
    linears = [module for module in _linears(model, adapters) if module not in inside]
    if by_labels or only_by_labels or not linears:
        return by_labels, False
    return _alternatives(model, linears[-1], linears), len(linears) > 1


def _alternatives(model: nn.Module, head: nn.Module, linears: list[nn.Module]) -> list[nn.Module]:
    """Return ``head`` after the linear layers beside it in a ModuleDict.

    Such a dict has one head for each task or adapter.
    """
    for parent in model.modules():
        if isinstance(parent, nn.ModuleDict) and any(child is head for child in parent.values()):
            return [child for child in parent.values() if child in linears and child is not head] + [head]
    return [head]
