"""Check that an overlay that switches the optimizer states all its options.

When a later config names another optimizer class, the parser keeps every option of the former class that the new one
also has. A comparison of optimizers would then use a learning rate or weight decay that nobody chose. Callbacks are the
opposite case: a later list replaces the former one, milestones included.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml

from launch.errors import needed_options, option_names

_TRACKS = ("matrix", "vector")
_CONFIG = re.compile(r"(?:--config=|-c=?)(.+)", re.S)
_SETTING = re.compile(r"--((?:\w+\.)?(?:model[\w.]*|trainer\.callbacks\+?))(?:=(.*))?", re.S)
_SUBCOMMANDS = ("fit", "validate", "test", "predict")
_SECTIONS = {
    "trainer": "lightning.pytorch.Trainer",
    "checkpoint": "callbacks.best_checkpoint.BestCheckpoint",
    "last_checkpoint": "callbacks.last_checkpoint.LastCheckpoint",
    "internals": "callbacks.optimizer_internals.OptimizerInternals",
}
# Keys whose value may also be the path of a file that contains it.
_NESTED = ("model", "model.optimizer")


class _Source:
    """Represent what one config or command-line option states on the optimizer.

    ``class_path`` is its class, if named. ``stated`` are the options and tracks it gives, and those in ``replaced``
    discard everything that was stated before.
    """

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.name = name
        self.class_path: str | None = None
        self.stated: set[str] = set()
        self.replaced: set[str] = set()
        for key, value in settings.items():
            _, option, *deeper = *key.split("."), ""
            if option == "optimizer" and deeper[0] in ("", "class_path"):
                self.class_path = value if isinstance(value, str) else self.class_path
                continue
            name = option if option in _TRACKS else deeper[0]
            if value is not None or option not in _TRACKS:
                self.stated.add(name)
            # A single key of a track keeps the track's other keys.
            if option not in _TRACKS or not deeper[0]:
                self.replaced.add(name)


def _settings(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the optimizer's keys in one spelling, from mappings and files."""
    parts = [part for part in key.split(".") if part and part != "init_args"]
    if parts[:1] and parts[0] in _SUBCOMMANDS:
        parts = parts[1:]
    name = ".".join(parts)
    if name in _NESTED and isinstance(value, str):
        value = _read(value) if os.path.isfile(value) else value
    if isinstance(value, dict) and (len(parts) < 2 or name == "model.optimizer"):
        for inner, item in value.items():
            yield from _settings(item, f"{name}.{inner}")
    elif re.match(r"model\.(optimizer|matrix|vector)(\.|$)", name):
        yield name, value


