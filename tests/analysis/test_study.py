"""Test that a study has the options of its file, and names rows that exist."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from analysis.report import read_groups
from analysis.rows import Group, group
from analysis.runs import read
from analysis.study import Study
from experiment.target import Target
from tests.analysis.runs import copy, cut, unpack
from tests.analysis.test_compare import compare

LABELS = ("AGA", "AdamW, a control")

FILE = """
title: Published & measured
baseline: adamw
targets: [train/loss < 0.5, val/accuracy >= 0.9]
labels: {grok_aga: AGA}
families: {AGA: [aga, aga_hidden]}
note: >
  Three seeds,
  and more.
"""
TARGETS = tuple(map(Target.parse, ("train/loss < 0.5", "val/accuracy >= 0.9")))


def test_a_study_is_read_from_the_file_of_a_single_folder(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(FILE)
    expected = Study("Published & measured", "adamw", TARGETS, {"grok_aga": "AGA"}, {"AGA": ["aga", "aga_hidden"]})
    found = Study.of([tmp_path])
    assert replace(found, also=()) == replace(expected, note="Three seeds, and more.") and not found.also
    (tmp_path / "study.yaml").write_text("")
    found = Study.of([tmp_path])
    assert replace(found, also=()) == Study() and not found.also
    assert Study.of([tmp_path / "elsewhere"]) == Study()


def test_the_labels_and_families_of_further_folders_are_merged_and_its_own_count(tmp_path: Path) -> None:
    stated = {
        "main": "title: Main\nlabels: {a: Own, b: B}\nfamilies: {A: [a, a_short]}\nalso: [../first, ../second]",
        "first": "title: First\nbaseline: c\nnote: Other.\nlabels: {a: Other, c: C}\nfamilies: {C: [c, c_short]}",
        "second": "labels: {c: Later, d: D}\nfamilies: {A: [other], D: [d]}",
    }
    for name, text in stated.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "study.yaml").write_text(text)
    study = Study.of([tmp_path / "main"])
    assert [path.resolve() for path in study.also] == [tmp_path / "first", tmp_path / "second"]
    assert study.labels == {"a": "Own", "b": "B", "c": "Later", "d": "D"}
    assert study.families == {"A": ["a", "a_short"], "C": ["c", "c_short"], "D": ["d"]}
    # Everything else is the study's own.
    assert (study.title, study.baseline, study.note) == ("Main", None, "")
    # The command line keeps them.
    assert study.overridden("Other", None, ()).also == study.also
    # A folder without such a file only has runs.
    (tmp_path / "first" / "study.yaml").unlink()
    assert Study.of([tmp_path / "main"]).labels == {"a": "Own", "b": "B", "c": "Later", "d": "D"}


def test_runs_of_further_folders_are_rows_of_the_same_table(runs: Path, tmp_path: Path) -> None:
    for study, row, label in (("main", "grok_aga", "AGA"), ("controls", "grok_adamw", "AdamW, a control")):
        shutil.copytree(runs / row, tmp_path / study / row, ignore=shutil.ignore_patterns("*seed42"))
        (tmp_path / study / "study.yaml").write_text(f'title: {study}\nlabels: {{{row}: "{label}"}}\n')
    alone, _ = read_groups([tmp_path / "main"], Study.of([tmp_path / "main"]))
    assert [[row.label for row in entry.rows] for entry in alone] == [["AGA"]]
    file = tmp_path / "main" / "study.yaml"
    file.write_text(file.read_text() + "also: [../controls]\nbaseline: AdamW, a control\n")
    (entry,), problems = read_groups([tmp_path / "main"], Study.of([tmp_path / "main"]))
    assert problems == []
    assert {row.label: sorted(row.runs) for row in entry.rows} == {label: ["0", "1", "2"] for label in LABELS}
    # Also as one of several studies, each of which is apart.
    several, _ = read_groups([tmp_path / "main", runs / "search"], Study())
    assert [{row.label for row in entry.rows} for entry in several] == [set(LABELS), {"aga"}]
    # And as the command has it.
    result = compare(tmp_path / "main", "--output", tmp_path / "out")
    assert (result.code, "6 runs in 2 rows" in result.out) == (0, True), result.err
    assert "against AdamW, a control" in (tmp_path / "out" / "report.md").read_text()


def test_a_further_folder_that_is_not_there_is_listed(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "grok_aga", tmp_path / "grok_aga")
    (tmp_path / "study.yaml").write_text("also: [nowhere]\n")
    (entry,), (problem,) = read_groups([tmp_path], Study.of([tmp_path]))
    assert [row.label for row in entry.rows] == ["grok_aga"]
    assert (problem.folder, problem.reason) == (tmp_path / "nowhere", "there is no such folder")


def test_rows_of_two_searches_keep_their_short_names_where_these_differ(corners: Path, tmp_path: Path) -> None:
    names = ["base true true", "base false true", "sync true true"]
    of_search = {"first": names[:2], "second": names[2:]}
    folders = {folder: yaml.safe_load((folder / "config.yaml").read_text())["sweep"] for folder in corners.glob("*/*")}

    def copies(search: str, row: str, as_row: str) -> None:
        for folder in (folder for folder, sweep in folders.items() if sweep["optimizer"] == row):
            shutil.copytree(folder, tmp_path / search / as_row / folder.name)
            config = tmp_path / search / as_row / folder.name / "config.yaml"
            content = yaml.safe_load(config.read_text())
            content["sweep"] |= {"name": search, "optimizer": as_row}
            config.write_text(yaml.safe_dump(content))

    for search, rows in of_search.items():
        for row in rows:
            copies(search, row, row)
    (tmp_path / "first" / "study.yaml").write_text("also: [../second]\nlabels: {base true true: Base}\n")
    (tmp_path / "second" / "study.yaml").write_text("labels: {sync true true: Sync}\n")
    study = Study.of([tmp_path / "first"])
    (entry,), _ = read_groups([tmp_path / "first"], study)
    assert {row.label: len(row.runs) for row in entry.rows} == {"Base": 2, "base false true": 2, "Sync": 2}
    assert {row.search for row in entry.rows} == {(search, row) for search, rows in of_search.items() for row in rows}
    # A name that both searches have is ambiguous, and is told from the other; the others stay short.
    copies("second", "sync false true", "base false true")
    (entry,), _ = read_groups([tmp_path / "first"], study)
    assert {row.label for row in entry.rows} == {
        *("Base", "Sync", "base false true of first", "base false true of second"),
    }


def test_the_command_line_replaces_only_what_it_gives() -> None:
    study = Study("Title", "adamw", TARGETS, note="Note.")
    assert study.overridden(None, None, ()) == study
    given = [Target.parse("val/loss < 1")]
    assert study.overridden("Other", "muon", given) == Study("Other", "muon", given, note="Note.")


def test_labels_and_families_of_rows_that_exist_are_accepted(groups: list[Group]) -> None:
    # A row that has only trials has a name too, and a label.
    labels = {"grok_aga": "AGA", "aga of search": "Winner", "adamw": "AdamW"}
    Study(labels=labels, families={"both": ["adamw", "aga"]}).check_rows(groups)
    Study(labels={"grok_adamw": "AdamW"}).check_rows(groups[1:])


@pytest.mark.parametrize(
    ("study", "message"),
    [
        (
            Study(labels={"grok_agaa": "AGA"}),
            "no row is named grok_agaa, in labels of study.yaml; did you mean grok_aga?",
        ),
        (Study(families={"AdamW": ["adamv"]}), "no row is named adamv, in families of study.yaml; did you mean adamw?"),
        # A family is one of rows of a search.
        (
            Study(families={"AGA": ["grok_aga"]}),
            "no row is named grok_aga, in families of study.yaml; did you mean aga?",
        ),
    ],
)
def test_a_misspelt_row_is_refused_with_the_nearest_name(study: Study, message: str, groups: list[Group]) -> None:
    with pytest.raises(ValueError) as raised:
        study.check_rows(groups)
    assert str(raised.value) == message


def test_a_family_is_refused_where_nothing_was_searched(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no row is named aga, in families of study\.yaml$"):
        Study(families={"AGA": ["aga"]}).check_rows(group(read([unpack("settings", tmp_path)])[0]))


def test_the_label_of_an_unfinished_run_is_known(runs: Path, tmp_path: Path) -> None:
    folder = copy(min((runs / "grok_aga").iterdir()), tmp_path, "short")
    cut(folder, 4)
    (found,) = group(read([tmp_path], unfinished=True)[0], labels={"grok_aga": "AGA"})
    assert found.rows[0].label.startswith("AGA, ")
    Study(labels={"grok_aga": "AGA"}).check_rows([found])


def test_folders_that_name_each_other_are_read_once(tmp_path: Path) -> None:
    for name, other in (("one", "other"), ("other", "one")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "study.yaml").write_text(f"labels: {{{name}: Row {name}}}\nalso: [../{other}]\n")
    found = Study.of([tmp_path / "one"])
    assert found.labels == {"one": "Row one", "other": "Row other"}
    assert [folder.resolve() for folder in found.also] == [tmp_path / "other"]
