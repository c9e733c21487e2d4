"""Test that the budget and the luck of a search are those of its trials."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from analysis.comparison import baseline
from analysis.rows import Group, Row, group
from analysis.runs import read
from analysis.tables import number
from analysis.tuning_budget import first_runs, luck, options_of, searched_rows, searches_luck, tuning_budgets
from experiment.target import Target
from tests.analysis.runs import copy, cut, repeated


@pytest.fixture(scope="module")
def reference(groups: list[Group]) -> Row:
    found = baseline(groups[0], None)
    assert found is not None and found.optimizer == "adamw"
    return found


def test_the_tuning_budget_counts_every_trial_and_flags_unequal_budgets(
    groups: list[Group], runs: Path, tmp_path: Path
) -> None:
    (budget,) = tuning_budgets(groups[0])
    assert list(budget.columns)[:5] == ["row", "runs of trials", "ended", "interrupted", "diverged or failed"]
    assert [line[:5] for line in budget.rows] == [["adamw", "3", "3", "0", "0"], ["aga of search", "2", "2", "0", "0"]]
    assert budget.notes[1:] == [
        "UNEQUAL BUDGETS: from 2 trials (aga of search) to 3 (adamw); the winners of this search are not comparable."
    ]
    costs = {
        path: pd.read_csv(path / "metrics.csv")["cost/gradient_evaluations"].max()
        for path in (runs / "search").iterdir()
    }
    winner = next(row for row in groups[0].rows if row.label == "aga of search")
    assert winner.trials == 2
    # It is in the same folder, and no trial.
    assert costs.pop(winner.any.shown) and len(costs) == 5
    assert sum(float(line[5]) for line in budget.rows) == sum(costs.values())
    # A third trial of AGA without readable files makes the budgets equal; an unfinished one counts too.
    trial = next(run.shown for run in groups[0].sweeps["search", "aga"])
    folder = copy(trial, tmp_path, "lost")
    config = folder / "config.yaml"
    config.write_text(re.sub(r"trial: \d", "trial: 7", config.read_text()))
    (folder / "metrics.csv").unlink()
    found, problems = read([runs, tmp_path])
    (budget,) = tuning_budgets(max(group(found, problems), key=lambda entry: len(entry.rows)))
    assert budget.rows[1][:5] == ["aga of search", "3", "2", "0", "1"] and len(budget.notes) == 1
    short = copy(trial, tmp_path, "short")
    config = short / "config.yaml"
    config.write_text(re.sub(r"trial: \d", "trial: 8", config.read_text()))
    cut(short, 10)
    found, problems = read([runs, tmp_path])
    (budget,) = tuning_budgets(max(group(found, problems), key=lambda entry: len(entry.rows)))
    assert [line[:5] for line in budget.rows] == [["adamw", "3", "3", "0", "0"], ["aga of search", "4", "2", "1", "1"]]
    assert "from 3 trials (adamw) to 4 (aga of search)" in budget.notes[1]


def test_equal_budgets_are_not_flagged(groups: list[Group]) -> None:
    entry = groups[0]
    equal = replace(entry, sweeps={key: trials[:2] for key, trials in entry.sweeps.items()})
    (budget,) = tuning_budgets(equal)
    assert not any("UNEQUAL" in note for note in budget.notes)


def test_a_row_that_has_only_trials_is_shown_by_its_label(runs: Path, reference: Row) -> None:
    labels = {"adamw": "AdamW, searched", "aga of search": "AGA"}
    entry = max(group(read([runs])[0], labels=labels), key=lambda entry: len(entry.rows))
    (budget,), (lucky,) = tuning_budgets(entry), searches_luck(entry, reference)
    assert [line[0] for line in budget.rows] == [line[0] for line in lucky.rows] == ["AdamW, searched", "AGA"]
    assert [*searched_rows(entry, "search")] == ["AGA", "AdamW, searched"]


def test_the_best_of_trials_that_are_drawn_again_has_a_known_distribution() -> None:
    # Every draw of equal trials is the same, and rows count together: the best of two policies.
    assert vars(luck([[3.0, 3.0], [2.0]], [[4.0] * 8])) == {"n": 3, "mean": 0.5, "low": 0.5, "high": 0.5}
    # One of 32 is missing from (31/32)^32 = 36 % of the draws, which then have the second best or none at all.
    only, second = [100.0, *[math.inf] * 31], [100.0, 300.0, *[400.0] * 30]
    assert vars(luck([only], [[200.0]])) == {"n": 32, "mean": 0.5, "low": 0.5, "high": math.inf}
    assert vars(luck([second], [[200.0]])) == {"n": 32, "mean": 0.5, "low": 0.5, "high": 2.0}
    # Of eight, both of the best two are missing from (6/8)^8 = 10 % of the draws; of a higher-is-better metric too.
    assert vars(luck([[0.9, 0.8, *[0.6] * 6]], [[0.5]], lower=False)) == {"n": 8, "mean": 1.8, "low": 1.2, "high": 1.8}


def test_the_luck_of_a_search_is_of_its_best_trials(groups: list[Group], reference: Row) -> None:
    entry = replace(groups[0], targets=[])
    (table,) = searches_luck(entry, reference)
    best = {
        name: max(run.best("val/accuracy", False) for run in entry.sweeps["search", name]) for name in ("adamw", "aga")
    }
    adamw, aga = table.rows
    assert (adamw[0], adamw[1], adamw[3]) == ("adamw", "3", "1") and aga[:2] == ["aga of search", "2"]
    assert aga[3].startswith(f"{number(best['aga'] / best['adamw'], 4)} [")
    # A trial that ran again on another seed is still one trial, and its first run counts.
    own = entry.sweeps["search", "adamw"]
    again = [repeated(run, 9, {"val/accuracy": 0.99}) for run in own]
    both = {**entry.sweeps, ("search", "adamw"): [*own, *again]}
    (same,) = searches_luck(replace(entry, sweeps=both), reference)
    assert same.rows == table.rows
    assert first_runs(both["search", "adamw"]) == list(reversed(own))
    # The budget counts its runs.
    (budget,) = tuning_budgets(replace(entry, sweeps=both))
    assert [line[1:3] for line in budget.rows] == [["6", "6"], ["2", "2"]]
    (other,) = searches_luck(replace(entry, sweeps={**entry.sweeps, ("search", "adamw"): again}), reference)
    assert other.rows != table.rows
    never = replace(entry, targets=[Target("never", "train/loss", 0.0, lower=True)], borrowed=False)
    (nothing,) = searches_luck(never, reference)
    assert [line[2:] for line in nothing.rows] == [["-", "1"], ["-", "-"]]


def test_the_luck_of_losses_is_of_their_exponentials_with_four_digits(groups: list[Group], reference: Row) -> None:
    by_loss = replace(groups[0], targets=[], metric="val/loss", lower=True)
    losses = {
        name: sorted(pd.read_csv(run.shown / "metrics.csv")["val/loss"].min() for run in by_loss.sweeps["search", name])
        for name in ("adamw", "aga")
    }
    (table,) = searches_luck(by_loss, reference)
    assert table.notes[0].startswith("Best exp(val/loss) of single trials.")
    adamw, aga = table.rows
    for line, name in ((adamw, "adamw"), (aga, "aga")):
        assert line[2] == ", ".join(number(math.exp(loss)) for loss in losses[name])
    # A ratio of perplexities, and not of losses. Of the draws, 18 % have AGA's worse trial alone and AdamW's best one.
    ratio, high = (number(math.exp(loss - losses["adamw"][0]), 4) for loss in losses["aga"])
    assert aga[3].startswith(f"{ratio} [") and aga[3].endswith(f", {high}]")
    # A level of the loss is reached in gradient evaluations, which have ratios.
    level = Target("any", "train/loss", 100.0, lower=True)
    (table,) = searches_luck(replace(by_loss, targets=[level], borrowed=False), reference)
    assert table.notes[0].startswith("Gradient evaluations to train/loss < 100 of single trials.")
    assert table.rows[0][2] == "2, 2, 2"


def test_single_trials_are_stated_settings_and_have_no_luck(groups: list[Group], reference: Row) -> None:
    single = {key: trials[:1] for key, trials in groups[0].sweeps.items()}
    # One that ran again on further seeds is single too.
    again = {key: [*trials, repeated(trials[0], 9, {})] for key, trials in single.items()}
    for sweeps in (single, again):
        assert list(searches_luck(replace(groups[0], targets=[], sweeps=sweeps), reference)) == []
    some = {**single, ("search", "aga"): groups[0].sweeps["search", "aga"]}
    (table,) = searches_luck(replace(groups[0], targets=[], sweeps=some), reference)
    assert [line[1] for line in table.rows] == ["1", "2"]


def test_rows_of_a_search_count_together_only_where_the_study_says_so(groups: list[Group], reference: Row) -> None:
    adamw, aga = (groups[0].sweeps["search", name] for name in ("adamw", "aga"))
    # The second row has the optimizer of the first, as with another policy, but runs of its own.
    sweeps = {("search", "adamw"): adamw[:1], ("search", "adamw_other"): adamw[1:], ("search", "aga"): aga}
    entry = replace(groups[0], targets=[], sweeps=sweeps)
    (apart,) = searches_luck(entry, reference)
    assert [line[:2] for line in apart.rows] == [["adamw", "1"], ["adamw_other", "2"], ["aga of search", "2"]]
    assert apart.rows[0][3] == "1" and "[" in apart.rows[1][3]
    (together,) = searches_luck(replace(entry, families={"AdamW": ["adamw", "adamw_other"]}), reference)
    (as_one,) = searches_luck(replace(groups[0], targets=[]), reference)
    assert together.rows[0] == ["AdamW", *as_one.rows[0][1:]]
    assert together.columns[-1] == "ratio of the best to AdamW"
    assert together.rows[1][3].split(" [")[0] == as_one.rows[1][3].split(" [")[0]


def test_the_reference_of_a_search_is_its_own_row_where_that_is_the_baseline(groups: list[Group]) -> None:
    (winner,) = [row for row in groups[0].rows if row.search is not None]
    trials = groups[0].sweeps["search", "aga"]
    # The other row has the same optimizer, and comes before.
    sweeps = {("search", "other"): trials, ("search", "aga"): list(reversed(trials))}
    (table,) = searches_luck(replace(groups[0], targets=[], sweeps=sweeps), winner)
    assert table.columns[-1] == "ratio of the best to aga of search"
    assert [line[0] for line in table.rows if line[3] == "1"] == ["aga of search"]
    # A baseline of another search is represented by the first row with its optimizer.
    elsewhere = {("else", name): trials for (_, name), trials in sweeps.items()}
    (table,) = searches_luck(replace(groups[0], targets=[], sweeps=elsewhere), winner)
    assert table.columns[-1] == "ratio of the best to other"


def test_the_trials_of_a_search_are_in_the_order_in_which_they_ran(groups: list[Group]) -> None:
    sweeps = {key: list(reversed(trials)) for key, trials in groups[0].sweeps.items()}
    again = repeated(sweeps["search", "adamw"][0], 9, {})
    sweeps["search", "adamw"].append(again)
    found = searched_rows(replace(groups[0], sweeps=sweeps), "search")
    # Rows that have a winner come first, in its style; a second seed of a trial is none.
    assert [*found] == ["aga of search", "adamw"]
    trials = {label: [run.identity.options["model.optimizer.lr"] for run in row] for label, (row, _) in found.items()}
    assert trials == {"aga of search": [0.001, 0.01], "adamw": [0.003, 0.01, 0.03]}
    assert again not in found["adamw"][0]
    (winner,) = [row for row in groups[0].rows if row.search is not None]
    assert found["aga of search"][1] == winner.style


def test_the_rows_of_a_family_that_have_only_trials_share_the_colour_of_its_winner(groups: list[Group]) -> None:
    entry = replace(groups[0], families={"both": ["adamw", "aga"]})
    found = {label: style for label, (_, style) in searched_rows(entry, "search").items()}
    assert found["adamw"].colour == found["aga of search"].colour
    assert found["adamw"].dash != found["aga of search"].dash


def test_options_of_interest_are_rates_decays_and_the_radius_that_were_varied(groups: list[Group]) -> None:
    first, second = (repeated(run, 0, {}) for run in groups[0].sweeps["search", "aga"])
    assert options_of([first, second]) == ["model.optimizer.lr"]
    assert options_of([first, first]) == []
    second.identity.options |= {"model.optimizer.rho": 0.5, "model.optimizer.weight_decay": 0.9, "model.optimizer.k": 3}
    assert sorted(options_of([first, second])) == [f"model.optimizer.{key}" for key in ("lr", "rho", "weight_decay")]


def test_a_row_that_has_only_trials_has_a_style_of_its_own(groups: list[Group]) -> None:
    (adamw, own), (_, winner) = sorted(
        ((label, style) for label, (_, style) in searched_rows(groups[0], "search").items()), key=lambda pair: pair[0]
    )
    assert adamw == "adamw" and winner == groups[0].rows[[r.label for r in groups[0].rows].index("aga of search")].style
    assert all(own != row.style for row in groups[0].rows)
