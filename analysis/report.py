"""Write a report as HTML, Markdown, LaTeX, CSV and pictures."""

import csv
import functools
import html
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis import plots
from analysis.ablation import ablations
from analysis.archive import unpack_command, unpacked_path
from analysis.flatness import MEASURES, flatness
from analysis.results import baseline, milestones, pairs, published, results, step_cost, to_target
from analysis.robustness import robustness
from analysis.rows import Group, Row, check_names, group
from analysis.runs import AXES, Problem, Run, read
from analysis.study import Study
from analysis.tables import Table, median_text
from analysis.tuning_budget import searches_luck, tuning_budgets
from experiment.quantities import count

_CSS = Path(__file__).with_name("report.css")
# Markdown has no choice of axes, so it shows these alone.
_MARKDOWN_AXES = ("epoch", "cost/gradient_evaluations")
# Flatness measures that are drawn as curves; the others are only in the table.
PROBED = ("flatness/hessian_top", "flatness/rise_gradient")
# Notes that are repeated at the top.
_WARNINGS = ("UNEQUAL", "The rows were")
FILES = ("report.html", "report.md", "report.tex", "runs.csv")


@dataclass
class Section:
    """Collect the part of a report that is about one group.

    Attributes:
        headlines: the result in sentences.
        tables: in their order; the runs themselves come last.
        curves: by axis, then by metric, as figures for a page.
        pictures: other pictures, by file name.
        standalone: pictures for Markdown by file name, on white.
    """

    group: Group
    anchor: str
    headlines: list[str]
    tables: list[Table]
    curves: dict[str, list[str]] = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)
    standalone: dict[str, str] = field(default_factory=dict)


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
    groups = group(runs, problems, study.targets, study.labels)
    if not groups:
        reasons = f", such as {problems[0].folder}: {problems[0].reason}" if problems else ""
        raise ValueError(f"there is no finished run in {', '.join(map(str, folders))}{reasons}")
    check_names(groups, study.baseline, study.targets)
    write(output, groups, problems, study, functools.partial(progress, description="writing tables and pictures"))
    return summary(groups, problems)


