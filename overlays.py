"""A guard over several configs: an overlay that switches the optimizer must state the new one whole.

Where a later config names another optimizer class, the parser keeps every option of the former one that the new class
has too. In a comparison of optimizers that is a wrong learning rate or weight decay that nobody wrote down.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from messages import option_names

_OPTION = re.compile(r"--model\.(?:init_args\.)?(optimizer|matrix|vector)(?:\.(?:init_args\.)?(\w+))?(?:=(.*))?$", re.S)
_TRACK_OPTIONS = ("matrix", "vector")


class _Source:
    """What one config or command-line option says of the optimizer: its class, if named, and the options stated."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.class_path: str | None = None
        self.options: set[str] = set()


def _from_config(path: str) -> _Source:
    source = _Source(path)
    try:
        config = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return source  # the parser says what is wrong with it
    arguments = _mapping(_mapping(config, "model"), "init_args")
    source.options |= {track for track in _TRACK_OPTIONS if arguments.get(track) is not None}
    optimizer = arguments.get("optimizer")
    if isinstance(optimizer, str):
        source.class_path = optimizer
    elif isinstance(optimizer, dict):
        source.class_path = optimizer.get("class_path")
        source.options |= set(_mapping(optimizer, "init_args"))
    return source


def _mapping(config: Any, key: str) -> dict[str, Any]:
    value = config.get(key) if isinstance(config, dict) else None
    return value if isinstance(value, dict) else {}


def _sources(arguments: Sequence[str]) -> list[_Source]:
    sources: list[_Source] = []
    for index, argument in enumerate(arguments):
        following = arguments[index + 1] if index + 1 < len(arguments) else ""
        if argument in ("--config", "-c"):
            sources.append(_from_config(following))
        elif argument.startswith("--config="):
            sources.append(_from_config(argument.removeprefix("--config=")))
        elif match := _OPTION.match(argument):
            key, option, value = match.groups()
            source = _Source("the command line")
            if key in _TRACK_OPTIONS:
                source.options.add(key)
            elif option in (None, "class_path"):
                source.class_path = following if value is None else value
            else:
                source.options.add(option)
            sources.append(source)
    return sources


def check_overlays(arguments: Sequence[str]) -> None:
    """Check that the last source that switches the optimizer's class leaves no option of the former one in force.

    Raises:
        ValueError: it does; the message names both classes, the options, and the source that must state them.
    """
    sources = _sources(arguments)
    class_path, inherited, switched = None, set[str](), None
    stated: set[str] = set()
    for source in sources:
        if source.class_path is not None and source.class_path != class_path:
            if class_path is not None:
                # Options that the new class does not have are dropped by the parser.
                kept = {*_TRACK_OPTIONS, *option_names(source.class_path)}
                switched, inherited = (source.name, class_path, source.class_path), stated & kept
            class_path = source.class_path
        inherited -= source.options
        stated |= source.options
    if switched is not None and inherited:
        name, former, new = switched
        raise ValueError(
            f"{name} switches the optimizer from {former} to {new}, which would inherit {', '.join(sorted(inherited))}:"
            f" state every one of them anew, or name one config that states the optimizer whole"
        )
