"""Test that the protocol in words is that of the configs."""

from dataclasses import replace

import numpy as np
import pytest

from analysis.protocol import protocol_words
from analysis.rows import AXIS, Group
from analysis.runs import Run
from tests.analysis.runs import EPOCHS, HALF, ranked, repeated, timed, valued

BUDGET = "callbacks.evaluation_budget.EvaluationBudget"


def test_the_protocol_is_that_of_the_configs(groups: list[Group]) -> None:
    assert protocol_words(groups[0]) == (
        "Every run trains ModularAddition (p 7, width 8, heads 2, mlp width 16) on ModularAdditionData (p 7, train "
        "fraction 0.3, batch size 8, val batch size 4,096). It is validated every epoch. It lasts at most 6 epochs. "
        "Runs made 12 to 21 gradient evaluations. Rows have 1 to 3 seeds, and settings from 0 to 2 trials each."
    )
    ends = [run.at_end("cost/gradient_evaluations") for row in groups[0].rows for run in row.runs.values()]
    assert (min(map(float, filter(None, ends))), max(map(float, filter(None, ends)))) == (12, 21)
    assert protocol_words(groups[1]).endswith(
        "Runs made 24 gradient evaluations. Rows have 1 seed, and settings that were not searched here."
    )


def test_the_protocol_says_how_often_and_on_how_much_is_validated(groups: list[Group]) -> None:
    row = replace(groups[1].rows[0], runs={"0": repeated(groups[1].rows[0].any, 0, {})})
    row.any.identity.options |= {
        "trainer.check_val_every_n_epoch": 2,
        "trainer.limit_train_batches": 20,
        "trainer.limit_val_batches": 30,
    }
    words = "It is validated every 2 epochs; an epoch has 20 batches and a validation has 30 batches. It lasts"
    assert words in protocol_words(replace(groups[1], rows=[row]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        # An integer is a number of batches, and a float a share.
        ({"limit_train_batches": 1}, "every epoch; an epoch has 1 batch."),
        ({"limit_train_batches": 0.25}, "every epoch; an epoch has 25 % of all batches."),
        (
            {"limit_train_batches": 1.0, "limit_val_batches": 0.25},
            "every epoch; a validation has 25 % of all batches.",
        ),
        (
            {"limit_train_batches": 1500, "limit_val_batches": 0.5},
            "every epoch; an epoch has 1,500 batches and a validation has 50 % of all batches.",
        ),
        ({"val_check_interval": 50, "check_val_every_n_epoch": None}, "every 50 batches."),
        ({"val_check_interval": 0.5}, "every 0.5 epochs."),
    ],
)
def test_batches_and_shares_are_told_apart(options: dict[str, float], words: str, groups: list[Group]) -> None:
    row = replace(groups[1].rows[0], runs={"0": repeated(groups[1].rows[0].any, 0, {})})
    row.any.identity.options |= {f"trainer.{name}": value for name, value in options.items()}
    assert f"It is validated {words} It lasts" in protocol_words(replace(groups[1], rows=[row]))


def test_the_protocol_says_how_long_runs_are_and_what_ends_them(groups: list[Group], run: Run) -> None:
    row = timed(run, "some", [10, 20])
    entry = ranked(groups[0], [row], [HALF])
    assert f"It lasts at most {EPOCHS} epochs. Runs made 10 to 20 gradient" in protocol_words(entry)
    row.runs["0"].identity.options["trainer.max_epochs"] = 12
    row.runs["0"].log["milestone/full"] = np.full(len(run.log["epoch"]), 6.0)
    assert "It lasts at most 6 to 12 epochs, by row, and ends when it reaches full. " in protocol_words(entry)
    row.runs["0"].identity.options |= {"trainer.max_epochs": -1, "trainer.max_steps": 40}
    assert "It lasts at most 40 steps or 6 epochs, by row, and " in protocol_words(entry)
    row.runs["2"] = repeated(run, 2, {AXIS: 20})
    row.runs["2"].identity.options["trainer.max_epochs"] = 12
    assert "It lasts at most 40 steps or 6 to 12 epochs, by row, and " in protocol_words(entry)
    # A milestone that is a target is shown as its level.
    entry = replace(entry, targets=groups[0].targets)
    assert "and ends when it reaches val/accuracy >= 0.99. " in protocol_words(entry)


def test_a_budget_of_evaluations_is_the_length_of_its_runs(groups: list[Group], run: Run) -> None:
    row = timed(run, "some", [10, 20, 20])

    def give(seed: str, evaluations: int) -> None:
        budget = {"class_path": BUDGET, "init_args": {"gradient_evaluations": evaluations}}
        options = row.runs[seed].identity.options
        options["trainer.callbacks"] = [*(options["trainer.callbacks"] or []), budget]

    entry = ranked(groups[0], [row], [HALF])
    for seed in row.runs:
        give(seed, 800)
    assert "It lasts at most 800 gradient evaluations. Runs made 10 to 20 " in protocol_words(entry)
    give("1", 90)
    assert "It lasts at most 90 to 800 gradient evaluations, by row. Runs" in protocol_words(entry)
    row.runs["2"] = repeated(run, 2, {AXIS: 20})
    assert "It lasts at most 6 epochs or 90 to 800 gradient evaluations, by row. Runs" in protocol_words(entry)


def test_the_protocol_says_which_checkpoint_was_tested(groups: list[Group], run: Run) -> None:
    entry = ranked(groups[0], [valued(run, "tested", [0.5], "test/accuracy")])
    assert ". The checkpoint with the best val/accuracy was tested. Rows have 1 seed" in protocol_words(entry)
    assert "tested" not in protocol_words(groups[0])
