"""Test a table in three languages, none of which takes a cell for code."""

import math
import re
from html.parser import HTMLParser

import pytest

from analysis.statistics import Mean
from analysis.tables import Table, mean_text, median_text, number, p_text, percent_text, quartiles_text
from analysis.times import Median

NASTY = r"a_b & 50 % <i>|x| $1 #2 {c} ~d ^e \f ± ≥ -"
TABLE = Table(
    "Loss <best> & last_one", ["row", "val_loss", "n"], [[NASTY, "1.5", "3"], ["two", "2", "4"]], ["So_so."], {1}
)


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "wbr":
            self.tags.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.cells and self.tags[-1] in ("td", "th"):
            self.cells[-1] += data


def test_html_has_every_cell_as_text() -> None:
    reader = Cells()
    reader.feed(TABLE.html())
    assert reader.cells == ["row", "val_loss", "n", NASTY, "1.5", "3", "two", "2", "4"]
    assert "i" not in reader.tags


def test_names_break_between_words_and_intervals_keep_together() -> None:
    text = Table("A", ["row", "value"], [["periodic_hidden", "99.38 % [99.22, 99.54]"]]).html()
    assert "periodic_<wbr>hidden" in text
    assert "99.38\xa0% [99.22,\xa099.54]" in text


@pytest.mark.parametrize(("characters", "folded"), [(253, False), (254, True)])
def test_long_notes_are_shown_on_request(characters: int, folded: bool) -> None:
    # With the marks of a paragraph these are 260 characters, and 261.
    note = "x" * characters
    text = Table("A", ["row"], [["one"]], [note]).html()
    assert f"<p>{note}</p>" in text
    assert ("<details><summary>" in text, "</details></figcaption>" in text) == (folded, folded)


def test_columns_that_may_be_hidden_are_marked() -> None:
    text = Table("A", ["row", "first", "second"], [["one", "1", "2"]], optional={"second"}).html()
    assert '<th scope="col">first</th><th scope="col" data-optional>second</th>' in text


def test_markdown_has_as_many_cells_in_every_line() -> None:
    lines = [line for line in TABLE.markdown().splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert {len(re.split(r"(?<!\\)\|", line)) for line in lines} == {5}
    assert r"\|x\|" in lines[2]
    assert lines[3].startswith("| **two** |")


def test_latex_escapes_what_latex_reads_as_code() -> None:
    text = TABLE.latex()
    (line,) = [line for line in text.splitlines() if line.startswith("a")]
    assert line == (
        r"a\_b \& 50 \% \textless{}i\textgreater{}|x| \$1 \#2 \{c\} \textasciitilde{}d \textasciicircum{}e"
        r" \textbackslash{}f $\pm$ $\geq$ - & 1.5 & 3 \\"
    )
    assert r"\caption{Loss \textless{}best\textgreater{} \& last\_one. So\_so.}" in text
    assert r"row & val\_loss & n \\" in text
    assert text.count(r"\begin") == text.count(r"\end") == 2
    assert text.isascii()


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (math.nan, "-"), (3.0, "3"), (1168.0, "1,168"), (0.123456, "0.1235"), (2.5e9, "2.500e+09")],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (1.0, "1"),
        (0.0476, "0.048"),
        (0.000123, "0.00012"),
        (0.0001, "0.0001"),
        (0.0000999, "< 0.0001"),
        (0.0, "< 0.0001"),
        (math.nan, "-"),
    ],
)
def test_p_values_have_two_digits_down_to_one_in_ten_thousand(p: float, text: str) -> None:
    assert p_text(p) == text


def test_shares_are_in_whole_percent() -> None:
    assert percent_text(Mean(9, 0.666, 0.25, 1.0)) == "67 % [25, 100]"
    assert percent_text(Mean(9, 1.0, None, None)) == "100 %"


def test_a_median_has_its_quartiles_from_three_values_on() -> None:
    assert quartiles_text([4.0, 1.0, 2.0, 3.0]) == "2.5 [1.75, 3.25]"
    assert quartiles_text([1.0, 2.0]) == "1.5"
    assert quartiles_text([]) == "-"


def test_means_and_medians_show_what_is_known() -> None:
    assert mean_text(Mean(3, 2.0, 1.5, 2.5)) == "2 [1.5, 2.5]"
    assert mean_text(Mean(1, 2.0, None, None)) == "2"
    assert median_text(Median(5, 5, 240.0, 232.0, 280.0, 280.0)) == "240 [232, 280]"
    assert median_text(Median(5, 3, 240.0, 232.0, None, 4800.0)) == "240 [232, > 4,800]"
    assert median_text(Median(5, 0, None, None, None, 4800.0)) == "not within 4,800"
    assert median_text(Median(5, 1, None, 100.0, None, 4800.0)) == "not within 4,800 [100, > 4,800]"
    # One of many that reached it sets no limit.
    assert median_text(Median(9, 1, None, None, None, 4800.0)) == "not within 4,800"
    assert median_text(Median(1, 1, 7.0, None, None, 7.0)) == "7"
    assert median_text(Median(2, 0, None, None, None, math.nan)) == "not reached"
