"""Test that a study has the options of its file, and names rows that exist."""

from dataclasses import replace
from pathlib import Path

import pytest

from analysis.rows import Group, group
from analysis.runs import read
from analysis.study import Study
from experiment.target import Target
from tests.analysis.runs import copy, cut, unpack

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
    assert Study.of([tmp_path]) == replace(expected, note="Three seeds, and more.")
    (tmp_path / "study.yaml").write_text("")
    assert Study.of([tmp_path]) == Study()
    assert Study.of([tmp_path / "elsewhere"]) == Study()


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
