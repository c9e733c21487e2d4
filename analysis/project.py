"""Report all studies of a project on one page, and each beside it.

A folder with a ``project.yaml`` is a project:

    title: ARS2-Neo against AdamW and Muon
    output: docs/results                # folder to write to
    profile: [grok_tuned, cifar_tuned]  # studies, folders below, that the performance profile is over
    parts:
      - title: Tuned
        note: Every row had the same number of trials.
        studies: [grok_tuned, cifar_tuned]
"""

import html
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from analysis.labels import nearest
from analysis.page import document, first_screen, over_all_tasks
from analysis.report import check_folder, profile_of, read_groups, save, write
from analysis.rows import Group
from analysis.section import Picture, Section
from analysis.study import FILE as STUDY
from analysis.study import Study
from analysis.style import on_white
from analysis.tables import Table, markdown_text

FILE = "project.yaml"
# The first line of a page, by which the command recognises its own output.
MADE = "<!-- Made by compare.py from the runs of all studies. -->"
# Characters of a line.
_WIDTH = 120
# Tables of a study, by how their title begins, that the page has beside the first one.
_SHOWN = ("Published against measured", "Effect of each switch", "Flatness at the end")


@dataclass(frozen=True)
class Part:
    """Studies under a heading."""

    title: str
    note: str
    studies: tuple[str, ...]


@dataclass(frozen=True)
class Project:
    """Define which studies of a folder are reported together.

    Args:
        folder: that the studies are in.
        title: of the page.
        output: folder to write to.
        note: a paragraph below the title.
        parts: in their order.
        profile: studies that the performance profile is over.
    """

    folder: Path
    title: str
    output: Path
    note: str
    parts: tuple[Part, ...]
    profile: tuple[str, ...] = ()

    @classmethod
    def of(cls, folders: Sequence[Path]) -> "Project | None":
        """Read the ``project.yaml`` of a single folder; ``None`` without it.

        Raises:
            ValueError: the file is damaged, has an unknown option, or names a folder without a study.
        """
        file = folders[0] / FILE if len(folders) == 1 else None
        if file is None or not file.is_file():
            return None
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not valid YAML") from error
        _check(content, _OPTIONS, str(file))
        for part in content["parts"]:
            _check(part, _PART, f"a part of {file}")
        parts = tuple(
            Part(part["title"], " ".join(part.get("note", "").split()), tuple(part["studies"]))
            for part in content["parts"]
        )
        note, profile = " ".join(content.get("note", "").split()), tuple(content.get("profile", ()))
        project = cls(folders[0], content["title"], Path(content["output"]), note, parts, profile)
        valid = {path.parent.relative_to(folders[0]).as_posix() for path in folders[0].rglob(STUDY)}
        for name in project.studies:
            if name not in valid:
                raise ValueError(f"{file} names {name}, which has no {STUDY}{nearest(name, valid)}")
        for name in profile:
            if name not in project.studies:
                raise ValueError(f"{file} has {name} in profile, but in no part{nearest(name, project.studies)}")
        if not project.studies:
            raise ValueError(f"{file} names no study")
        return project

    @property
    def studies(self) -> list[str]:
        """Names of all studies, in their order."""
        return [name for part in self.parts for name in part.studies]


# Options with their types, and whether they are required.
_OPTIONS: dict[str, tuple[type, bool]] = {
    "title": (str, True),
    "output": (str, True),
    "parts": (list, True),
    "note": (str, False),
    "profile": (list, False),
}
_PART: dict[str, tuple[type, bool]] = {"title": (str, True), "studies": (list, True), "note": (str, False)}


def _check(content: Any, options: dict[str, tuple[type, bool]], where: str) -> None:
    """Refuse options that are unknown, missing or of another type."""
    if not isinstance(content, dict):
        raise ValueError(f"{where} has no options; valid ones are {', '.join(options)}")
    for key, value in content.items():
        if key not in options:
            raise ValueError(f"{where} has the option {key}; valid options are {', '.join(options)}")
        names = value if isinstance(value, list) and key != "parts" else []
        if not isinstance(value, options[key][0]) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{where}: {key} cannot be {value!r}")
    for key, (_, required) in options.items():
        if required and key not in content:
            raise ValueError(f"{where} lacks the option {key}")


