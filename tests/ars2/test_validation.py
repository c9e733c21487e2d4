"""Every option out of range is refused, and nothing changes.

The message names the option, the value and the range, wherever the option comes from.
"""

import re
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from ars2 import ARS2Neo, Muon, validation
from tests.ars2.problems import SmallProblem, problem_groups
from tests.ars2.training import assert_identical, snapshot, train

NAN, INFINITY = float("nan"), float("inf")

# Option, a value, the range in the message. Each can stand in a group, so each can also come from a saved one.
COMMON: list[tuple[str, Any, str]] = [
    ("track", "tensor", "one of 'matrix', 'vector'"),
    ("flatten", "yes", "one of False, True"),
    ("flatten", 1, "one of False, True"),
    ("lr", -1e-3, "[0, inf)"),
    ("lr", NAN, "[0, inf)"),
    ("lr", INFINITY, "[0, inf)"),
    ("lr", "1e-3", "[0, inf)"),
    ("lr", True, "[0, inf)"),
    ("lr", None, "[0, inf)"),
    ("betas", 0.9, "pair of numbers in [0, 1)"),
    ("betas", (0.9, 0.99, 0.999), "pair of numbers in [0, 1)"),
    ("betas", (1.0, 0.99), "[0, 1)"),
    ("betas", (0.9, -0.1), "[0, 1)"),
    ("eps", 0.0, "(0, inf)"),
    ("eps", -1e-8, "(0, inf)"),
    ("weight_decay", -0.1, "[0, inf)"),
    ("cautious", 1, "one of False, True"),
    ("adjust_lr_fn", "match_rms", "one of 'original', 'match_rms_adamw'"),
    ("adjust_lr_fn", None, "one of 'original', 'match_rms_adamw'"),
    ("ns_steps", 0, "at least 1"),
    ("ns_steps", 2.5, "at least 1"),
    ("ns_coefficients", "keller", "one of 'jordan', 'polar_express'"),
    ("ns_coefficients", [3.4, -4.8, 2.0], "one of 'jordan', 'polar_express', or a list of triples"),
    ("ns_coefficients", [[3.4, -4.8, 2.0], [1.5, -0.5]], "list of triples"),
    ("ns_coefficients", [[3.4, -4.8, INFINITY]], "list of triples"),
    ("ns_coefficients", [["3.4", -4.8, 2.0]], "list of triples"),
    ("ns_coefficients", [], "list of triples"),
    ("ns_dtype", "float16", "one of 'bfloat16', 'float32', 'float64'"),
    ("ns_dtype", torch.bfloat16, "one of 'bfloat16', 'float32', 'float64'"),
]
ARS2NEO: list[tuple[str, Any, str]] = [
    *COMMON,
    ("rho", -0.1, "[0, inf)"),
    ("late_start", 1.01, "[0, 1]"),
    ("late_start", -0.01, "[0, 1]"),
    ("total_steps", -1, "at least 0"),
    ("total_steps", 0.5, "at least 0"),
    ("rho_per_step", 1, "one of False, True"),
    ("relative_rho", 1, "one of False, True"),
    ("mode", "delayed", "one of 'base', 'sync', 'aga', 'periodic', 'random', 'late', 'momentum'"),
    ("mode", None, "one of 'base', 'sync', 'aga', 'periodic', 'random'"),
    ("energy", None, "one of False, True, 'whitening', 'scalar'"),
    ("energy", 0, "one of False, True"),
    ("energy", "adam", "one of False, True, 'whitening', 'scalar'"),
    ("geometry", "muon", "one of False, True"),
    ("k", -1, "at least 0"),
    ("k", 1.5, "at least 0"),
    ("k", True, "at least 0"),
    ("alpha", -0.1, "[0, inf)"),
    ("phi_beta", 1.0, "[0, 1)"),
    ("phi_beta", -0.1, "[0, 1)"),
    ("phi_lambda", -1.0, "[0, inf)"),
    ("phi_gamma", NAN, "[0, inf)"),
    ("probability", 1.01, "[0, 1]"),
    ("probability", -0.01, "[0, 1]"),
    ("seed", -1, "at least 0"),
    ("seed", 0.5, "at least 0"),
]
MUON: list[tuple[str, Any, str]] = [
    ("momentum", 1.0, "[0, 1)"),
    ("momentum", -0.1, "[0, 1)"),
    ("nesterov", "no", "one of False, True"),
]
# Muon checks the common options by the same code: one of them is enough.
CASES = [(ARS2Neo, *case) for case in ARS2NEO] + [(Muon, *case) for case in (("eps", 0.0, "(0, inf)"), *MUON)]
GROUP_ONLY = ("track", "flatten")


