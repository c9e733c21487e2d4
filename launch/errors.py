"""Turn errors into one clear line, with the nearest valid name."""

import contextlib
import difflib
import importlib
import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any, Literal

from experiment.library_internals import actions_of

REFUSED_VALUE = "Does not validate against"  # jsonargparse, also if a valid value's class raised an exception
_NOISE = re.compile(
    rf"{REFUSED_VALUE}|Subtypes:|Errors:|Expected a <class 'NoneType'>|Given value type:|Problem with given"
    r"|Not a valid subclass of|Subclass types expect|a class path \(str\)|a dict with"
)
# gloo and NCCL
LOST_PROCESS = re.compile(r"Connection (?:closed|reset) by peer \[|remote process exited")
_OTHER_PROCESS = re.compile(r"Caught \w+ in DataLoader worker process|-- Process \d+ terminated with the following")
_ANOMALY = "--trainer.detect_anomaly true prints the traceback of the operation"
_MAX_LENGTH = 500
_REQUIRED = "the following arguments are required"
_SEARCHED = " in the checkout, in the current folder or on PYTHONPATH"
_NO_CLASS = r"Expected a dot import path string: (.+)"


def one_line(error: BaseException, folder: Any = None) -> str:
    """Return the message on one line, with its type where that is needed.

    Args:
        error: the exception.
        folder: of the run, named if the system does not name the file that it could not write.
    """
    text = str(error)
    if written := worker_traceback(error):
        # The lines after the last frame and its indented source.
        text = re.sub(r'(?s).*\n  File "[^\n]*\n(?:    [^\n]*\n)*', "", written)
        return " ".join(text.split())[:_MAX_LENGTH]
    if LOST_PROCESS.search(text):
        return "another process of the run has ended; its error says why"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg}"  # its text also has the file, but without the folder
    if isinstance(error, KeyError) and " " in text:
        text = str(error.args[0])  # a sentence, not a key
    elif REFUSED_VALUE in text:
        text = explain(text, None)
        # The value was valid, and creating the object from it failed.
        if made := next((e for e in _before(error) if " ".join(str(e).split()) == text), None):
            return one_line(made, folder)
    elif "loading state_dict" in text:
        text = _other_network(text)
    elif "could not find the monitored key" in text:
        text = _not_logged(text)
    elif "`Trainer.predict` requires `forward`" in text:
        text = "the module answers nothing: implement predict_step(batch, batch_index), which returns a list of lines"
    elif match := re.search(r"multiple `(\w+)_dataloader`, but no `dataloader_idx`", text):
        text = f"the data has several loaders for {match[1]}, whose metrics would be mixed: return one loader"
    elif isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    elif isinstance(error, OSError) and error.strerror:
        # The system names no file when the disk is full; an earlier exception may.
        named = (e for e in _before(error) if isinstance(e, OSError) and e.filename and e.strerror)
        return one_line(next(named, OSError(error.errno, error.strerror, str(folder or "a file of the run"))))
    text = " ".join(text.split())
    # The backward pass fails in no line of the user's code.
    text = re.sub(r"Hint: enable anomaly detection.*", _ANOMALY, text)
    if len(text) > _MAX_LENGTH:
        text = text[:_MAX_LENGTH] + " ..."
    if " " not in text or isinstance(error, (AttributeError, AssertionError, IndexError, TypeError)):
        return f"{type(error).__name__}: {text}".removesuffix(": ")
    return text


def worker_traceback(error: BaseException) -> str:
    """Return the traceback text of another process; empty for any other error."""
    text = str(error).strip()
    return text if _OTHER_PROCESS.match(text) else ""


def _before(error: BaseException) -> Iterator[BaseException]:
    """Yield the causes and contexts of ``error``, the latest first."""
    earlier = error.__cause__ or error.__context__
    while earlier is not None:
        yield earlier
        earlier = earlier.__cause__ or earlier.__context__


