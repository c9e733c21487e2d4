"""Write a table as Markdown, HTML and LaTeX."""

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from analysis.statistics import Mean
from analysis.times import Median

# LaTeX has commands for these, and fonts may lack them.
_LATEX = {
    "±": r"$\pm$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    ">": r"\textgreater{}",
    "<": r"\textless{}",
    "φ": r"$\varphi$",
    "½": r"$\frac{1}{2}$",
    "·": r"$\cdot$",
}

# Characters of notes from which a page shows them on request.
_LONG_NOTES = 260
# Number of columns from which cells may wrap, so that the last ones are visible without scrolling.
_MANY = 9


@dataclass
class Table:
    """Arrange text in rows and columns, the first of which names the row.

    Args:
        title: its heading.
        columns: names, all different.
        rows: as many cells each as there are columns.
        notes: sentences below it.
        strong: indices of rows to stand out, if any.
        optional: columns that a page hides where the table is too wide for it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: list[str] = field(default_factory=list)
    strong: set[int] = field(default_factory=set)
    optional: set[str] = field(default_factory=set)

    def markdown(self, level: int = 3) -> str:
        """Return heading, table and notes in GitHub's Markdown."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"

        lines = [f"{'#' * level} {self.title}", "", line(self.columns), line(["---"] * len(self.columns))]
        for index, (first, *others) in enumerate(self.rows):
            lines.append(line([f"**{first}**" if index in self.strong else first, *others]))
        lines += [part for note in self.notes for part in ("", markdown_text(note))]
        return "\n".join(lines) + "\n"

    def html(self) -> str:
        """Return a figure with heading, table and notes; all text in it is escaped."""
        heads = [html.escape(column).replace("/", "/<wbr>") for column in self.columns]
        optional = [" data-optional" if column in self.optional else "" for column in self.columns]
        head = "".join(f'<th scope="col"{mark}>{text}</th>' for mark, text in zip(optional, heads, strict=True))
        marks = [' class="strong"' if index in self.strong else "" for index in range(len(self.rows))]
        body = "".join(f"<tr{mark}>{''.join(_cells(row))}</tr>" for mark, row in zip(marks, self.rows, strict=True))
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        if len(notes) > _LONG_NOTES:
            notes = f"<details><summary>how to read this table</summary>{notes}</details>"
        kinds = f"table{' some' if self.strong else ''}{' many' if len(self.columns) > _MANY else ''}"
        title = html.escape(self.title)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return (
            f'<figure class="{kinds}"><h3>{title}</h3>'
            f'<div class="scroll" tabindex="0" role="region" aria-label="{title}">{table}</div>'
            f"<figcaption>{notes}</figcaption></figure>"
        )

    def latex(self) -> str:
        """Return a ``table`` environment for the booktabs package, with text escaped."""

        def line(cells: Sequence[str]) -> str:
            return " & ".join(map(_latex_text, cells)) + " \\\\\n"

        text = f"\\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}\n\\toprule\n{line(self.columns)}\\midrule\n"
        text += "".join(map(line, self.rows)) + "\\bottomrule\n\\end{tabular}\n"
        notes = " ".join(_latex_text(note) for note in self.notes)
        caption = f"\\caption{{{_latex_text(self.title)}.{' ' + notes if notes else ''}}}"
        return f"\\begin{{table}}\n\\centering\n{caption}\n{text}\\end{{table}}\n"


def _cells(row: Sequence[str]) -> list[str]:
    first, *others = (html.escape(cell) for cell in row)
    # Where there is little room, a name breaks after a word, and an interval moves below its value.
    name = first if "/" in first else first.replace("_", "_<wbr>")  # a path stays in one piece, to be copied
    values = (
        re.sub(r" %|\[[^\]]*\]", lambda match: match[0].replace(" ", "\N{NO-BREAK SPACE}"), cell) for cell in others
    )
    return [f'<th scope="row">{name}</th>', *(f"<td>{value}</td>" for value in values)]


def markdown_text(text: str) -> str:
    """Return text in which no character marks it up."""
    return re.sub(r"([*_`<>\[\]])", r"\\\1", text)


def _latex_text(text: str) -> str:
    escaped = re.sub(r"[\\{}$&#_%~^]", lambda match: _escape(match[0]), text)
    for character, command in _LATEX.items():
        escaped = escaped.replace(character, command)
    return escaped


def _escape(character: str) -> str:
    named = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return named.get(character, f"\\{character}")


def number(value: float | None, digits: int = 4) -> str:
    """Return ``value`` with some significant digits, a dash for none or NaN.

    Digits before the point are never rounded away.
    """
    if value is None or value != value:
        return "-"
    if abs(value) >= 1e6:
        return f"{value:.{digits - 1}e}"
    if value == round(value) or abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def mean_text(mean: Mean, digits: int = 4) -> str:
    """Return the mean with its interval in brackets."""
    interval = "" if mean.low is None else f" [{number(mean.low, digits)}, {number(mean.high, digits)}]"
    return number(mean.mean, digits) + interval


def p_text(p: float) -> str:
    """Return a p-value with two digits, or that it is below 0.0001."""
    return "< 0.0001" if p < 1e-4 else number(p, 2)


def percent_text(share: Mean, decimals: int = 0) -> str:
    """Return a share in percent with its interval in brackets."""
    shown = [None if value is None else f"{100 * value:.{decimals}f}" for value in (share.mean, share.low, share.high)]
    return f"{shown[0]} %" if shown[1] is None else f"{shown[0]} % [{shown[1]}, {shown[2]}]"


def quartiles_text(values: Sequence[float], digits: int = 4) -> str:
    """Return the median of values, and from three on with their quartiles in brackets."""
    if not len(values):
        return "-"
    lower, median, upper = np.quantile(values, [0.25, 0.5, 0.75])
    quartiles = f" [{number(lower, digits)}, {number(upper, digits)}]" if len(values) > 2 else ""
    return number(median, digits) + quartiles


def median_text(median: Median, text_of: Callable[[float | None], str] = number) -> str:
    """Return the median with its interval, or "not within" the time watched."""
    if median.median is None:
        if median.horizon != median.horizon:  # not watched at all: every run diverged
            return "not reached"
        end = text_of(median.horizon)
        return f"not within {end}" + (f" [{text_of(median.low)}, > {end}]" if median.low is not None else "")
    if median.n < 2:
        return text_of(median.median)
    high = f"> {text_of(median.horizon)}" if median.high is None else text_of(median.high)
    return f"{text_of(median.median)} [{text_of(median.low)}, {high}]"
