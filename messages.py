"""Errors for people: the parser's long messages and any exception as one line, with the nearest valid name."""

import difflib
import importlib
import inspect
import re
from typing import Any

_NOISE = re.compile(
    r"Does not validate against|Subtypes:|Errors:|Expected a <class 'NoneType'>|Given value type:|Problem with given"
)
_MAX_LENGTH = 500
_REQUIRED = "the following arguments are required"


def one_line(error: BaseException) -> str:
    """Return the exception's message on one line; its type comes first where the message alone says too little."""
    text = str(error)
    if "Does not validate against" in text:
        text = explain(text, None)
    text = " ".join(text.split())
    if len(text) > _MAX_LENGTH:
        text = text[:_MAX_LENGTH] + " ..."
    if not text or isinstance(error, (KeyError, AttributeError, AssertionError, IndexError, TypeError)):
        return f"{type(error).__name__}: {text}"
    return text


def explain(message: str, parser: Any) -> str:
    """Return a parser's message on one line: where, what is wrong, and the nearest valid name if there is one.

    Args:
        message: jsonargparse's message, nested over many lines.
        parser: the parser it comes from, if any; its keys are the valid names at the top level.
    """
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    place = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    given = next((line.removeprefix("Given value: ") for line in lines if line.startswith("Given value: ")), "")
    said = [line for line in lines if line and not _NOISE.match(line) and not line.startswith("Given value: ")]
    said = [re.sub(r'^Parser key "[^"]+":\s*', "", line) for line in said]
    said = [re.sub(r"^Type \S.* expects a function or a callable class: ", "", line) for line in said]
    said = [re.sub(r"\.? Got value: Namespace\(.*$", "", line) for line in said]
    said = [re.sub(r'^Parser key "[^"]+":\s*', "", line) for line in said]
    said = [line for line in said if line and not line.startswith("Expected a path but")]
    text = "; ".join(dict.fromkeys(said))
    if given and not given.startswith(("{", "NestedArg", "Namespace")) and "Got value" not in text:
        text += f"; got {given}"
    text = re.sub(r"Expected a <class '(\w+)'>", r"expected \1", text)
    text = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"expected one of \1", text)
    if _REQUIRED in text:
        text += "; name a config, such as --config configs/grok_aga.yaml"
    if hint := _nearest(message, parser):
        text += f"; did you mean {hint}?"
    text = " ".join(text.split())[:_MAX_LENGTH]
    return f"{place}: {text}" if place and text else text or place or message


def _nearest(message: str, parser: Any) -> str | None:
    """Return the valid name most like the one that was refused."""
    patterns = (
        r"Option '([\w.]+)' is not accepted",
        r"Key '([\w.]+)' is not expected",
        r"[Uu]nrecognized arguments: --([\w.]+)",
        r"No action for (?:destination )?key \"?'?([\w.]+)",
        r"has no attribute '(\w+)'",
        r"Got value: (\w+)",
    )
    wrong = next((found for pattern in patterns if (found := re.findall(pattern, message))), None)
    if wrong is None:
        return None
    name = wrong[-1]
    candidates = set() if parser is None else {action.dest for action in parser._actions if action.dest}
    for class_path in re.findall(r"class_path[ =]'([\w.]+)'", message):
        candidates |= option_names(class_path)
    for module in re.findall(r"module '([\w.]+)' has no attribute", message):
        candidates = set(dir(importlib.import_module(module)))
    for choices in re.findall(r"Literal\[(.*?)\]", message):
        candidates |= set(re.findall(r"'(\w+)'", choices))
    matches = difflib.get_close_matches(name, candidates - {name}, n=1, cutoff=0.6)
    return matches[0] if matches else None


def option_names(class_path: str) -> set[str]:
    """Return the names of a class's options, its base classes' included; none if there is no such class."""
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return set()
    classes = inspect.getmro(found) if inspect.isclass(found) else (found,)
    names: set[str] = set()
    for item in classes:
        try:
            names |= set(inspect.signature(item).parameters)
        except (TypeError, ValueError):
            continue
    return names - {"self", "args", "kwargs", "options"}