def _other_network(message: str) -> str:
    """Shorten torch's message about a checkpoint of another network."""
    shapes = re.findall(r"size mismatch for (\S+): .*?Size\((.*?)\) from checkpoint.*?Size\((.*?)\)", message)
    parts = [f"{name} is {there} in the checkpoint and {here} in the model" for name, there, here in shapes[:1]]
    for kind, phrase in (("Missing", "it lacks"), ("Unexpected", "it also has")):
        if names := re.findall(rf'{kind} key\(s\) in state_dict: "([^"]+)"', message):
            parts.append(f"{phrase} {names[0]}")
    more = f" ({len(shapes)} tensors differ)" if len(shapes) > 1 else ""
    return f"the checkpoint is from a different network than the configs: {', '.join(parts)}{more}"


def _not_logged(message: str) -> str:
    """Shorten Lightning's message about a monitored metric that is not logged."""
    found = re.search(r"monitor='(.*?)'.*?metrics: \[(.*?)\]", message)
    if found is None:
        return message
    logged = re.findall(r"'([^']+)'", found[2])
    hint = "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(found[1], logged, n=1))
    return f"checkpoint.monitor is {found[1]}, which is not logged{hint}"


def explain(message: str, parser: Any) -> str:
    """Return a parser's message as one line, with the nearest valid name.

    Args:
        message: jsonargparse's nested message of many lines.
        parser: that raised it, if any; its keys are the valid names.
    """
    if match := re.search(r"class_path '([\w.]+)':\s+Requirement '(\S+)' not met", message):
        return f"{match[1]} needs a package that is not installed: pip install '{match[2]}'"
    if match := re.search(r"'([\w.]+)' to be a function that returns Union\[LRScheduler", message):
        return (
            f"scheduler: {match[1]} does not declare that it returns a scheduler: call it in a function of yours that"
            " does, see docs/lightning_features.md"
        )
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    place = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    given = next((line.removeprefix("Given value: ") for line in lines if line.startswith("Given value: ")), "")
    messages = [line for line in lines if line and not _NOISE.match(line) and not line.startswith("Given value: ")]
    messages = [re.sub(r'^Parser key "[^"]+":\s*', "", line) for line in messages]
    messages = [re.sub(r"^Type \S.* expects a function or a callable class: ", "", line) for line in messages]
    messages = [re.sub(r"\.? Got value: Namespace\(.*$", "", line) for line in messages]
    messages = [re.sub(r'^Parser key "[^"]+":\s*', "", line) for line in messages]
    messages = [re.sub(r"\. Got value: ", "; got ", line) for line in messages]
    messages = [re.sub(r"Import path does not correspond to a sub", "it must name a sub", line) for line in messages]
    messages = [re.sub(r"subclass of (Lightning\w+)", r"subclass of lightning.pytorch.\1", line) for line in messages]
    messages = [re.sub(r"^No module named '\S+'", r"\g<0>" + _SEARCHED, line) for line in messages]
    messages = [re.sub(r"Expected a <class '(\w+)'>", r"expected \1", line) for line in messages]
    messages = [re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"expected one of \1", line) for line in messages]
    messages = [
        re.sub(_NO_CLASS, r"there is no class \1 (a class is given by its full path)", line) for line in messages
    ]
    messages = [line for line in messages if line and not line.startswith("Expected a path but")]
    text = "; ".join(dict.fromkeys(messages)).replace("; expected ", " or ")
    names_value = (
        "; got " in text or "there is no class" in text or given.startswith(("{", "NestedArg")) or "Namespace(" in given
    )
    if given and not names_value:
        text += f"; got {given}"
    if text.startswith("Option ") and _keys(parser) == {"help"}:
        text += (
            ": the class has no options; first name a config or another class, such as --config configs/grok_aga.yaml"
        )
    elif re.search(rf"{_REQUIRED}.*\bmodel\b", text):
        text += "; first name a config, such as --config configs/grok_aga.yaml"
    elif re.fullmatch(r"Option 'optimizer(\.\S+)?' is not accepted", text):
        text += (
            ": the __init__() of a TwoPassModule takes **options and calls super().__init__(**options); any other"
            " LightningModule makes its optimizer in configure_optimizers()"
        )
    elif text == f"{_REQUIRED}: optimizer":
        text += "; name its class, such as --model.optimizer ars2.ARS2Neo"
    elif hint := _nearest(message, parser):
        text += f"; did you mean {hint}?"
    text = " ".join(text.split())[:_MAX_LENGTH]
    return f"{place}: {text}" if place and text else text or place or message