def _read(text: str) -> Any:
    """Parse the file named ``text`` if it exists, else ``text`` itself."""
    if not os.path.isfile(text):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return None  # the parser reports the error
    try:
        return yaml.safe_load(Path(text).read_text())
    except UnicodeDecodeError as error:
        raise ValueError(f"{text} is not a text file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        raise ValueError(f"{text} is not valid YAML: {getattr(error, 'problem', None) or 'not text'}{where}") from error


def _sources(arguments: Sequence[str]) -> Iterator[tuple[str, Any, str]]:
    """Yield name, content and key of each config or option."""
    for argument, following in pairwise([*arguments, ""]):
        if argument in ("--config", "-c"):
            yield following, _read(following), ""
        elif match := _CONFIG.fullmatch(argument):
            yield match[1], _read(match[1]), ""
        elif match := _SETTING.fullmatch(argument):
            yield "the command line", _read(following if match[2] is None else match[2]), match[1]


def _callbacks(value: Any, key: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield every list of callbacks with its key, as class names."""
    parts = [part for part in key.split(".") if part]
    name = ".".join(parts[1:] if parts[:1] and parts[0] in _SUBCOMMANDS else parts)
    if isinstance(value, dict) and name in ("", "trainer"):
        for inner, item in value.items():
            yield from _callbacks(item, f"{name}.{inner}")
    elif name in ("trainer.callbacks", "trainer.callbacks+"):
        items = value if isinstance(value, list) else [value]
        paths = [item.get("class_path") if isinstance(item, dict) else item for item in items]
        yield name, [str(path).rpartition(".")[2] for path in paths if path is not None]


def _options_kept(class_path: str, stated: set[str]) -> set[str]:
    """Return the options in ``stated`` that the class has and the parser keeps."""
    if "." in class_path:
        return stated & {*_TRACKS, *names} if (names := option_names(class_path)) else set()
    kinds = [kind for kind in _subclasses(torch.optim.Optimizer) if kind.__name__ == class_path]
    if not kinds:  # the class may be imported later
        return stated
    return stated & {*_TRACKS}.union(*(option_names(f"{kind.__module__}.{class_path}") for kind in kinds))


def _subclasses(kind: type) -> Iterator[type]:
    subclasses: list[type] = kind.__subclasses__()
    for subclass in subclasses:
        yield subclass
        yield from _subclasses(subclass)


def check_overlays(arguments: Sequence[str]) -> None:
    """Check that no source mixes two optimizers or drops the callbacks of another one.

    The last source that switches the optimizer's class must override every option of the former class. A list of
    callbacks may replace an earlier one if it is empty or repeats one of its classes, which shows that the replacement
    is deliberate. The config of a search is not checked for this.

    Args:
        arguments: of the command line, in their order.

    Raises:
        ValueError: a source fails the check. The message names the classes, the options and the source that must
            state them, or the callbacks. Also if a config is not valid YAML.
    """
    sources = list(_sources(arguments))
    if not any(argument.startswith("--sweep.name") for argument in arguments):
        _check_callbacks(sources)
    _check_optimizer([_Source(name, dict(_settings(value, key))) for name, value, key in sources])


def _check_callbacks(sources: list[tuple[str, Any, str]]) -> None:
    kept: list[str] = []
    for source, value, key in sources:
        for name, given in _callbacks(value, key):
            if name.endswith("+"):
                kept = [*kept, *given]
                continue
            if kept and given and not set(kept) & set(given):
                raise ValueError(
                    f"{source} replaces trainer.callbacks with {', '.join(given)}, which drops {', '.join(kept)}:"
                    " write callbacks+ to add to the list, or repeat in it the callbacks to keep (null for none)"
                )
            kept = given


def _check_optimizer(sources: list[_Source]) -> None:
    class_path, switch = None, ("", "", "")
    stated, inherited = set[str](), set[str]()
    for source in sources:
        if source.class_path is not None and source.class_path != class_path:
            if class_path is not None:
                switch = (source.name, class_path, source.class_path)
                stated = inherited = _options_kept(source.class_path, stated)
            class_path = source.class_path
        inherited = inherited - source.replaced
        stated = (stated - source.replaced) | source.stated
    if inherited:
        name, former, new = switch
        raise ValueError(
            f"{name} switches the optimizer from {former} to {new}, which would inherit {', '.join(sorted(inherited))}:"
            f" state every one of them again, or give one config that states the complete optimizer"
        )


def check_values(config: Mapping[str, Any]) -> None:
    """Check that sections are mappings and that options which need a value have one.

    Args:
        config: of a subcommand, resolved, as nested mappings.

    Raises:
        ValueError: a section or option fails the check; the message names it.
    """
    for name, class_path in _SECTIONS.items():
        if not isinstance(config.get(name), Mapping):
            raise ValueError(f"{name} must be a mapping from options to values, got {_shown(config.get(name))}")
        _check_nulls({"class_path": class_path, "init_args": config[name]}, f"{name}.")
    for name in ("experiment", "runs"):
        if not config.get(name):
            raise ValueError(f"{name} must be a string, got {_shown(config.get(name))}")
    _check_nulls({name: config[name] for name in ("model", "data") if name in config}, "")


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)


def _check_nulls(value: Any, place: str) -> None:
    if isinstance(value, list):
        for item in value:
            _check_nulls(item, place)
    if not isinstance(value, Mapping):
        return
    class_path, options = value.get("class_path"), value.get("init_args")
    if isinstance(class_path, str) and isinstance(options, Mapping):
        for name in needed_options(class_path) & {name for name, option in options.items() if option is None}:
            raise ValueError(f"{place}{name} needs a value, but is empty (null)")
        _check_nulls(options, place)
        return
    for name, item in value.items():
        _check_nulls(item, f"{place}{name}.")
