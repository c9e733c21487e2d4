"""Use a report's page as a reader does: sort, filter, hide columns and scroll, on a desktop and on a phone."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from analysis.page import document
from analysis.report import write
from analysis.rows import group
from analysis.runs import read
from analysis.study import Study
from analysis.tables import Table

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome on the PATH")

ROWS = [
    ["late", "1,552 [1,472, 1,888]", "2 min 5 s", "99.38 % [99.22, 99.51]", "a" * 30],
    ["AdamW", "not within 4,800 (0 of 5)", "42 s", "-", "b" * 30],
    ["Base", "128 [112, 136]", "1 h 3 min", "99.47 % [99.30, 99.60]", "c" * 30],
    ["Muon", "> 9.5e-3", "-", "8.50 % [7.00, 9.10]", "d" * 30],
    ["Sync", "304 [272, 336]", "3.5 s", "100.00 %", "e" * 30],
]
TABLE = Table("Numbers", ["row", "evaluations", "time", "accuracy", "machine"], ROWS, optional={"machine"})
# What a reader does, in the page; the values that it returns come back as JSON.
PROBE = """<script>
let failure = null;
window.addEventListener("error", (event) => { failure = event.message; });
</script>%s<script>
const table = document.querySelector("table"), heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
const names = () => [...body.rows].filter((row) => !row.hidden).map((row) => row.cells[0].textContent);
const press = (column) => { heads[column].querySelector("button").click(); return names(); };
const result = (() => { %s })();
const width = document.documentElement.scrollWidth;
parent.postMessage(JSON.stringify({result, failure, width, screen: innerWidth}), "*");
</script>"""
# A window has a least width, which a frame has not.
FRAME = """<!doctype html><title>nothing came back</title>
<script>addEventListener("message", (event) => { document.title = event.data; });</script>
<iframe src="page.html" style="width: %dpx; height: 900px; border: 0"></iframe>"""


def in_browser(page: str, steps: str, folder: Path, width: int = 1280) -> Any:
    """Return what JavaScript returns that runs in a page after its own script, and check that nothing failed."""
    head, end = page.split("</body>")
    before, script = head.rsplit("<script>", 1)
    (folder / "page.html").write_text(before + PROBE % (f"<script>{script}", steps) + f"</body>{end}", encoding="utf-8")
    (folder / "frame.html").write_text(FRAME % width, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options += [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000"]
    options += ["--virtual-time-budget=5000", "--dump-dom"]
    command = [str(BROWSER), *options, (folder / "frame.html").as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    title = re.search(r"<title>(.*?)</title>", found.stdout, re.S)
    assert title is not None, found.stderr
    answer = json.loads(unescape(title[1]))
    assert answer["failure"] is None
    # No page is wider than its screen; only tables scroll.
    assert answer["width"] <= answer["screen"] == width
    return answer["result"]


def test_columns_sort_by_their_numbers_and_keep_missing_values_last(tmp_path: Path) -> None:
    steps = "return [1, 1, 1, 2, 2, 3, 3, 0].map(press);"
    orders = in_browser(document("t", "", TABLE.html()), steps, tmp_path)
    given = [row[0] for row in ROWS]
    assert orders == [
        ["Muon", "Base", "Sync", "late", "AdamW"],  # a time that was not reached is the longest
        ["AdamW", "late", "Sync", "Base", "Muon"],
        given,
        ["Sync", "AdamW", "late", "Base", "Muon"],
        ["Base", "late", "AdamW", "Sync", "Muon"],
        ["Muon", "late", "Base", "Sync", "AdamW"],
        ["Sync", "Base", "late", "Muon", "AdamW"],
        sorted(given, key=str.lower),
    ]


def test_the_filter_keeps_rows_with_all_of_its_words(tmp_path: Path) -> None:
    steps = """const field = document.querySelector("input[type=search]");
    return ["ba", "99. e", "nothing", ""].map((text) => {
      field.value = text; field.dispatchEvent(new Event("input")); return names();
    });"""
    found = in_browser(document("t", "", TABLE.html()), steps, tmp_path)
    assert found == [["Base"], ["late", "Base"], [], [row[0] for row in ROWS]]


def test_columns_can_be_hidden_and_shown_again(tmp_path: Path) -> None:
    steps = """const boxes = [...document.querySelectorAll(".tools input[type=checkbox]")];
    const shown = () => heads.filter((head) => !head.hidden).map((head) => head.textContent);
    const all = shown();
    boxes[1].click();
    const fewer = shown(), cells = [...body.rows].every((row) => row.cells[2].hidden);
    boxes[1].click();
    return [all, fewer, cells, shown()];"""
    every, fewer, cells, again = in_browser(document("t", "", TABLE.html()), steps, tmp_path)
    assert every == again == list(TABLE.columns)
    assert fewer == ["row", "evaluations", "accuracy", "machine"] and cells


def test_on_a_phone_less_important_columns_start_hidden_and_the_first_stays_in_sight(tmp_path: Path) -> None:
    steps = """const box = document.querySelector(".scroll"), first = body.rows[0].cells[0];
    const before = first.getBoundingClientRect().left, second = body.rows[0].cells[1].getBoundingClientRect().left;
    box.scrollLeft = 60;
    const moved = second - body.rows[0].cells[1].getBoundingClientRect().left;
    return [heads[4].hidden, first.getBoundingClientRect().left - before, moved,
            document.querySelector(".tools summary").textContent];"""
    hidden, first, second, menu = in_browser(document("t", "", TABLE.html()), steps, tmp_path, width=400)
    assert hidden and menu == "columns (4 of 5 shown)"
    assert abs(first) < 2 and second > 20


@pytest.mark.parametrize("width", [400, 1280])
def test_a_whole_report_fits_the_screen(width: int, runs: Path, tmp_path: Path) -> None:
    found, problems = read([runs])
    write(tmp_path / "report", group(found, problems), problems, Study(title="A report"))
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    steps = """return [...document.querySelectorAll("figure.table")].map(
      (figure) => [figure.querySelector("tbody").rows.length, figure.querySelectorAll("thead button").length]);"""
    tables = in_browser(page, steps, tmp_path, width)
    assert len(tables) > 10
    assert all(buttons > 1 for rows, buttons in tables if rows > 1)
