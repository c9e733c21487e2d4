"""Lay out a report as a single HTML page that works offline."""

import html
import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from analysis.rows import Row
from analysis.runs import AXES
from analysis.section import Picture, Section, captions, count_runs
from analysis.study import Study
from analysis.style import on_page, svg
from analysis.tables import Table
from experiment.quantities import count

# By which a page is known to be made by this code.
GENERATOR = '<meta name="generator" content="compare.py">'
_STYLE, _SCRIPT = (Path(__file__).with_name(f"report.{kind}") for kind in ("css", "js"))
# Notes that are repeated at the top.
_WARNINGS = ("UNEQUAL", "The rows were not tuned")
# Titles of the pictures that follow the tables, by their place.
_TITLES = {"target": "Reaching the target", "search": "The search", "passes": "Second passes"}


def page(
    study: Study, sections: Sequence[Section], left_out: Table, over_tasks: tuple[Picture, Table] | None = None
) -> str:
    """Return the page of a report.

    Its tables sort, filter and hide columns; without a script they are plain ones.

    Args:
        study: its title and note.
        sections: in their order.
        left_out: folders in no table, with the reasons.
        over_tasks: performance profile of all tasks, and its table.
    """
    rows, runs = (
        sum(counts) for counts in ([len(s.group.rows) for s in sections], [count_runs(s.group) for s in sections])
    )
    counts = f"{count(runs, 'run')} in {count(rows, 'row')}"
    problems = len(left_out.rows)
    if problems:
        verb = "is" if problems == 1 else "are"
        counts += f'; {count(problems, "folder")} {verb} in no table and <a href="#left-out">listed below</a>'
    contents = "".join(
        f'<li><a href="#{s.anchor}">{html.escape(s.group.title)}</a> {html.escape(" ".join(s.headlines[:1]))}</li>'
        for s in sections
    )
    note = f"<p>{html.escape(study.note)}</p>" if study.note else ""
    header = f'<h1>{html.escape(study.title)}</h1>{note}<p class="soft">{counts}.</p>'
    if len(sections) > 1:
        header += f'<nav><ul class="headline">{contents}</ul></nav>'
    body = "" if over_tasks is None else over_all_tasks(*over_tasks)
    body += "".join(_section(section) for section in sections)
    if problems:
        body += f'<section id="left-out">{_wide(left_out.html())}</section>'
    return document(study.title, header, body, _choices(sections))


