"""Read runs and write their report.

It is a page, Markdown, LaTeX, pictures and the numbers of every run.
"""

import csv
import functools
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from analysis import profile
from analysis.comparison import check_names
from analysis.flatness import MEASURES
from analysis.page import GENERATOR, page
from analysis.rows import Group, group
from analysis.runs import AXES, Problem, read
from analysis.section import Picture, Section, count_runs, make_section
from analysis.study import FILE as STUDY
from analysis.study import Study
from analysis.style import add_legend, on_white, svg
from analysis.tables import Table, markdown_text
from experiment.quantities import count

FILES = ("report.html", "report.md", "report.tex", "runs.csv")
PROFILE = (
    "For each ratio, the share of tasks on which an optimizer needs at most that many times the gradient evaluations "
    "of the task's best optimizer. Higher is better; the left end is the share of tasks on which no other was faster. "
    "A missed target counts as never reached."
)


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
        folders: run folders, folders that contain some, or archives. Where several of them have a ``study.yaml``, each
            is in tables of its own.
        output: folder to write to, see :func:`write`.
        study: the options of the command line, or of a single study.
        unfinished: whether to include runs that did not finish.
        progress: yields the steps that it is given, and shows how many are done under a ``description``.

    Returns:
        The result in words, for the terminal.

    Raises:
        ValueError: there is no finished run, a name in ``study`` is wrong, or ``output`` has other files.
    """
    check_folder(output)
    groups, problems = read_groups(folders, study, unfinished, functools.partial(progress, description="reading runs"))
    sections = write(
        output, groups, problems, study, functools.partial(progress, description="writing tables and pictures")
    )
    return summary(sections, problems)


def read_groups(
    folders: Sequence[Path], study: Study, unfinished: bool = False, progress: Callable[..., Iterable[Any]] = iter
) -> tuple[list[Group], list[Problem]]:
    """Return the groups of all runs in folders, and the folders that are in no table.

    Raises:
        ValueError: as :func:`compare`.
    """
    groups: list[Group] = []
    problems: list[Problem] = []
    several = len(folders) > 1
    apart = [[folder] for folder in folders if several and (folder / STUDY).is_file()]
    others = [folder for folder in folders if [folder] not in apart]
    for part in [*apart, *([others] if others else [])]:
        stated = Study.of(part) if several else study
        runs, lost = read([*part, *stated.also], unfinished, progress)
        found = group(runs, lost, study.targets or stated.targets, stated.labels, stated.families)
        stated.check_rows(found)
        for entry in found:
            entry.baseline, entry.heading = study.baseline or stated.baseline, stated.title if part in apart else ""
        check_names(found, None if several and study.baseline else stated.baseline, ())
        groups += found
        problems += lost
    if not groups:
        reasons = f", such as {problems[0].folder}: {problems[0].reason}" if problems else ""
        raise ValueError(f"there is no finished run in {', '.join(map(str, folders))}{reasons}")
    check_names(groups, study.baseline, study.targets)
    return groups, problems


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
    over_tasks = profile_of(groups)
    left_out = _left_out(problems)
    drawn = [picture for section in sections for picture in section.pictures]
    drawn += [over_tasks[0]] if over_tasks is not None else []
    tables = [table.latex() for section in sections for table in [*section.tables, section.runs] if table.rows]
    texts = {
        "report.html": page(study, sections, left_out, over_tasks),
        "report.md": _markdown(study, sections, left_out, over_tasks),
        "report.tex": "% Needs \\usepackage{booktabs}.\n" + "\n".join(tables),
        "runs.csv": _csv(list(_numbers(groups))),
    }
    former = pictures(folder)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for picture in drawn:
        save(folder / "pictures" / picture.file, on_white(picture.standalone))
    for name, text in texts.items():
        save(folder / name, text)
    for path in former:
        if path.name not in {picture.file for picture in drawn}:
            path.unlink(missing_ok=True)
    return sections


def save(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def profile_of(groups: Sequence[Group]) -> tuple[Picture, Table] | None:
    """Return the performance profile and its costs.

    ``None`` is returned unless at least two tasks share at least two optimizers.
    """
    # A task that was searched more than once counts with its first study.
    first = {entry.digest: entry for entry in reversed(groups)}
    tasks = {f"{entry.title} ({entry.digest})": entry for entry in groups if first[entry.digest] is entry}
    by_task = profile.costs(tasks)
    if len(by_task) < 2 or len(next(iter(by_task.values()))) < 2:
        return None
    figure = profile.draw(by_task)
    add_legend(figure)
    drawn = svg(figure)
    return Picture("profile", drawn, PROFILE, str(figure.get_label()), "profile.svg", drawn), profile.table(
        tasks, by_task
    )


def _csv(lines: Sequence[dict[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(key for line in lines for key in line), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def check_folder(folder: Path) -> None:
    """Check that ``folder`` is new, empty, or has a report.

    The report may be one that was not written to its end.

    Raises:
        ValueError: it has other files, or is not a folder.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: name another one to write the report to")
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if names and not names >= set(FILES) and not _is_unfinished(folder, names):
        raise ValueError(f"{folder} is not empty and has no report: name another folder to write the report to")


def _is_unfinished(folder: Path, names: set[str]) -> bool:
    """Return whether a folder has only a report that was not written to its end."""
    if not names <= {"pictures", *FILES}:
        return False
    ours = all(re.fullmatch(r"(\d+-.+|profile)\.svg", path.name) for path in folder.glob("pictures/[!.]*"))
    # The page is the first of the files.
    made = "report.html" in names and GENERATOR in (folder / "report.html").read_text(encoding="utf-8")
    return ours and (made or names == {"pictures"})


def pictures(folder: Path) -> list[Path]:
    """Return the pictures of the report in ``folder``, and no others there."""
    text = (folder / "report.md").read_text(encoding="utf-8") if (folder / "report.md").exists() else ""
    names = re.findall(r"^!\[[^\]]*\]\(pictures/([^)/]+)\)$", text, flags=re.M)
    return [folder / "pictures" / name for name in dict.fromkeys(names)]


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


def _markdown(
    study: Study, sections: Sequence[Section], left_out: Table, over_tasks: tuple[Picture, Table] | None
) -> str:
    parts = [f"# {study.title}\n", *([f"{study.note}\n"] if study.note else [])]
    if over_tasks is not None:
        parts += ["## Over all tasks\n", over_tasks[0].markdown("pictures"), over_tasks[1].markdown()]
    for section in sections:
        parts.append(f"## {section.group.title}, protocol {section.group.digest}\n")
        parts.append("".join(f"* {markdown_text(line)}\n" for line in section.headlines))
        parts += [picture.markdown("pictures") for picture in section.pictures if picture.place == "first"]
        parts.append(f"{markdown_text(section.protocol)}\n")
        parts += [table.markdown() for table in section.tables]
        parts += [picture.markdown("pictures") for picture in section.pictures if picture.place != "first"]
        parts += [section.runs.markdown()] if section.runs.rows else []
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
