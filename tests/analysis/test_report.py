"""Test the files of a report, and what becomes of others in its folder."""

import html
import re
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from analysis.report import FILES, pictures, read_groups, summary, write
from analysis.rows import AXIS, Group
from analysis.runs import AXES, Problem, Run
from analysis.section import Section
from analysis.settings import runs_table
from analysis.study import Study
from analysis.verdict import headlines
from tests.analysis.runs import SEEDS


def test_the_other_files_have_the_same_content(written: Path, groups: list[Group]) -> None:
    markdown, latex = (written / "report.md").read_text(), (written / "report.tex").read_text()
    assert "# A & B" in markdown
    for name in re.findall(r"!\[.*?\]\((.*?)\)", markdown):
        ElementTree.parse(written / name)
    assert len(list((written / "pictures").iterdir())) == markdown.count("![") > 6
    titles = re.findall("^### (.*)$", markdown, flags=re.M)
    assert len(titles) == latex.count(r"\begin{table}") == latex.count(r"\end{table}") > 6
    page = html.unescape((written / "report.html").read_text())
    assert all(f"<h3>{title}</h3>" in page for title in titles)
    for entry in groups:
        assert f"## {entry.title}, protocol {entry.digest}" in markdown


def test_a_picture_is_white_and_has_the_names_of_its_rows_where_it_needs_them(
    written: Path, groups: list[Group]
) -> None:
    for path in (written / "pictures").iterdir():
        text = path.read_text()
        assert "background: #ffffff" in text and "currentColor" not in text
    for name in ("curves", "reached", "ranking"):
        text = (written / "pictures" / f"1-modular_addition-{name}.svg").read_text()
        for row in groups[0].rows:
            assert row.label in text


def test_the_numbers_of_every_run_are_exact(written: Path, groups: list[Group]) -> None:
    # By default pandas rounds the last digit.
    numbers = pd.read_csv(written / "runs.csv", float_precision="round_trip")
    assert len(numbers) == sum(len(row.runs) for entry in groups for row in entry.rows)
    aga = numbers[numbers["row"] == "grok_aga"]
    assert sorted(aga["seed"].astype(str)) == [str(seed) for seed in SEEDS]
    reached = {target.name: f"{target.name}: {AXES[AXIS]}" for target in groups[0].targets}
    for _, line in aga.iterrows():
        run = Run(Path(line["folder"]))
        assert (line["best"], line["last"]) == (run.best("val/accuracy", False), run.last("val/accuracy"))
        assert (line["diverged"], line["metric"], line["protocol"]) == (False, "val/accuracy", groups[0].digest)
        assert [line[axis] for axis in AXES] == [run.at_end(axis) for axis in AXES]
        times = [run.reached(target, AXIS) for target in groups[0].targets]
        expected = [np.nan if time is None else time for time in times]
        np.testing.assert_array_equal([line[name] for name in reached.values()], expected)


def test_the_note_of_a_study_is_below_the_title(groups: list[Group], tmp_path: Path) -> None:
    write(tmp_path / "report", groups[1:], [], Study(title="A study", note="Five & more."))
    assert "<h1>A study</h1><p>Five &amp; more.</p>" in (tmp_path / "report" / "report.html").read_text()
    assert (tmp_path / "report" / "report.md").read_text().startswith("# A study\n\nFive & more.\n")


