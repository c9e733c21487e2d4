"""A saved state that does not fit is refused by name, with nothing changed."""

from copy import deepcopy
from typing import Any

import pytest
import torch

from ars2 import ARS2Neo, Muon
from tests.ars2.problems import SmallProblem, problem_groups
from tests.ars2.training import MODES, assert_identical, setup, snapshot, train


def damaged(kind: str, saved: dict[str, Any]) -> dict[str, Any]:
    groups, state = saved["param_groups"], saved["state"]
    if kind == "missing tensor":
        del state[3]["exp_avg"]
    elif kind == "no state of a parameter":
        del state[3]
    elif kind == "unknown tensor":
        state[3]["max_exp_avg_sq"] = torch.zeros_like(state[3]["exp_avg"])
    elif kind == "other shape":
        state[3]["exp_avg_sq"] = torch.zeros(5, 5)
    elif kind == "not a tensor":
        state[3]["exp_avg"] = 0.0
    elif kind == "fewer groups":
        groups.pop()
    elif kind == "fewer parameters":
        groups[0]["params"].pop()
    elif kind == "other track":
        groups[1]["track"] = "matrix"
    elif kind == "no counter":
        del groups[0]["sync_steps"]
    elif kind == "no variance":
        del groups[0]["phi_variance"]
    elif kind == "no step":
        del groups[1]["step"]
    elif kind == "no option":
        del groups[0]["rho"]
    elif kind == "groups that differ":
        groups[1]["alpha"] = 0.7
    return saved


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing tensor", r"the saved state of parameter 3 holds \['exp_avg_sq', 'shear'\], not"),
        ("no state of a parameter", "the saved state of parameter 3 holds nothing, not"),
        ("unknown tensor", "parameter 3 holds .*max_exp_avg_sq.*same class and mode"),
        ("other shape", r"the saved exp_avg_sq of parameter 3 is \(5, 5\), the parameter is \(40, 26\)"),
        ("not a tensor", "the saved exp_avg of parameter 3 is float"),
        ("fewer groups", "other parameter groups"),
        ("fewer parameters", "other parameter groups"),
        ("other track", "group 1: track must be one of 'vector', got 'matrix'"),
        ("no counter", "group 0: sync_steps must be an integer of at least 0, got 'nothing'"),
        ("no variance", "group 0: phi_variance must be a number, got 'nothing'"),
        ("no step", "group 1: step must be an integer of at least 0, got 'nothing'"),
        ("no option", "group 0: rho must be a number"),
        ("groups that differ", "alpha is one for the whole optimizer"),
    ],
)
def test_a_damaged_saved_state_is_refused_with_nothing_changed(kind: str, message: str) -> None:
    model, optimizer = setup("aga")
    train(model, optimizer, range(4))
    saved = damaged(kind, deepcopy(optimizer.state_dict()))
    other, other_optimizer = setup("aga")
    train(other, other_optimizer, range(2))
    before = snapshot(other_optimizer)
    with pytest.raises(ValueError, match=message):
        other_optimizer.load_state_dict(saved)
    assert_identical(before, snapshot(other_optimizer))


@pytest.mark.parametrize("into", MODES)
@pytest.mark.parametrize("source", MODES)
def test_a_saved_state_of_another_mode_is_refused(source: str, into: str) -> None:
    if MODES[source]["mode"] == MODES[into]["mode"]:
        return
    optimizer, other = setup(source)[1], setup(into)[1]
    before = snapshot(other)
    with pytest.raises(ValueError, match=f"mode must be one of '{MODES[into]['mode']}', got '{MODES[source]['mode']}'"):
        other.load_state_dict(optimizer.state_dict())
    assert_identical(before, snapshot(other))


def test_a_saved_state_of_another_class_is_refused() -> None:
    model = SmallProblem()
    adamw = torch.optim.AdamW([{"params": group["params"]} for group in problem_groups(model)])
    for optimizer in (ARS2Neo(problem_groups(model)), Muon(problem_groups(model))):
        with pytest.raises(ValueError, match="saved optimizer state, group 0: track must be one of"):
            optimizer.load_state_dict(adamw.state_dict())
