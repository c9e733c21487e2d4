import json
from pathlib import Path

import pytest

from callbacks.evaluation_budget import EvaluationBudget
from tests.helpers.commands import TINY, fit, metrics
from tests.helpers.marks import slow

SELDOM = ("--trainer.check_val_every_n_epoch", "5")  # the runs end in epochs without validation


def last_validated(folder: Path) -> float:
    """Return the last step that was validated."""
    return float([line for line in metrics(folder) if "val/loss" in line][-1]["cost/optimizer_steps"])


@pytest.mark.parametrize(("row", "per_step"), [slow("adamw", 1), ("sync", 2)])
def test_a_run_stops_after_the_epoch_in_which_the_budget_is_spent(row: str, per_step: int, tmp_path: Path) -> None:
    budget = "callbacks.evaluation_budget.EvaluationBudget"
    options = [*TINY, "--trainer.max_epochs", "9", *SELDOM, "--trainer.callbacks+", budget]
    folder = fit(
        tmp_path, "--config", f"configs/grok_{row}.yaml", *options, "--trainer.callbacks.gradient_evaluations", "7"
    )
    costs = json.loads((folder / "summary.json").read_text())["costs"]
    # 14 training pairs in batches of 8: two steps an epoch.
    epochs = -(-7 // (2 * per_step))
    assert costs["gradient_evaluations"] == 2 * per_step * epochs >= 7
    assert last_validated(folder) == 2 * epochs


@pytest.mark.parametrize(("row", "steps"), [slow("adamw", 7), ("sync", 4)])
def test_a_run_may_stop_with_the_step_in_which_the_budget_is_spent(row: str, steps: int, tmp_path: Path) -> None:
    init_args = {"gradient_evaluations": 7, "finish_epoch": False}
    callback = {"class_path": "callbacks.evaluation_budget.EvaluationBudget", "init_args": init_args}
    # 4 steps an epoch: one of the runs ends in the middle of one.
    options = [
        *TINY,
        *SELDOM,
        "--data.batch_size",
        "4",
        "--trainer.max_epochs",
        "9",
        "--trainer.callbacks+",
        json.dumps([callback]),
    ]
    folder = fit(tmp_path, "--config", f"configs/grok_{row}.yaml", *options)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["costs"]["optimizer_steps"] == steps
    assert summary["epochs"] == (2 if row == "adamw" else 1)
    assert last_validated(folder) == steps


def test_a_budget_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="gradient_evaluations must be at least 1, got 0"):
        EvaluationBudget(0)