def document(title: str, header: str, body: str, style: str = "") -> str:
    """Return a whole page with the style and the script of reports."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{GENERATOR}<title>{html.escape(title)}</title><style>\n{_STYLE.read_text(encoding='utf-8')}{style}</style></head>"
        f"<body><header>{header}</header><main>{body}</main>"
        f"<script>\n{_SCRIPT.read_text(encoding='utf-8')}</script></body></html>\n"
    )


def over_all_tasks(picture: Picture, table: Table) -> str:
    """Return the part about several tasks together."""
    (figure,) = _figures([picture], "profile")
    caption = f"<figcaption><p>{html.escape(picture.caption)}</p></figcaption>"
    drawn = f'<figure class="one">{figure}{caption}</figure>'
    return f'<section id="all-tasks"><h2>Over all tasks</h2>{drawn}{table.html()}</section>'


def _section(section: Section) -> str:
    group = section.group
    parts = [f'<section id="{section.anchor}"><h2>{html.escape(group.title)}</h2>']
    parts.append(first_screen(section, section.anchor))
    notes = [note for table in section.tables for note in table.notes if note.startswith(_WARNINGS)]
    parts += [f'<p class="warning">{html.escape(note)}</p>' for note in dict.fromkeys(notes)]
    tables = section.tables
    first = 1 + [table.title for table in tables].count("Published against measured")
    parts += [table.html() for table in tables[:first]]
    parts.append(_curves(section))
    for place, title in _TITLES.items():
        shown = [picture for picture in section.every_picture if picture.place == place]
        if shown:
            words = "".join(f'<p class="soft">{html.escape(caption)}</p>' for caption in captions(shown))
            parts.append(f"<h3>{title}</h3>{words}{_grid(_figures(shown, f'{section.anchor}-{place}'))}")
    parts += [table.html() for table in tables[first:]]
    if section.runs.rows:
        runs = section.runs
        parts.append(f"<details><summary>{html.escape(runs.title)}</summary>{_wide(runs.html())}</details>")
    return "".join([*parts, "</section>"])


def first_screen(section: Section, anchor: str) -> str:
    """Return the result in words, one picture of all rows, and the protocol in words."""
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in section.headlines)
    digest = f"Protocol <code>{section.group.digest}</code>: runs of other protocols are in other tables."
    words = f'<p class="soft">{html.escape(section.protocol)} {digest}</p>'
    shown = [picture for picture in section.every_picture if picture.place == "first"]
    figures = "".join(
        f"<figure>{figure}<figcaption><p>{html.escape(picture.caption)}</p></figcaption></figure>"
        for picture, figure in zip(shown, _figures(shown, f"{anchor}-first"), strict=True)
    )
    return f'<div class="first"><div><div class="headline">{lines}</div>{words}</div>{figures}</div>'


def _curves(section: Section) -> str:
    """Lay out the curves with a choice of axes that needs no script."""
    by_axis: dict[str, list[Picture]] = {}
    for picture in section.every_picture:
        if picture.place in AXES:
            by_axis.setdefault(picture.place, []).append(picture)
    if not by_axis:
        return ""
    buttons, panels = "", ""
    for index, (axis, pictures) in enumerate(by_axis.items()):
        key, checked = f"{section.anchor}-{index}", " checked" if index == 0 else ""
        buttons += f'<input type="radio" name="axis-{section.anchor}" id="{key}"{checked}>'
        buttons += f'<label for="{key}">{AXES[axis]}</label>'
        panels += _grid(_figures(pictures, f"{section.anchor}-c{index}"))
    rows = "".join(_swatch(row, f"{section.anchor}-s{index}") for index, row in enumerate(section.group.rows))
    words = html.escape(captions([picture for pictures in by_axis.values() for picture in pictures])[0])
    return (
        f'<fieldset class="choice"><legend>Curves over</legend>{buttons}'
        f'<ul class="rows">{rows}</ul><p class="soft">{words}</p>{panels}</fieldset>'
    )


def _grid(figures: Sequence[str]) -> str:
    return f'<div class="pictures">{"".join(f"<figure>{figure}</figure>" for figure in figures)}</div>'


def _figures(pictures: Sequence[Picture], place: str) -> list[str]:
    """Return pictures in the colours of the page, with different ids."""
    return [
        re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{place}-{index}-", on_page(picture.drawn))
        for index, picture in enumerate(pictures)
    ]


def _swatch(row: Row, key: str) -> str:
    """Return colour, dash and marker of a row with its name and number of seeds."""
    figure = Figure(figsize=(0.5, 0.14))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.plot(
        [0, 1, 2], [0, 0, 0], linewidth=1.7, markersize=5, markevery=[1], marker=row.style.marker, **row.style.line
    )
    (drawn,) = _figures([Picture("swatch", svg(figure), "")], key)
    return f"<li>{drawn}{html.escape(row.label)} ({len(row.runs)})</li>"


def _choices(sections: Sequence[Section]) -> str:
    """Return the style rules that show the panel of the chosen axis."""
    most = max((len(section.group.axes) for section in sections), default=0)
    return "".join(
        f".choice:has(> input:nth-of-type({n}):checked) > .pictures:nth-of-type({n}) {{ display: grid; }}\n"
        for n in range(1, most + 1)
    )


def _wide(table: str) -> str:
    return table.replace('class="table"', 'class="table left"', 1)
