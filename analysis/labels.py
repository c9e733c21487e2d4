"""Name rows, briefly and each differently."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from analysis.runs import Run

# A label with more characters of options numbers its rows instead; the table of settings has the options.
_LONGEST = 32


class Labelled(Protocol):
    """A row of a table."""

    label: str

    @property
    def any(self) -> Run:
        """One of its runs."""


def tell_apart(rows: Sequence[Labelled]) -> None:
    """Add options to labels that several rows have.

    They are the options in which these rows differ, or numbers where the options are long.
    """
    by_label: dict[str, list[Labelled]] = {}
    for row in rows:
        by_label.setdefault(row.label, []).append(row)
    for label, same in by_label.items():
        if len(same) == 1:
            continue
        settings = [row.any.identity.setting for row in same]
        if "model.optimizer" in differing(settings):
            # Optimizers of different classes differ in most of their options, which would fill the label.
            paths = [str(setting.get("model.optimizer")) for setting in settings]
            classes = [path.rpartition(".")[2] for path in paths]
            shown = classes if len(set(classes)) == len(set(paths)) else paths
            for row, name in zip(same, shown, strict=True):
                row.label = f"{label}, {name}"
            tell_apart(same)
            continue
        options = _options(settings)
        numbered = max(map(len, options)) > _LONGEST or len(set(options)) < len(options)
        for number, (row, text) in enumerate(zip(same, options, strict=True), 1):
            row.label = f"{label}, setting {number}" if numbered else ", ".join(filter(None, [label, text]))


def _options(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return for each setting the options in which it differs.

    Of lists of callbacks it has the classes.
    """
    texts: list[list[str]] = [[] for _ in settings]
    for key, name in short_names(differing(settings)).items():
        values = [setting.get(key) for setting in settings]
        if any(isinstance(value, list) and any(isinstance(part, dict) for part in value) for value in values):
            lists = [value or [] for value in values]
            for text, found in zip(texts, lists, strict=True):
                own = [part for part in found if not all(part in other for other in lists)]
                text.extend(value_text({"class_path": str(part.get("class_path"))}) for part in own)
        else:
            for text, value in zip(texts, values, strict=True):
                text.append(f"{name} {value_text(value)}")
    return [", ".join(text) for text in texts]


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the options that are not the same in all settings, in their order."""
    keys = dict.fromkeys(key for setting in settings for key in setting)
    return [key for key in keys if any(setting.get(key) != settings[0].get(key) for setting in settings)]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the last part of each option's name.

    It has as many parts as tell it from the others.
    """
    names = {}
    for key in keys:
        parts = key.split(".")
        tails = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        names[key] = next(
            (t for t in tails if not any(o != key and (o == t or o.endswith(f".{t}")) for o in keys)), key
        )
    return names


def value_text(value: Any) -> str:
    """Return an option as text; a callback is its class's name and options."""
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return " and ".join(map(value_text, value))
    if not isinstance(value, dict) or "class_path" not in value:
        return str(value)
    stated = {key: option for key, option in (value.get("init_args") or {}).items() if option is not None}
    options = ", ".join(f"{key} {value_text(option)}" for key, option in stated.items())
    name = str(value["class_path"]).rpartition(".")[2]
    return f"{name} ({options})" if options else name


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a question that names the most similar of ``names``.

    It is empty if there is none.
    """
    found = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.0)
    return f"; did you mean {found[0]}?" if found else ""
