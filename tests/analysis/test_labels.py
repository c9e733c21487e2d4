"""Test that rows are named briefly, and no two alike."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from analysis.comparison import baseline
from analysis.labels import nearest, short_names, value_text
from analysis.results import results
from analysis.rows import Group, Row, group
from analysis.runs import Run, read
from analysis.settings import settings
from experiment.identity import Sweep
from tests.analysis.runs import unpack


def changed(run: Run, options: Mapping[str, object]) -> Run:
    """Read a run again as one with other options of its optimizer."""
    found = Run(run.folder)
    found.identity.options |= {f"model.optimizer.{key}": value for key, value in options.items()}
    return found


@pytest.fixture(scope="module")
def run(groups: list[Group]) -> Run:
    (row,) = [row for row in groups[0].rows if row.label == "grok_aga"]
    return row.any


def rows_of(*runs: Run, labels: Mapping[str, str] | None = None) -> list[Row]:
    (entry,) = group(runs, labels=labels)
    return entry.rows


def test_settings_of_one_name_are_distinguished(tmp_path: Path) -> None:
    runs = read([unpack("settings", tmp_path)])[0]
    for labels, label in (({}, "grok_aga"), ({"grok_aga": "AGA"}, "AGA")):
        found = {row.label for row in rows_of(*runs, labels=labels)}
        assert found == {f"{label}, lr 0.001", f"{label}, lr 0.002"}


@pytest.mark.parametrize(("characters", "numbered"), [(32, False), (33, True)])
def test_rows_whose_options_are_too_long_for_a_label_are_numbered(characters: int, numbered: bool, run: Run) -> None:
    options = "ns_coefficients ".ljust(characters, "x").split()[1]
    rows = rows_of(run, changed(run, {"ns_coefficients": options}))
    given = {"grok_aga, ns_coefficients jordan", f"grok_aga, ns_coefficients {options}"}
    assert {row.label for row in rows} == ({"grok_aga, setting 1", "grok_aga, setting 2"} if numbered else given)


def test_the_table_of_settings_has_the_options_of_numbered_rows(run: Run) -> None:
    other = changed(run, {"lr": 0.0025, "rho": 0.05, "phi_lambda": 0.2, "k": 5})
    rows = rows_of(run, other)
    assert {row.label for row in rows} == {"grok_aga, setting 1", "grok_aga, setting 2"}
    (entry,) = group([run, other])
    table = settings(entry)
    assert table is not None
    lines = {line[0]: dict(zip(table.columns, line, strict=True)) for line in table.rows}
    # Numbers are in the order of the runs.
    assert lines["grok_aga, setting 2"] == {
        "row": "grok_aga, setting 2",
        "name of its runs": "grok_aga",
        "lr": "0.0025",
        "rho": "0.05",
        "phi_lambda": "0.2",
        "k": "5",
    }
    assert lines["grok_aga, setting 1"]["lr"] == "0.001"


def test_rows_of_one_label_and_one_setting_are_numbered(run: Run) -> None:
    winners = [changed(run, {}) for _ in range(2)]
    for winner, search in zip(winners, ("first", "second"), strict=True):
        winner.identity.sweep = Sweep(search, "aga")
    assert {row.label for row in rows_of(*winners)} == {"aga of first", "aga of second"}
    labels = {"aga of first": "AGA", "aga of second": "AGA"}
    assert {row.label for row in rows_of(*winners, labels=labels)} == {"AGA, setting 1", "AGA, setting 2"}


def test_optimizers_of_one_label_are_distinguished_by_their_class_and_then_by_their_options(run: Run) -> None:
    others = [changed(run, {"lr": 0.5}), changed(run, {})]
    others[1].identity.options["model.optimizer"] = "elsewhere.Other"
    found = {row.label for row in rows_of(run, *others)}
    assert found == {"grok_aga, ARS2Neo, lr 0.001", "grok_aga, ARS2Neo, lr 0.5", "grok_aga, Other"}
    # Classes of the same name are in different packages.
    others[1].identity.options["model.optimizer"] = "elsewhere.ARS2Neo"
    found = {row.label for row in rows_of(run, others[1])}
    assert found == {"grok_aga, ars2.ARS2Neo", "grok_aga, elsewhere.ARS2Neo"}


def test_rows_that_differ_in_callbacks_are_named_by_the_classes_of_those_that_not_all_have(run: Run) -> None:
    def with_callbacks(*more: dict[str, object]) -> Run:
        found = changed(run, {})
        found.identity.options["trainer.callbacks"] = [*run.identity.options["trainer.callbacks"], *more]
        return found

    def budget(evaluations: int) -> dict[str, object]:
        options = {"gradient_evaluations": evaluations}
        return {"class_path": "callbacks.evaluation_budget.EvaluationBudget", "init_args": options}

    stop = {"class_path": "lightning.pytorch.callbacks.EarlyStopping"}
    # Those of the run itself, which all have, are in no label.
    assert run.identity.options["trainer.callbacks"]
    both, one = with_callbacks(stop, budget(9)), with_callbacks(budget(9))
    assert {row.label for row in rows_of(run, one)} == {"grok_aga", "grok_aga, EvaluationBudget"}
    assert {row.label for row in rows_of(both, one)} == {"grok_aga", "grok_aga, EarlyStopping"}
    assert {row.label for row in rows_of(run, both)} == {"grok_aga", "grok_aga, EarlyStopping, EvaluationBudget"}
    # Other options of one class do not tell rows apart, and are in the table of settings.
    rows = rows_of(with_callbacks(budget(8)), one)
    assert {row.label for row in rows} == {"grok_aga, setting 1", "grok_aga, setting 2"}
    # Beside a callback there may be another option.
    other = changed(one, {"lr": 0.5})
    other.identity.options["trainer.callbacks"] = one.identity.options["trainer.callbacks"]
    found = {row.label for row in rows_of(run, other)}
    assert found == {"grok_aga, lr 0.001", "grok_aga, EvaluationBudget, lr 0.5"}


def test_an_option_is_named_by_as_much_as_tells_it_from_others() -> None:
    assert short_names(["matrix.lr", "vector.lr", "model.rho"]) == {
        "matrix.lr": "matrix.lr",
        "vector.lr": "vector.lr",
        "model.rho": "rho",
    }
    assert short_names(["lr", "model.matrix.lr"]) == {"lr": "lr", "model.matrix.lr": "matrix.lr"}


def test_callbacks_are_named_by_their_class_and_options() -> None:
    budget = {"class_path": "callbacks.evaluation_budget.EvaluationBudget", "init_args": {"gradient_evaluations": 9}}
    stop = {"class_path": "lightning.pytorch.callbacks.EarlyStopping"}
    assert value_text([stop, budget]) == "EarlyStopping and EvaluationBudget (gradient_evaluations 9)"
    assert (value_text([0.9, 0.95]), value_text(None)) == ("[0.9, 0.95]", "None")


def test_the_nearest_name_is_asked_for_where_there_is_one() -> None:
    assert nearest("adanw", ["muon", "adamw"]) == "; did you mean adamw?"
    assert nearest("adanw", []) == ""


def test_a_study_names_its_rows(runs: Path) -> None:
    found, _ = read([runs])
    named = max(group(found, labels={"grok_adamw": "AdamW", "grok_aga": "AGA"}), key=lambda entry: len(entry.rows))
    assert {row.label for row in named.rows} == {"AdamW", "AGA", "aga of search"}
    for wanted in ("AdamW", "grok_adamw", "adamw"):
        reference = baseline(named, wanted)
        assert reference is not None and reference.label == "AdamW"
    assert [line[0] for line in results(named).rows] == [row.label for row in named.rows]


def test_rows_of_one_search_alone_are_called_by_their_name_there(corners: Path) -> None:
    (entry,) = group(read([corners])[0])
    assert "base true true" in {row.label for row in entry.rows}