def _keys(parser: Any, subcommand: str = "") -> set[str]:
    """Return the keys of a parser or one of its subcommands; empty without a parser."""
    for action in [] if parser is None else actions_of(parser):
        if isinstance(action.choices, dict) and subcommand in action.choices:
            return _keys(action.choices[subcommand])
    return set() if parser is None else {action.dest for action in actions_of(parser) if action.dest}


def _nearest(message: str, parser: Any) -> str | None:
    """Return the valid name nearest to the refused one."""
    if match := re.search(r"Literal\[(.*)\].*Got value: (\w+)", message):
        wrong, candidates = match[2], set(re.findall(r"'(\w+)'", match[1]))
    elif match := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        wrong, candidates = match[2], set(dir(importlib.import_module(match[1])))
    elif match := re.search(r"invalid choice: '(\w+)' \(choose from (.*)\)", message):
        wrong, candidates = match[1], set(re.findall(r"'(\w+)'", match[2]))
    elif match := re.search(r"Subcommand '(\w+)' does not accept option '([\w.]+)'", message):
        wrong, candidates = match[2], _keys(parser, match[1])
    elif match := re.search(r"Option '([\w.]+)' is not accepted|unrecognized arguments: --([\w.]+)", message):
        wrong, candidates = match[1] or match[2], _keys(parser)
        candidates |= {f"init_args.{name}" for name in candidates if "." in wrong}
    else:
        return None
    candidates = {name for name in candidates if name.rpartition(".")[2] != "help"}
    if "." in wrong and (corrected := _corrected(wrong, candidates)):
        return corrected
    return next(iter(difflib.get_close_matches(wrong, candidates - {wrong}, n=1)), None)


def _corrected(wrong: str, candidates: set[str]) -> str | None:
    """Return a dotted name with its first unknown part corrected."""
    before = ""
    parts = wrong.split(".")
    for index, part in enumerate(parts):
        known = {name.removeprefix(before).partition(".")[0] for name in candidates if name.startswith(before)}
        if part not in known:
            nearest = difflib.get_close_matches(part, known, n=1)
            return ".".join([*parts[:index], *nearest, *parts[index + 1 :]]) if nearest else None
        before += f"{part}."
    return None


def option_names(class_path: str) -> set[str]:
    """Return the option names of a class and its bases; empty without the class."""
    return {parameter.name for parameter in _options(class_path)} - {"self", "args", "kwargs", "options"}


def needed_options(class_path: str) -> set[str]:
    """Return the option names of a class whose types exclude ``None``."""
    found: dict[str, inspect.Parameter] = {}
    for parameter in _options(class_path):
        found.setdefault(parameter.name, parameter)
    simple = (int, float, bool, str)
    return {
        name
        for name, parameter in found.items()
        if parameter.default is not None
        and (parameter.annotation in simple or typing.get_origin(parameter.annotation) in (Literal, dict, list, tuple))
    }


def _options(class_path: str) -> Iterator[inspect.Parameter]:
    """Yield the parameters of a class and of its base classes, its own first."""
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return
    for item in inspect.getmro(found) if inspect.isclass(found) else (found,):
        with contextlib.suppress(TypeError, ValueError):
            yield from inspect.signature(item).parameters.values()
