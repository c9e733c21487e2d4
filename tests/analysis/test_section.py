"""Test which tables and pictures the part about one table has, and in which order."""

from dataclasses import replace

import pytest

from analysis.rows import AXIS, Group
from analysis.section import Section, captions, make_section
from analysis.study import Study
from tests.analysis.runs import HALF, ranked, timed


@pytest.fixture(scope="module")
def by_metric(groups: list[Group]) -> Section:
    return make_section(groups[0], Study(), 0)


@pytest.fixture(scope="module")
def by_time(groups: list[Group]) -> Section:
    run = groups[0].rows[0].any
    rows = [timed(run, label, times) for label, times in (("fast", [10, 11, 12]), ("slow", [20, 25, 31]))]
    return make_section(ranked(groups[0], rows, [HALF]), Study(baseline="slow"), 3)


def titles(section: Section) -> list[str]:
    return [table.title for table in section.tables]


def test_what_rows_are_ranked_by_comes_first_and_the_runs_are_apart(by_metric: Section, by_time: Section) -> None:
    assert titles(by_metric)[:3] == ["At a glance", "Results", "Cost of reaching val/accuracy >= 0.1"]
    assert titles(by_time)[:3] == ["At a glance", "Cost of reaching val/accuracy >= 0.5", "Results"]
    assert titles(by_metric)[-1] == "Settings"
    # These rows are copies of one, so that they have no settings to tell them apart.
    assert titles(by_time)[-1] == "Step cost"
    assert by_metric.runs.title == by_time.runs.title == "Runs, and the command that repeats each"


def test_rows_are_compared_with_the_baseline_of_the_study(by_time: Section, groups: list[Group]) -> None:
    assert by_time.reference is not None and by_time.reference.label == "slow"
    assert "Paired seeds against slow: val/accuracy >= 0.5" in titles(by_time)
    # That of its own folder comes before that of the whole report.
    own = make_section(replace(groups[0], baseline="grok_aga", sweeps={}), Study(baseline="grok_adamw"), 0)
    assert own.reference is not None and own.reference.label == "grok_aga"


def test_a_page_has_curves_over_every_axis_and_other_files_have_one(by_metric: Section) -> None:
    group = by_metric.group
    curves = [picture for picture in by_metric.every_picture if picture.place in group.axes]
    assert [picture.place for picture in curves] == [axis for axis in group.axes for _ in range(3)]
    assert [(picture.place, picture.file) for picture in curves if picture.file] == [
        (AXIS, "1-modular_addition-curves.svg")
    ]


def test_every_picture_of_a_report_has_a_name_of_its_own(by_metric: Section, by_time: Section) -> None:
    assert [picture.file for picture in by_metric.pictures] == [
        "1-modular_addition-ranking.svg",
        "1-modular_addition-curves.svg",
        "1-modular_addition-reached.svg",
        "1-modular_addition-passes-3.svg",
        "1-modular_addition-search-1.svg",
        "1-modular_addition-search-best.svg",
    ]
    names = [picture.file for section in (by_metric, by_time) for picture in section.pictures]
    assert len(names) == len(set(names)) and all(name.startswith("4-") for name in names[6:])
    assert (by_metric.anchor, by_time.anchor) == ("table-1", "table-4")


def test_a_picture_has_the_names_of_its_rows_only_beside_other_files(by_metric: Section) -> None:
    pictures = {picture.file.rpartition("-")[2]: picture for picture in by_metric.pictures}
    for name in ("curves.svg", "reached.svg"):
        assert "grok_aga" in pictures[name].standalone and "grok_aga" not in pictures[name].drawn
    assert pictures["ranking.svg"].standalone == pictures["ranking.svg"].drawn


def test_captions_explain_the_signs_that_are_drawn(by_metric: Section, by_time: Section, groups: list[Group]) -> None:
    first = [section.every_picture[0].caption for section in (by_metric, by_time)]
    assert first == [
        "Small: seeds. Large: means, with 95 % intervals. Dashed: grok_adamw, the baseline.",
        "Small: seeds, hollow at the right if they missed the target. Large: medians, with intervals. "
        "Dashed: slow, the baseline.",
    ]
    # A baseline without a median has no line.
    never = timed(groups[0].rows[0].any, "never", [None, None])
    entry = ranked(groups[0], [never, by_time.group.rows[0]], [HALF])
    assert "Dashed" not in make_section(entry, Study(baseline="never"), 0).every_picture[0].caption
    trials = [picture.caption for picture in by_metric.every_picture if picture.place == "search"]
    assert "A mark is a trial. A cross at the edge" in trials[0] and "hollow" not in trials[0]
    assert captions([picture for picture in by_metric.every_picture if picture.place in by_metric.group.axes]) == [
        by_metric.every_picture[1].caption
    ]


def test_a_caption_below_a_picture_in_markdown_marks_nothing_up(by_metric: Section) -> None:
    assert by_metric.pictures[0].markdown("pictures") == (
        "![val/accuracy, higher is better](pictures/1-modular_addition-ranking.svg)\n\n"
        "Small: seeds. Large: means, with 95 % intervals. Dashed: grok\\_adamw, the baseline.\n"
    )
