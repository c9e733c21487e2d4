"""Read the options of a report from ``study.yaml``.

A folder of runs may state these in a ``study.yaml``:

    title: Grokking, as published
    baseline: grok_adamw            # the row or optimizer that the others are compared with
    targets: [val/accuracy >= 0.9]  # in place of the task's targets
    labels: {grok_adamw: AdamW}     # how rows are named in tables and pictures
    families: {AdamW: [adamw_all, adamw_hidden]}    # rows of a search that stand for one optimizer
    also: [../grok_controls]        # further folders whose runs are rows of its tables, named as their study.yaml says
    note: Settings as published, none of them tuned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from experiment.target import Target

if TYPE_CHECKING:
    from analysis.rows import Group

FILE = "study.yaml"


@dataclass(frozen=True)
class Study:
    """Define the options of a report.

    Args:
        title: of the report.
        baseline: label, name or optimizer of the row that others are compared with; ``None`` is the best AdamW.
        targets: levels to reach; empty for those of the task.
        labels: of rows, by the name of their runs.
        families: names of a search's rows that stand for one optimizer, such as those of two policies or budgets. Their
            trials count together in the luck of the search.
        note: a paragraph below the title.
        also: further folders whose runs are rows of the same tables.
    """

    title: str = "Comparison of optimizers"
    baseline: str | None = None
    targets: Sequence[Target] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    families: Mapping[str, Sequence[str]] = field(default_factory=dict)
    note: str = ""
    also: Sequence[Path] = ()

    @classmethod
    def of(cls, folders: Sequence[Path]) -> "Study":
        """Read the ``study.yaml`` of a single folder.

        The defaults apply to several folders, and to one without that file.

        Raises:
            ValueError: the file is damaged, or has an unknown option.
        """
        file = folders[0] / FILE if len(folders) == 1 else None
        if file is None or not file.is_file():
            return cls()
        content = _content(file)
        also = tuple(file.parent / path for path in content.get("also", ()))
        others = [_content(folder / FILE) for folder in also if (folder / FILE).is_file()]

        def merged(key: str) -> dict[str, Any]:
            return {name: value for part in [*others, content] for name, value in part.get(key, {}).items()}

        return cls(
            title=content.get("title", cls.title),
            baseline=content.get("baseline"),
            targets=_targets(content, file),
            labels=merged("labels"),
            families=merged("families"),
            note=" ".join(content.get("note", "").split()),
            also=also,
        )

    def check_rows(self, groups: Sequence["Group"]) -> None:
        """Refuse a name in ``labels`` or ``families`` that no row has.

        Raises:
            ValueError: such a name, with the nearest valid one.
        """
        from analysis.labels import nearest  # imports NumPy, which compare.py --help does not need

        # The name of an unfinished run ends with how far it got.
        rows = [row for group in groups for row in group.rows]
        named = {row.name.removesuffix(f", {row.any.so_far}") for row in rows}
        searched = {row for group in groups for _, row in group.sweeps}
        for option, names, valid in (
            ("labels", self.labels, named | searched),
            ("families", [row for rows in self.families.values() for row in rows], searched),
        ):
            for name in names:
                if name not in valid:
                    raise ValueError(f"no row is named {name}, in {option} of {FILE}{nearest(name, valid)}")

    def overridden(self, title: str | None, baseline: str | None, targets: Sequence[Target]) -> "Study":
        """Return the study with the options that were given on the command line."""
        return replace(
            self,
            title=title or self.title,
            baseline=baseline or self.baseline,
            targets=targets or self.targets,
        )


def _targets(content: Mapping[str, Any], file: Path) -> tuple[Target, ...]:
    try:
        return tuple(map(Target.parse, content.get("targets", ())))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _content(file: Path) -> dict[str, Any]:
    """Return the options in a file."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid YAML") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} has no options")
    _check(content, file)
    return content


def _check(content: dict[Any, Any], file: Path) -> None:
    kinds = {
        "title": str,
        "baseline": str,
        "targets": list,
        "labels": dict,
        "families": dict,
        "note": str,
        "also": list,
    }
    for key, value in content.items():
        if key not in kinds:
            raise ValueError(
                f"{file} has the option {key}; valid options are {', '.join(f.name for f in fields(Study))}"
            )
        nested: list[Any] = (
            list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, list) else []
        )
        if key == "families":
            nested = [row for rows in nested for row in (rows if isinstance(rows, list) else [None])]
        nested += list(value) if isinstance(value, dict) else []
        if not isinstance(value, kinds[key]) or not all(isinstance(part, str) for part in nested):
            raise ValueError(f"{file}: {key} cannot be {value!r}")
