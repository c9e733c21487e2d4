"""A saved state that does not fit is refused by name and changes nothing."""

import inspect
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from ars2 import ARS2Neo, Muon
from tests.ars2.problems import SmallProblem, problem_groups
from tests.ars2.saved_states import FOLDER, KINDS, make, steps
from tests.ars2.training import MODES, assert_identical, setup, snapshot, train, worst_difference


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
    elif kind == "groups that differ":
        groups[1]["alpha"] = 0.7
    return saved


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing tensor", r"parameter 3 .*\['exp_avg_sq', 'shear'\]"),
        ("no state of a parameter", "parameter 3 .*nothing"),
        ("unknown tensor", "parameter 3 .*max_exp_avg_sq"),
        ("other shape", r"exp_avg_sq of parameter 3 .*\(5, 5\)"),
        ("not a tensor", "exp_avg of parameter 3 .*float"),
        ("fewer groups", "other parameter groups"),
        ("fewer parameters", "other parameter groups"),
        ("other track", "group 1: track is 'matrix' there and 'vector' in this optimizer"),
        ("no counter", "group 0: it is of another optimizer than ARS2Neo"),
        ("no variance", "group 0: phi_variance .*'nothing'"),
        ("no step", "group 1: step .*'nothing'"),
        ("groups that differ", "alpha .*groups"),
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


@pytest.mark.parametrize(("source", "into"), [("base", "sync"), ("sync", "aga"), ("random", "periodic")])
def test_a_saved_state_of_another_mode_is_refused(source: str, into: str) -> None:
    optimizer, other = setup(source)[1], setup(into)[1]
    before = snapshot(other)
    with pytest.raises(ValueError, match=f"mode is '{MODES[source]['mode']}' there and '{MODES[into]['mode']}'"):
        other.load_state_dict(optimizer.state_dict())
    assert_identical(before, snapshot(other))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_from_before_separate_step_counts_resumes_exactly(kind: str) -> None:
    saved = torch.load(FOLDER / f"{kind}.pt", weights_only=True)
    params, optimizer = make(kind)
    for param, value in zip(params, saved["params"], strict=True):
        param.data.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    steps(params, optimizer, range(5, 10))
    assert worst_difference(params, saved["later"]) < 1e-5


@pytest.mark.parametrize("option", ["ns_algorithm", "energy", "rho"])
def test_an_option_missing_from_an_old_saved_state_has_its_default(option: str) -> None:
    model, optimizer = setup("aga")
    train(model, optimizer, range(4))
    saved, default = deepcopy(optimizer.state_dict()), inspect.signature(ARS2Neo).parameters[option].default
    for group in saved["param_groups"]:
        del group[option]
    other, other_optimizer = setup("aga")
    other_optimizer.load_state_dict(saved)
    assert all(group[option] == default for group in other_optimizer.param_groups)
    train(other, other_optimizer, range(4, 6))


# Options that came after the first saved states, with their defaults.
NEW = {"ns_algorithm": "auto", "adjust_lr_fn": "original", "cautious": False, "splits": 1}
NEW_OF_ARS2 = {**NEW, "energy": True, "late_start": 0.5, "total_steps": 0, "rho_per_step": False, "relative_rho": False}


@pytest.mark.parametrize(("cls", "options"), [(ARS2Neo, NEW_OF_ARS2), (Muon, NEW)])
def test_options_missing_from_an_old_pickled_optimizer_have_their_defaults(cls: Any, options: dict[str, Any]) -> None:
    model = SmallProblem()
    pickled = cls(problem_groups(model)).__getstate__()
    for group in pickled["param_groups"]:
        for option in (*options, "interval"):
            group.pop(option, None)
    restored = cls.__new__(cls)
    restored.__setstate__(pickled)
    for group in restored.param_groups:
        assert {option: group[option] for option in options} == options
    train(model, restored, range(2))
    cls(problem_groups(SmallProblem())).load_state_dict(restored.state_dict())


def test_an_old_saved_state_has_none_of_the_new_options() -> None:
    for kind in KINDS:
        for group in torch.load(FOLDER / f"{kind}.pt", weights_only=True)["optimizer"]["param_groups"]:
            assert not {"adjust_lr_fn", "cautious", "splits", "total_steps", "interval"} & group.keys()


def test_hooks_see_and_change_the_state_that_is_loaded() -> None:
    model, optimizer = setup("aga")
    train(model, optimizer, range(4))
    saved = deepcopy(optimizer.state_dict())
    _, other = setup("aga")

    def forget(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {key: {**of, "exp_avg": torch.zeros_like(of["exp_avg"])} for key, of in state_dict["state"].items()}
        return {**state_dict, "state": state}

    seen: list[float] = []

    def double(loaded: torch.optim.Optimizer) -> None:
        for state in loaded.state.values():
            seen.append(float(state["exp_avg"].abs().sum()))
            state["exp_avg_sq"] = 2 * state["exp_avg_sq"]

    other.register_load_state_dict_pre_hook(forget)
    other.register_load_state_dict_post_hook(double)
    other.load_state_dict(saved)
    assert seen == [0.0] * len(other.state)
    for index, state in enumerate(other.state.values()):
        assert not state["exp_avg"].any() and state["exp_avg_sq"].dtype == torch.float32
        assert torch.equal(state["exp_avg_sq"], 2 * saved["state"][index]["exp_avg_sq"])


def test_a_hook_that_orders_parameters_by_name_restores_their_moments() -> None:
    torch.manual_seed(0)
    params = {"a": nn.Parameter(torch.randn(3, 4)), "b": nn.Parameter(torch.randn(3, 4))}
    optimizer, other = (ARS2Neo(list(items), mode="base") for items in (params.items(), reversed(params.items())))
    for param in params.values():
        param.grad = torch.randn(3, 4)
    optimizer.step()

    def by_name(loading: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        (saved,), (here,) = state_dict["param_groups"], loading.param_groups
        order = [saved["params"][saved["param_names"].index(name)] for name in here["param_names"]]
        return {**state_dict, "param_groups": [{**saved, "params": order, "param_names": here["param_names"]}]}

    other.register_load_state_dict_pre_hook(by_name)
    other.load_state_dict(optimizer.state_dict())
    for param in params.values():
        assert torch.equal(other.state[param]["exp_avg"], optimizer.state[param]["exp_avg"])


def test_a_saved_state_of_another_class_is_refused() -> None:
    model = SmallProblem()
    adamw = torch.optim.AdamW([{"params": group["params"]} for group in problem_groups(model)])
    for optimizer in (ARS2Neo(problem_groups(model)), Muon(problem_groups(model))):
        with pytest.raises(ValueError, match="group 0: track"):
            optimizer.load_state_dict(adamw.state_dict())
