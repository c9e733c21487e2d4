"""Read runs and write their report: a page, Markdown, LaTeX, pictures and the numbers of every run."""

import csv
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from analysis.comparison import check_names
from analysis.flatness import MEASURES
from analysis.page import page
from analysis.rows import Group, group
from analysis.runs import AXES, Problem, read
from analysis.section import Section, count_runs, make_section
from analysis.study import Study
from analysis.style import on_white
from analysis.tables import Table, markdown_text
from experiment.quantities import count

FILES = ("report.html", "report.md", "report.tex", "runs.csv")


def _no_progress(steps: Sequence[Any], description: str) -> Iterable[Any]:
    return steps


def compare(
    folders: Sequence[Path],
    output: Path,
    study: Study,
    unfinished: bool = False,
    progress: Callable[..., Iterable[Any]] = _no_progress,
) -> str:
    """Read runs and write their report.

    Args:
        folders: run folders, folders that contain some, or archives.
        output: folder to write to, see :func:`write`.
        study: the report's options.
        unfinished: whether to include runs that did not finish.
        progress: yields the steps that it is given, and shows how many are done under a ``description``.

    Returns:
        The result in words, for the terminal.

    Raises:
        ValueError: there is no finished run, a name in ``study`` is wrong, or ``output`` has other files.
    """
    check_folder(output)
    runs, problems = read(folders, unfinished, functools.partial(progress, description="reading runs"))
    groups = group(runs, problems, study.targets, study.labels, study.families)
    if not groups:
        reasons = f", such as {problems[0].folder}: {problems[0].reason}" if problems else ""
        raise ValueError(f"there is no finished run in {', '.join(map(str, folders))}{reasons}")
    check_names(groups, study.baseline, study.targets)
    study.check_rows(groups)
    sections = write(
        output, groups, problems, study, functools.partial(progress, description="writing tables and pictures")
    )
    return summary(sections, problems)


def write(
    folder: Path,
    groups: Sequence[Group],
    problems: Sequence[Problem],
    study: Study,
    progress: Callable[[Sequence[Group]], Iterable[Group]] = iter,
) -> list[Section]:
    """Write the report, over a former one, and return its sections.

    Args:
        folder: made if it does not exist; only the files of a former report are replaced.
        groups: as :func:`analysis.rows.group` returns them.
        problems: folders that are in no table.
        study: the report's options.
        progress: yields the groups that it is given, and shows how many have been written about.

    Raises:
        ValueError: the folder has other files.
    """
    check_folder(folder)
    sections = [make_section(group, study, index) for index, group in enumerate(progress(groups))]
    left_out = _left_out(problems)
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures(folder):
        picture.unlink(missing_ok=True)
    (folder / "pictures").mkdir(exist_ok=True)
    for section in sections:
        for drawn in section.pictures:
            (folder / "pictures" / drawn.file).write_text(on_white(drawn.standalone), encoding="utf-8")
    (folder / "report.html").write_text(page(study, sections, left_out), encoding="utf-8")
    (folder / "report.md").write_text(_markdown(study, sections, left_out), encoding="utf-8")
    tables = [table.latex() for section in sections for table in section.tables]
    (folder / "report.tex").write_text("% Needs \\usepackage{booktabs}.\n" + "\n".join(tables), encoding="utf-8")
    lines = list(_numbers(groups))
    with (folder / "runs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, dict.fromkeys(key for line in lines for key in line), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return sections


def check_folder(folder: Path) -> None:
    """Check that ``folder`` is new, empty, or has a report.

    Raises:
        ValueError: it has other files, or is not a folder.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: name another one to write the report to")
    if any(folder.iterdir()) and not all((folder / name).is_file() for name in FILES):
        raise ValueError(f"{folder} is not empty and has no report: name another folder to write the report to")


def pictures(folder: Path) -> list[Path]:
    """Return the pictures of the report in ``folder``, and no others there."""
    text = (folder / "report.md").read_text(encoding="utf-8") if (folder / "report.md").exists() else ""
    names = re.findall(r"^!\[(.+)\]\(pictures/\1\)$", text, flags=re.M)
    return [folder / "pictures" / name for name in dict.fromkeys(names) if "/" not in name]


def _left_out(problems: Sequence[Problem]) -> Table:
    lines = [[str(problem.folder), problem.reason] for problem in problems]
    return Table("In no table", ["folder", "why"], lines)


def _numbers(groups: Sequence[Group]) -> Iterator[dict[str, object]]:
    """Yield a row for each run, with the numbers behind every table."""
    for entry in groups:
        for row in entry.rows:
            for seed, run in row.runs.items():
                line: dict[str, object] = {"task": entry.task, "protocol": entry.digest, "row": row.label, "seed": seed}
                line |= {"best": run.best(entry.metric, entry.lower), "last": run.last(entry.metric)}
                line |= {"metric": entry.metric, "diverged": run.diverged}
                line |= {axis: run.at_end(axis) for axis in AXES}
                line |= {column: run.last(column) for column in MEASURES if run.has(column)}
                for target in entry.targets:
                    for axis in entry.axes:
                        line[f"{target.name}: {AXES[axis]}"] = run.reached(target, axis)
                yield line | {"folder": str(run.shown)}


def _markdown(study: Study, sections: Sequence[Section], left_out: Table) -> str:
    parts = [f"# {study.title}\n", *([f"{study.note}\n"] if study.note else [])]
    for section in sections:
        parts.append(f"## {section.group.title}, protocol {section.group.digest}\n")
        parts.append("".join(f"* {markdown_text(line)}\n" for line in section.headlines))
        parts += [picture.markdown("pictures") for picture in section.pictures if picture.place == "first"]
        parts.append(f"{markdown_text(section.protocol)}\n")
        *tables, runs = section.tables
        parts += [table.markdown() for table in tables]
        parts += [picture.markdown("pictures") for picture in section.pictures if picture.place != "first"]
        parts.append(runs.markdown())
    if left_out.rows:
        parts.append(left_out.markdown(2))
    return "\n".join(parts)


def summary(sections: Sequence[Section], problems: Sequence[Problem]) -> str:
    """Return the result in words, for the terminal."""
    lines = []
    for section in sections:
        entry = section.group
        counts = f"{count(count_runs(entry), 'run')} in {count(len(entry.rows), 'row')}"
        lines.append(f"{entry.title}, protocol {entry.digest}: {counts}")
        lines += [f"  {line}" for line in section.headlines]
    if problems:
        lines.append(f"{count(len(problems), 'folder')} in no table; the report has the reasons")
    return "\n".join(lines)