def report(
    project: Project,
    output: Path | None = None,
    progress: Callable[..., Iterable[Any]] = lambda steps, description: steps,
) -> str:
    """Write the page of a project and the reports of its studies.

    Args:
        project: what to report.
        output: in place of the project's.
        progress: as in :func:`analysis.report.compare`.

    Returns:
        The result in words, for the terminal.

    Raises:
        ValueError: a study has no finished run, or the folder has other files.
    """
    folder = output or project.output
    _check_folder(folder)
    stated = {name: Study.of([project.folder / name]) for name in project.studies}
    for name in project.studies:
        check_folder(folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "index.md"
    if not page.exists():
        save(page, f"{MADE}\n")  # by which the folder is known if this report is interrupted
    # Only the pictures of the former page are replaced.
    former = re.findall(r"\(pictures/([^)/]+\.svg)\)", page.read_text(encoding="utf-8"))
    sections: dict[str, list[Section]] = {}
    groups: dict[str, list[Group]] = {}
    for name in progress(project.studies, "reporting studies"):
        groups[name], problems = read_groups([project.folder / name], stated[name])
        sections[name] = write(folder / name, groups[name], problems, stated[name])
        for entry in groups[name]:
            entry.heading = stated[name].title
    over_tasks = profile_of([entry for name in project.profile for entry in groups[name]])
    drawn = {
        _file(name, index): picture.standalone
        for name, found in sections.items()
        for index, section in enumerate(found)
        for picture in _first(section)
    }
    drawn |= {over_tasks[0].file: over_tasks[0].standalone} if over_tasks is not None else {}
    (folder / "pictures").mkdir(exist_ok=True)
    for file, picture in drawn.items():
        save(folder / "pictures" / file, on_white(picture))
    save(page, _markdown(project, folder, stated, sections, over_tasks))
    save(folder / "report.html", _page(project, stated, sections, over_tasks))
    for name in former:
        if name not in drawn:
            (folder / "pictures" / name).unlink(missing_ok=True)
    return f"{len(sections)} {'study' if len(sections) == 1 else 'studies'} in {page}"


def _check_folder(folder: Path) -> None:
    """Check that a folder is new, empty, or has the page of a project."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: name another one to write the report to")
    page = folder / "index.md"
    made = page.is_file() and page.read_text(encoding="utf-8").startswith(MADE)
    if folder.exists() and any(folder.iterdir()) and not made:
        raise ValueError(f"{folder} is not empty and has no report: name another folder to write the report to")


def _first(section: Section) -> list[Picture]:
    return [picture for picture in section.pictures if picture.place == "first"]


def _file(study: str, index: int) -> str:
    return f"{study.replace('/', '-')}{f'-{index + 1}' if index else ''}.svg"


def _tables(section: Section) -> list[Table]:
    """Return the tables of a section that the page has."""
    first, *others = section.tables
    return [first, *(table for table in others if table.title.startswith(_SHOWN))]


def _markdown(
    project: Project,
    folder: Path,
    stated: dict[str, Study],
    sections: dict[str, list[Section]],
    over_tasks: tuple[Picture, Table] | None,
) -> str:
    """Return the page in Markdown; its links lead to the studies' own pages."""
    parts = [MADE, f"# {project.title}\n", *_paragraphs(project.note)]
    noted: set[str] = set()
    if over_tasks is not None:
        picture, table = over_tasks
        parts += ["## Over all tasks\n", f"![{picture.title}](pictures/{picture.file})\n"]
        parts += [*_paragraphs(picture.caption), _table(table, noted, 3)]
    for part in project.parts:
        parts += [f"## {part.title}\n", *_paragraphs(part.note)]
        for name in part.studies:
            for index, section in enumerate(sections[name]):
                parts += [f"### {stated[name].title}\n", *_paragraphs(*section.headlines, stated[name].note)]
                for picture in _first(section):
                    file = _file(name, index)
                    parts += [f"![{stated[name].title}: all rows](pictures/{file})\n", *_paragraphs(picture.caption)]
                parts += _paragraphs(section.protocol)
                parts += [_table(table, noted, 4) for table in _tables(section)]
                parts.append(f"More: {_link(project, folder, name)}`python compare.py {project.folder / name}`\n")
    return "\n".join(parts)


def _paragraphs(*texts: str) -> list[str]:
    return [f"{textwrap.fill(markdown_text(text), _WIDTH, break_on_hyphens=False)}\n" for text in texts if text]


def _table(table: Table, noted: set[str], level: int) -> str:
    """Return a table with those of its notes that no table above has."""
    notes = [note for note in table.notes if note not in noted]
    noted.update(notes)
    text = replace(table, notes=[]).markdown(level)
    return "\n".join([text, *_paragraphs(*notes)])


def _link(project: Project, folder: Path, name: str) -> str:
    """Return links to the text of a study and to its verdict.

    The text may be in the folder above.
    """
    study = project.folder / name
    pages = [next((page for page in (study / "README.md", study.parent / "README.md") if page.is_file()), None)]
    pages += [verdict for verdict in [study / "verdict.md"] if verdict.is_file()]
    return "".join(
        f"[{page.as_posix()}]({Path(os.path.relpath(page, folder)).as_posix()}), " for page in pages if page is not None
    )


def _page(
    project: Project,
    stated: dict[str, Study],
    sections: dict[str, list[Section]],
    over_tasks: tuple[Picture, Table] | None,
) -> str:
    """Return the page in HTML; its links lead to the studies' reports beside it."""
    contents, body = "", "" if over_tasks is None else over_all_tasks(*over_tasks)
    for part in project.parts:
        note = f"<p>{html.escape(part.note)}</p>" if part.note else ""
        body += f"<h2>{html.escape(part.title)}</h2>{note}"
        lines = ""
        for name in part.studies:
            key = re.sub(r"\W", "-", name)
            title, note = html.escape(stated[name].title), html.escape(stated[name].note)
            words = f"<p>{note}</p>" if note else ""
            for index, section in enumerate(sections[name]):
                anchor = f"{key}-{index + 1}"
                tables = "".join(table.html() for table in _tables(section))
                link = f'<p><a href="{name}/report.html">The report of this study</a></p>'
                body += f'<section id="{anchor}"><h3>{title}</h3>{words}{first_screen(section, anchor)}{tables}{link}'
                body += "</section>"
                lines += f'<li><a href="#{anchor}">{title}</a> {html.escape(section.headlines[0])}</li>'
        contents += f"<p><b>{html.escape(part.title)}</b></p><ul>{lines}</ul>"
    note = f"<p>{html.escape(project.note)}</p>" if project.note else ""
    header = f"<h1>{html.escape(project.title)}</h1>{note}<nav>{contents}</nav>"
    return document(project.title, header, body)