def complaint(name: str, value: Any, allowed: str) -> str:
    shown = re.escape(repr(value))
    if name == "betas" and isinstance(value, tuple) and len(value) == 2:
        shown = "|".join(re.escape(repr(beta)) for beta in value)
    return rf"{name}.*{re.escape(allowed)}.*got ({shown})"


@pytest.mark.parametrize(("cls", "name", "value", "allowed"), CASES)
def test_at_construction(cls: type[Optimizer], name: str, value: Any, allowed: str) -> None:
    params = [nn.Parameter(torch.ones(3, 3))]
    with pytest.raises(ValueError, match=complaint(name, value, allowed)):
        cls([{"params": params, name: value}])
    if name not in GROUP_ONLY:
        with pytest.raises(ValueError, match=complaint(name, value, allowed)):
            cls(params, **{name: value})


# Groups that come later pass the same checks: one option of each kind is enough.
KINDS = [("lr", -1e-3), ("betas", (1.0, 0.99)), ("mode", "delayed"), ("ns_steps", 2.5), ("energy", None)]
ONE_OF_EACH = [case for case in CASES if case[1:3] in (*KINDS, ("momentum", 1.0))]


@pytest.mark.parametrize(("cls", "name", "value", "allowed"), ONE_OF_EACH)
def test_in_add_param_group(cls: type[Optimizer], name: str, value: Any, allowed: str) -> None:
    optimizer = cls([nn.Parameter(torch.ones(3, 3))])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=complaint(name, value, allowed)):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], name: value})
    assert_identical(before, snapshot(optimizer))
    assert len(optimizer.state) == 1


@pytest.mark.parametrize(("cls", "name", "value", "allowed"), ONE_OF_EACH)
def test_in_a_saved_state(cls: type[Optimizer], name: str, value: Any, allowed: str) -> None:
    def new() -> tuple[SmallProblem, Optimizer]:
        model = SmallProblem()
        groups = [{**g, "flatten": False} for g in problem_groups(model)]
        return model, cls(groups)

    model, optimizer = new()
    train(model, optimizer, range(2))
    saved = deepcopy(optimizer.state_dict())
    saved["param_groups"][1][name] = value
    other, other_optimizer = new()
    train(other, other_optimizer, range(3))
    before = snapshot(other_optimizer)
    with pytest.raises(ValueError, match="group 1: " + complaint(name, value, allowed)):
        other_optimizer.load_state_dict(saved)
    assert_identical(before, snapshot(other_optimizer))
    train(other, other_optimizer, range(3, 4))  # and still works


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "periodic"}, "k must be an integer of at least 1, got 0"),
        ({"mode": "base", "k": 1}, "k must be at most 0 in mode 'base', got 1"),
        ({"mode": "random", "k": 2}, "k must be at most 0 in mode 'random', got 2"),
        ({"mode": "late", "total_steps": 2, "k": 1}, "k must be at most 0 in mode 'late', got 1"),
        ({"mode": "sync", "k": 2}, "k must be at most 1 in mode 'sync', got 2"),
    ],
)
def test_k_fits_the_mode(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ARS2Neo([nn.Parameter(torch.ones(3, 3))], **options)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "sync", "lr": 0, "betas": [0, 0], "weight_decay": 0, "rho": 0},
        {"mode": "sync", "alpha": 0, "phi_beta": 0, "phi_lambda": 0},
        {"mode": "random", "probability": 1},
        {"mode": "late", "late_start": 0, "total_steps": 1},
        {"mode": "late", "late_start": 1, "total_steps": 2},
        {"mode": "random", "probability": 0.0},
        {"mode": "sync", "k": 1},
        {"mode": "aga", "k": 1},
        {"mode": "sync", "ns_steps": 1, "ns_coefficients": "polar_express", "ns_dtype": "float64", "phi_gamma": 0},
    ],
)
def test_the_ends_of_the_ranges_are_allowed(options: dict[str, Any]) -> None:
    param = nn.Parameter(torch.ones(3, 3))
    optimizer = ARS2Neo([param], **options)
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.step(lambda: param.square().sum().backward())
    assert param.isfinite().all()


