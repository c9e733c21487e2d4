"""Test the page of a report: it is complete, and needs no network and no script."""

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis.page import page
from analysis.protocol import protocol_words
from analysis.report import write
from analysis.rows import Group, group
from analysis.runs import AXES, read
from analysis.section import make_section
from analysis.study import Study
from analysis.tables import Table
from analysis.verdict import sentence
from experiment.target import Target
from tests.analysis.runs import copy

NOTHING_LOST = Table("In no table", ["folder", "why"], [])


class Page(HTMLParser):
    """Collect ids, links and everything that a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.scripts: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("href", "src", "srcset", "data", "action", "poster", "xlink:href"):
                self.links.append(str(value))
        if tag == "script":
            self.scripts.append(dict(attrs))
        assert tag not in ("link", "iframe", "object", "embed", "img")


@pytest.fixture(scope="module")
def text(written: Path) -> str:
    return (written / "report.html").read_text()


def without_script(text: str) -> str:
    """Return the page without the text of its script."""
    return re.sub(r"(<script>).*?(</script>)", r"\1\2", text, flags=re.S)


def test_the_page_loads_nothing_from_elsewhere(text: str) -> None:
    parsed = Page(text)
    assert len(parsed.links) > 10 and all(link.startswith("#") for link in parsed.links)
    # The only addresses are names of XML dialects, which no browser loads.
    assert set(re.findall(r"https?://[^\s\"'<>)]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", text))


def test_the_only_script_is_in_the_page_and_loads_nothing(text: str) -> None:
    assert Page(text).scripts == [{}]
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.S)
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|import|eval|sendBeacon)\b", script)


def test_every_id_is_unique_and_every_reference_leads_somewhere(text: str) -> None:
    parsed = Page(text)
    assert len(parsed.ids) == len(set(parsed.ids))
    references = (
        [link[1:] for link in parsed.links] + re.findall(r"url\(#(.*?)\)", text) + re.findall(r'for="(.*?)"', text)
    )
    assert set(references) <= set(parsed.ids)


def test_the_page_has_every_axis_every_table_and_every_problem(text: str, groups: list[Group]) -> None:
    assert "<title>A &amp; B</title>" in text
    for name in AXES.values():
        assert f">{name}</label>" in text
    for metric in ("val/accuracy", "train/loss", "val/loss"):
        for name in AXES.values():
            assert f"{metric} over {name}" in text
    tables = ("At a glance", "Results", "Milestones", "Step cost", "Settings", "Tuning budget of search")
    for title in (*tables, "Luck of the search search"):
        assert f"<h3>{title}</h3>" in text
    assert "<h3>Cost of reaching val/accuracy &gt;= 0.1</h3>" in text
    assert "runs/&lt;lost&gt;" in text
    found = re.search(r">(\d+) runs in (\d+) rows; 1 folder is in no table and (<a [^>]*>listed below</a>)\.</p>", text)
    assert found is not None
    counts = [sum(len(row.runs) for entry in groups for row in entry.rows), sum(len(entry.rows) for entry in groups)]
    assert [*map(int, found.groups()[:2])] == counts
    assert found[3] == '<a href="#left-out">listed below</a>' and '<section id="left-out">' in text
    for entry in groups:
        assert f"Protocol <code>{entry.digest}</code>" in text
        for row in entry.rows:
            for run in row.runs.values():
                assert f"python train.py fit --config {run.shown / 'config.yaml'}" in text


def test_the_first_screen_has_the_result_and_the_protocol_in_words(text: str, groups: list[Group]) -> None:
    for number, entry in enumerate(groups, 1):
        (section,) = re.findall(rf'<section id="table-{number}">(.*?)</section>', text, flags=re.S)
        first = section[: section.index("<h3>")]
        assert f"<h2>{entry.title}</h2>" in first
        reference = next((row for row in entry.rows if row.optimizer == "adamw" and len(entry.rows) > 1), None)
        for words in (sentence(entry, reference), protocol_words(entry)):
            assert html.escape(words) in first
        # One picture has all rows, unless that is a single run.
        assert first.count("<figure>") == (sum(len(row.runs) for row in entry.rows) > 1)


def test_several_tables_have_a_list_of_contents_and_a_single_one_has_none(text: str, groups: list[Group]) -> None:
    (contents,) = re.findall("<nav>(.*?)</nav>", text, flags=re.S)
    assert re.findall(r'href="#(.*?)"', contents) == ["table-1", "table-2"]
    for entry in groups:
        assert entry.title in contents
    alone = page(Study(), [make_section(groups[1], Study(), 0)], NOTHING_LOST)
    assert "<nav>" not in alone and "no table" not in alone
    assert ">1 run in 1 row.</p>" in alone


def test_what_may_mislead_is_said_above_the_tables(text: str) -> None:
    warnings = re.findall(r'<p class="warning">(.*?)</p>', text)
    assert [warning.split(":")[0] for warning in warnings] == [
        "The rows were not tuned with equal budgets",
        "UNEQUAL BUDGETS",
    ]
    assert text.index('class="warning"') < text.index("<h3>At a glance</h3>")


def test_every_row_has_a_swatch_of_its_colour_beside_the_curves(text: str, groups: list[Group]) -> None:
    lists = re.findall(r'<ul class="rows">(.*?)</ul>', text, flags=re.S)
    assert len(lists) == len(groups)
    for entry, swatches in zip(groups, lists, strict=True):
        items = re.findall(r"<li>(<svg.*?</svg>)(.*?)</li>", swatches, flags=re.S)
        assert [label.strip() for _, label in items] == [f"{row.label} ({len(row.runs)})" for row in entry.rows]
        for row, (swatch, _) in zip(entry.rows, items, strict=True):
            assert row.style.colour.lower() in swatch
        # Without their ids, no two swatches of a table are alike.
        drawn = {re.sub(r'(id="|#)table-[^")]*', "", swatch) for swatch, _ in items}
        assert len(drawn) == len(items)


def test_the_chosen_axis_alone_is_shown_without_a_script(text: str, groups: list[Group]) -> None:
    for number, entry in enumerate(groups, 1):
        names = re.findall(rf'<input type="radio" name="axis-table-{number}" id="(.*?)"( checked)?>', text)
        assert [checked for _, checked in names] == [" checked", *[""] * (len(entry.axes) - 1)]
        for place in range(1, len(entry.axes) + 1):
            assert f".choice:has(> input:nth-of-type({place}):checked) > .pictures:nth-of-type({place})" in text


def test_each_figure_is_drawn_once(written: Path, text: str, saved: list[Figure]) -> None:
    # Only the separate figures with a legend are saved again.
    with_legend = [path for name in ("curves", "reached") for path in (written / "pictures").glob(f"*-{name}.svg")]
    assert len(with_legend) == 3
    assert len(saved) == without_script(text).count("<svg") + len(with_legend)
    assert all(figure.get_layout_engine() is None for figure in saved)  # that would draw each of them twice


def test_all_text_of_a_study_is_escaped(groups: list[Group]) -> None:
    study = Study(title="<b>A</b>", note="Five & more.")
    found = page(study, [make_section(groups[1], study, 0)], NOTHING_LOST)
    assert "<h1>&lt;b&gt;A&lt;/b&gt;</h1><p>Five &amp; more.</p>" in found and "<b>A" not in found


def test_costs_that_were_not_logged_leave_their_axis_out(runs: Path, tmp_path: Path) -> None:
    folder = copy(min((runs / "grok_aga").iterdir()), tmp_path, "without")
    log = pd.read_csv(folder / "metrics.csv")
    log = log.drop(columns=[column for column in log if column.startswith("cost/")])
    log.to_csv(folder / "metrics.csv", index=False)
    (entry,) = group(read([tmp_path])[0], targets=[Target("any", "val/accuracy", 0.01)])
    assert entry.axes == ["epoch"]
    write(tmp_path / "report", [entry], [], Study(title="Without costs"))
    text = (tmp_path / "report" / "report.html").read_text()
    assert "over epochs" in text and "over FLOPs" not in text and "Step cost" not in text