def test_a_report_replaces_its_pictures_and_keeps_those_of_a_user(
    groups: list[Group], written: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "report"
    shutil.copytree(written, folder)
    (folder / "pictures" / "user.svg").write_text("kept")
    (folder / "user.txt").write_text("kept")
    before = {picture.name for picture in pictures(folder)}
    write(folder, groups[1:], [], Study(title="A & B"))
    after = {picture.name for picture in pictures(folder)}
    assert after and before - after
    assert {picture.name for picture in (folder / "pictures").iterdir()} == after | {"user.svg"}
    assert {path.name for path in folder.iterdir()} == {*FILES, "pictures", "user.txt"}  # no half-written file is left
    assert (folder / "user.txt").read_text() == "kept"
    assert "no table" not in (folder / "report.html").read_text()


@pytest.mark.parametrize("name", ["pictures/user.png", "runs.csv", "report.md", "thesis.tex"])
def test_a_users_folder_is_refused_and_left_as_it_was(name: str, groups: list[Group], tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("user's text")
    with pytest.raises(ValueError, match="is not empty and has no report: name another folder"):
        write(tmp_path, groups[1:], [], Study(title="A & B"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "user's text"


def test_a_file_in_the_place_of_the_folder_is_refused(groups: list[Group], tmp_path: Path) -> None:
    (tmp_path / "report").write_text("user's text")
    with pytest.raises(ValueError, match="is not a folder"):
        write(tmp_path / "report", groups[1:], [], Study(title="A & B"))
    assert (tmp_path / "report").read_text() == "user's text"


def test_the_summary_has_the_result_of_every_table_and_counts_what_is_in_none(groups: list[Group]) -> None:
    sections = [Section(entry, None, [*headlines(entry, None)], "", [], runs_table(entry), "") for entry in groups]
    problems = [Problem(Path(name), "it has no config.yaml") for name in ("a", "b")]
    lines = summary(sections, problems).splitlines()
    assert lines[0] == f"Modular addition, protocol {groups[0].digest}: 7 runs in 3 rows"
    assert lines[1].startswith("  aga of search has the highest mean of best val/accuracy: ")
    assert lines[2:4] == [
        f"Modular addition, protocol {groups[1].digest}: 1 run in 1 row",
        "  grok_adamw is the only row. val/accuracy: 5.00 %, from one seed.",
    ]
    assert lines[-1] == "2 folders in no table; the report has the reasons"
    assert "table" not in summary(sections, [])


def test_several_studies_are_apart_and_keep_their_own_options(runs: Path, tmp_path: Path) -> None:
    for study, row in (("one", "grok_adamw"), ("two", "grok_aga")):
        shutil.copytree(runs / row, tmp_path / study / row, ignore=shutil.ignore_patterns("*seed42"))
        (tmp_path / study / "study.yaml").write_text(f"title: Study {study}\nlabels: {{{row}: Row of {study}}}\n")
    folders = [tmp_path / "one", tmp_path / "two", runs / "grok_aga"]
    found, problems = read_groups(folders, Study(title="Both"))
    assert problems == []
    assert [(entry.title, [row.label for row in entry.rows]) for entry in found] == [
        ("Study one", ["Row of one"]),
        ("Study two", ["Row of two"]),
        ("Modular addition", ["grok_aga"]),
    ]
    # They have one protocol, and would be one table otherwise.
    assert len({entry.digest for entry in found}) == 1


def test_a_misspelt_name_in_a_study_is_refused(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "grok_aga", tmp_path / "grok_aga")
    for study, message in (
        (
            Study(labels={"grok_agaa": "AGA"}),
            "no row is named grok_agaa, in labels of study.yaml; did you mean grok_aga",
        ),
        (Study(baseline="grok_agaa"), "is named grok_agaa, the --baseline; did you mean grok_aga"),
    ):
        with pytest.raises(ValueError, match=message):
            read_groups([tmp_path], study)


def test_a_folder_without_a_finished_run_is_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no finished run in .*nothing: there is no such folder"):
        read_groups([tmp_path / "nothing"], Study())


def test_trials_alone_are_reported_without_a_winner(groups: list[Group], tmp_path: Path) -> None:
    only_trials = replace(groups[0], rows=[])
    (section,) = write(tmp_path / "report", [only_trials], [], Study())
    assert section.headlines == ["There are only trials of searches, and no row."]
    text = (tmp_path / "report" / "report.html").read_text()
    assert "Tuning budget of search" in text and "Runs, and the command" not in text


def test_a_report_that_was_not_written_to_its_end_can_be_written_again(
    groups: list[Group], written: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "report"
    shutil.copytree(written, folder)
    (folder / "runs.csv").unlink()
    (folder / "report.tex").unlink()
    write(folder, groups[1:], [], Study())
    assert (folder / "runs.csv").is_file()
    for name in FILES:
        (folder / name).unlink()
    write(folder, groups[1:], [], Study())  # pictures alone were written
    # A page of someone else is kept.
    for name in FILES:
        (folder / name).unlink()
    (folder / "report.html").write_text("<p>mine</p>")
    with pytest.raises(ValueError, match="is not empty and has no report"):
        write(folder, groups[1:], [], Study())
    assert (folder / "report.html").read_text() == "<p>mine</p>"