@pytest.mark.parametrize("name", ["mode", "phi_lambda", "ns_dtype", "ns_coefficients"])
def test_options_of_the_optimizer_may_not_differ_between_groups(name: str) -> None:
    others: dict[str, Any] = {"mode": "base", "ns_dtype": "float32", "ns_coefficients": [[2, -1, 0]]}
    other = others.get(name, 0.77)
    first, second = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    with pytest.raises(ValueError, match=f"{name} .*groups"):
        ARS2Neo([{"params": [first]}, {"params": [second], name: other}], mode="aga")
    optimizer = ARS2Neo([first], mode="aga")
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"{name} .*groups"):
        optimizer.add_param_group({"params": [second], name: other})
    assert_identical(before, snapshot(optimizer))


def test_equal_values_of_other_types_do_not_differ() -> None:
    first, second = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    assert len(ARS2Neo([{"params": [first], "phi_lambda": 2}, {"params": [second]}]).param_groups) == 2


def test_a_range_is_printed_exactly() -> None:
    with pytest.raises(ValueError, match=re.escape("(0, 1], got 0")):
        validation.check_number({"x": 0}, "x", 0.0, 1.0, open_minimum=True, closed_maximum=True)
    validation.check_number({"x": 1}, "x", 0.0, 1.0, open_minimum=True, closed_maximum=True)


# --- options that a group names and the optimizer does not know ---


@pytest.mark.parametrize("cls", [ARS2Neo, Muon])
@pytest.mark.parametrize(
    ("name", "nearest"),
    [("learning_rate", "lr"), ("wd", "weight_decay"), ("weigth_decay", "weight_decay"), ("trak", "track")],
)
def test_an_unknown_option_of_a_group_is_an_error_with_the_nearest_name(cls: Any, name: str, nearest: str) -> None:
    message = rf"{cls.__name__} \(matrix group\) has no option '{name}': did you mean '{nearest}'\?"
    with pytest.raises(ValueError, match=message):
        cls([{"params": [nn.Parameter(torch.ones(2, 2))], name: 1}])
    optimizer = cls([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], name: 1})
    assert len(optimizer.param_groups) == len(optimizer.state) == 1


def test_an_unknown_option_that_resembles_none_lists_all() -> None:
    with pytest.raises(ValueError, match=r"'zzz'.*alpha, betas, .*, weight_decay$"):
        ARS2Neo([{"params": [nn.Parameter(torch.ones(2, 2))], "zzz": 1}])


@pytest.mark.parametrize("cls", [ARS2Neo, Muon])
def test_a_group_may_have_the_entries_of_schedulers(cls: Any) -> None:
    optimizer = cls([nn.Parameter(torch.ones(2, 2))])
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)
    copy = {**optimizer.param_groups[0], "params": [nn.Parameter(torch.ones(2, 2))], "name": "new", "lr_scale": 0.5}
    optimizer.add_param_group(copy)
    assert [group.get("name") for group in optimizer.param_groups] == [None, "new"]
