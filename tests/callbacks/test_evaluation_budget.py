import json
from pathlib import Path

import pytest

from callbacks.evaluation_budget import EvaluationBudget
from tests.commands import TINY, fit


@pytest.mark.parametrize(("row", "per_step"), [("adamw", 1), ("sync", 2)])
def test_a_run_stops_after_the_epoch_in_which_the_budget_is_spent(row: str, per_step: int, tmp_path: Path) -> None:
    budget = "callbacks.evaluation_budget.EvaluationBudget"
    options = [*TINY, "--trainer.max_epochs", "9", "--trainer.callbacks+", budget]
    folder = fit(
        tmp_path, "--config", f"configs/grok_{row}.yaml", *options, "--trainer.callbacks.gradient_evaluations", "7"
    )
    costs = json.loads((folder / "summary.json").read_text())["costs"]
    # 14 training pairs in batches of 8: two steps an epoch.
    epochs = -(-7 // (2 * per_step))
    assert costs["gradient_evaluations"] == 2 * per_step * epochs >= 7


def test_a_budget_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="gradient_evaluations must be at least 1, got 0"):
        EvaluationBudget(0)