def write(
    folder: Path,
    groups: Sequence[Group],
    problems: Sequence[Problem],
    study: Study,
    progress: Callable[[Sequence[Group]], Iterable[Group]] = iter,
) -> None:
    """Write the report, over a former one.

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
    sections = [_section(group, study, index) for index, group in enumerate(progress(groups))]
    left_out = _left_out(problems)
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures(folder):
        picture.unlink(missing_ok=True)
    (folder / "pictures").mkdir(exist_ok=True)
    for section in sections:
        for name, content in section.standalone.items():
            (folder / "pictures" / name).write_text(content, encoding="utf-8")
    (folder / "report.html").write_text(_html(study, sections, left_out), encoding="utf-8")
    (folder / "report.md").write_text(_markdown(study, sections, left_out), encoding="utf-8")
    tables = [table.latex() for section in sections for table in section.tables]
    (folder / "report.tex").write_text("% Needs \\usepackage{booktabs}.\n" + "\n".join(tables), encoding="utf-8")
    lines = list(_numbers(groups))
    with (folder / "runs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, dict.fromkeys(key for line in lines for key in line), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


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


def _section(group: Group, study: Study, index: int) -> Section:
    reference = baseline(group, study.baseline)
    tables = [published(group), results(group), to_target(group), milestones(group)]
    tables += [] if reference is None else list(pairs(group, reference))
    tables += [*ablations(group), *flatness(group), *robustness(group, reference)]
    tables += [step_cost(group, reference), *tuning_budgets(group)]
    tables += [] if reference is None else list(searches_luck(group, reference, study.families))
    tables += [_runs(group)]
    found = [table for table in tables if table is not None and table.rows]
    section = Section(group, f"{group.task}-{group.digest}", list(_headlines(group)), found)
    prefix = f"{index + 1}-{group.task}"
    metrics = list(dict.fromkeys((group.metric, "train/loss", "val/loss", *PROBED)))
    for axis in group.axes:
        for metric in metrics:
            figure = plots.curves(group, metric, axis)
            if figure is None:
                continue
            section.curves.setdefault(axis, []).append(plots.on_page(plots.svg(figure)))
            if axis in _MARKDOWN_AXES and metric == group.metric:
                name = f"{prefix}-{axis.rpartition('/')[2]}.svg"
                plots.add_legend(figure)
                section.standalone[name] = plots.on_white(plots.svg(figure))
    others = [plots.second_passes(row) for row in group.rows]
    for name in dict.fromkeys(name for name, _ in group.sweeps):
        others += plots.sensitivity(group, name)
    for number_, figure in enumerate(figure for figure in others if figure is not None):
        picture = plots.svg(figure)
        section.pictures.append(plots.on_page(picture))
        section.standalone[f"{prefix}-{number_ + 1}.svg"] = plots.on_white(picture)
    return section


def _headlines(group: Group) -> Iterator[str]:
    """State the result in sentences that claim no more than the tables."""
    seeds = {len(row.runs) for row in group.rows}
    if group.rows and max(seeds) < 3:
        yield f"At most {count(max(seeds), 'seed')} a row: nothing here is settled."
    axis = "cost/gradient_evaluations"
    target = group.goal
    if target is None or axis not in group.axes:
        return
    for row in group.rows[:2]:
        median = row.median(target, axis)
        if median is not None and median.median is not None:
            runs = f"{median.reached} of {median.n} runs" if median.n > 1 else "its one run"
            yield f"{row.label}: {target} after {median_text(median)} gradient evaluations ({runs} reached it)."
    missed = [row.label for row in group.rows if all(t.reached is None for t in row.times(target, axis).values())]
    if missed and len(missed) == len(group.rows):
        yield f"No run reached {target}."
    elif missed:
        yield f"Never {target}: {'; '.join(missed)}."


def _runs(group: Group) -> Table:
    """List every run behind the rows, with the command that repeats it."""
    lines = [
        [row.label, run.identity.seed, str(run.epochs), f"python train.py fit --config {_config(run)}"]
        for row in group.rows
        for run in row.runs.values()
    ]
    folders = [run.folder for row in group.rows for run in row.runs.values()]
    archives = {Path(folder.root.filename or "") for folder in folders if isinstance(folder, zipfile.Path)}
    unpack = [unpack_command(archive) for archive in sorted(archives)]
    notes = [f"First unpack the runs: {', '.join(unpack)}"] if unpack else []
    notes += [f"Protocol {group.digest}: " + ", ".join(f"{key} {value}" for key, value in group.protocol.items())]
    return Table("Runs, and the command that repeats each", ["row", "seed", "epochs", "command"], lines, notes)


def _config(run: Run) -> Path:
    return Path(str(unpacked_path(run.folder))) / "config.yaml"


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
        parts.append("".join(f"* {line}\n" for line in section.headlines))
        *tables, runs = section.tables
        parts += [table.markdown() for table in tables]
        parts += [f"![{name}](pictures/{name})\n" for name in section.standalone]
        parts.append(runs.markdown())
    if left_out.rows:
        parts.append(left_out.markdown(2))
    return "\n".join(parts)


def _html(study: Study, sections: Sequence[Section], left_out: Table) -> str:
    title, note = html.escape(study.title), f"<p>{html.escape(study.note)}</p>" if study.note else ""
    links = [f'<li><a href="#{s.anchor}">{html.escape(s.group.title)} ({s.group.digest})</a></li>' for s in sections]
    rows, runs = (sum(count) for count in ([len(s.group.rows) for s in sections], [_count(s.group) for s in sections]))
    problems = len(left_out.rows)
    if problems:
        links.append('<li><a href="#left-out">In no table</a></li>')
    body = "".join(_section_html(section) for section in sections)
    if problems:
        body += f'<section id="left-out">{_wide(left_out.html())}</section>'
    counts = f"{count(runs, 'run')} in {count(rows, 'row')}"
    if problems:
        verb = "is" if problems == 1 else "are"
        counts += f"; {count(problems, 'folder')} {verb} in no table and listed below"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>\n{_CSS.read_text(encoding='utf-8')}{_choices(sections)}</style></head>"
        f'<body><header><h1>{title}</h1>{note}<p class="soft">{counts}.</p>'
        f"<nav><ul>{''.join(links)}</ul></nav></header><main>{body}</main></body></html>\n"
    )


def _count(group: Group) -> int:
    return sum(len(row.runs) for row in group.rows)


def _section_html(section: Section) -> str:
    group = section.group
    parts = [
        f'<section id="{section.anchor}"><h2>{html.escape(group.title)}</h2>'
        f'<p class="soft">protocol <code>{group.digest}</code>: runs of other protocols are in separate tables</p>'
    ]
    notes = [note for table in section.tables for note in table.notes if note.startswith(_WARNINGS)]
    parts += [f'<p class="warning">{html.escape(note)}</p>' for note in notes]
    if section.headlines:
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in section.headlines)
        parts.append(f'<ul class="headline">{lines}</ul>')
    *tables, runs = section.tables
    first = [table for table in tables if table.title in ("Published against measured", "Results")]
    parts += [table.html() for table in first]
    if section.curves:
        parts.append(_curves_html(section))
    if section.pictures:
        pictures = "".join(f"<figure>{picture}</figure>" for picture in _apart(section, section.pictures, "p"))
        parts.append(f'<div class="pictures" style="margin-top: 1rem">{pictures}</div>')
    parts += [table.html() for table in tables if table not in first]
    parts.append(f"<details><summary>{html.escape(runs.title)}</summary>{_wide(runs.html())}</details></section>")
    return "".join(parts)


def _curves_html(section: Section) -> str:
    """Lay out the curves with a choice of axes that needs no script."""
    buttons, panels = "", ""
    for index, (axis, pictures) in enumerate(section.curves.items()):
        key, checked = f"{section.anchor}-{index}", " checked" if index == 0 else ""
        buttons += f'<input type="radio" name="axis-{section.anchor}" id="{key}"{checked}>'
        buttons += f'<label for="{key}">{AXES[axis]}</label>'
        figures = "".join(f"<figure>{picture}</figure>" for picture in _apart(section, pictures, f"c{index}"))
        panels += f'<div class="pictures">{figures}</div>'
    rows = "".join(_swatch(index, row) for index, row in enumerate(section.group.rows))
    words = "Thin lines are seeds; thick ones their mean (geometric for losses), from three seeds on with its 95 % "
    words += "band, until a seed ends."
    return (
        f'<fieldset class="choice"><legend>Curves over</legend>{buttons}'
        f'<ul class="rows">{rows}</ul><p class="soft">{words}</p>{panels}</fieldset>'
    )


def _swatch(index: int, row: Row) -> str:
    line = plots.style(index)
    kind = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "double"}[line["linestyle"]]
    return f'<li><i style="border-top: 3px {kind} {line["color"]}"></i>{html.escape(row.label)} ({len(row.runs)})</li>'


def _choices(sections: Sequence[Section]) -> str:
    """Return the style rules that show the panel of the chosen axis."""
    most = max((len(section.curves) for section in sections), default=0)
    return "".join(
        f".choice:has(> input:nth-of-type({n}):checked) > .pictures:nth-of-type({n}) {{ display: grid; }}\n"
        for n in range(1, most + 1)
    )


def _apart(section: Section, pictures: Sequence[str], place: str) -> Iterator[str]:
    """Make the ids in pictures unique, so that one never refers to another's parts."""
    for index, picture in enumerate(pictures):
        yield re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{section.anchor}-{place}-{index}-", picture)


def _wide(table: str) -> str:
    return table.replace('class="table"', 'class="table left"', 1)


def summary(groups: Sequence[Group], problems: Sequence[Problem]) -> str:
    """Return the result in words, for the terminal."""
    lines = []
    for entry in groups:
        counts = f"{count(_count(entry), 'run')} in {count(len(entry.rows), 'row')}"
        lines.append(f"{entry.title}, protocol {entry.digest}: {counts}")
        lines += [f"  {line}" for line in _headlines(entry)]
    if problems:
        lines.append(f"{count(len(problems), 'folder')} in no table; the report has the reasons")
    return "\n".join(lines)
