"""The state is made up front and survives copying, saving and loading.

It consists of tensors only.
"""

import gc
import weakref
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from ars2 import ARS2Neo
from tests.ars2.problems import SmallProblem, problem_groups
from tests.ars2.training import (
    CORE_MODES,
    MODES,
    SHEAR_MODES,
    assert_identical,
    closure_of,
    copies,
    parameters_of,
    setup,
    snapshot,
    through_a_file,
    train,
)

# --- the state ---


@pytest.mark.parametrize("mode", MODES)
def test_state_is_made_up_front_of_tensors_like_the_parameters(mode: str) -> None:
    model, optimizer = setup(mode)
    keys = {"exp_avg", "exp_avg_sq", "shear"} if mode.split(",")[0] in SHEAR_MODES else {"exp_avg", "exp_avg_sq"}
    keys -= {"shear"} if mode == "periodic, k=1" else set()
    for moment, steps in (("new", 0), ("trained", 7)):
        assert set(optimizer.state) == set(model.parameters())
        for param, state in optimizer.state.items():
            state = dict(state)
            assert state.pop("step") == steps
            assert set(state) == keys, moment
            assert all(isinstance(t, Tensor) and t.shape == param.shape for t in state.values())
            assert len({t.data_ptr() for t in state.values()} | {param.data_ptr()}) == len(keys) + 1
        train(model, optimizer, range(7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_state_is_float32_or_wider_whatever_the_parameters(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.ones(3, 4, dtype=dtype))
    optimizer = ARS2Neo([param], **MODES["aga"])
    optimizer.step(lambda: param.square().sum().backward())
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for key, t in optimizer.state[param].items() if key != "step"} == {expected}
    assert param.dtype == dtype


@pytest.mark.parametrize("mode", CORE_MODES)
def test_counters_are_plain_numbers_in_the_groups(mode: str) -> None:
    model, optimizer = setup(mode)
    train(model, optimizer, range(4))
    for index, group in enumerate(optimizer.param_groups):
        assert type(group["step"]) is int and group["step"] == 4
        plain = {name: value for name, value in group.items() if name not in ("params", "betas")}
        assert all(type(value) in (int, float, bool, str) for value in plain.values()), plain
        counters = {"sync_steps", "last_sync", "phi", "phi_variance", "injected_alpha"}
        assert counters & set(group) == (counters if index == 0 else set())


@pytest.mark.parametrize("mode", ["aga", pytest.param("sync", marks=pytest.mark.slow)])
def test_no_temporary_of_a_step_stays_alive(mode: str) -> None:
    gc.collect()
    of_others = [t for t in gc.get_objects() if type(t) is Tensor]  # referenced, so that no address is used again
    model, optimizer = setup(mode)
    model.loss(0).backward()
    assert optimizer.wants_second_pass()
    assert not optimizer.first_gradients
    first = {p: p.grad for p in model.parameters()}
    optimizer.perturb()
    assert optimizer.first_gradients == first and all(p.grad is None for p in model.parameters())
    model.loss(0).backward()
    optimizer.restore()
    alive = [weakref.ref(gradient) for gradient in first.values()]
    del first
    optimizer.step()
    gc.collect()
    assert not optimizer.first_gradients and not any(reference() is not None for reference in alive)
    optimizer.zero_grad()
    model.zero_grad()
    gc.collect()
    alive_tensors = [t for t in gc.get_objects() if type(t) is Tensor and t.shape == (40, 26)]
    state_tensors = [t for state in optimizer.state.values() for t in state.values() if t.shape == (40, 26)]
    assert {id(t) for t in alive_tensors} - {id(t) for t in of_others} == {id(t) for t in state_tensors}


def test_diagnostics_of_each_mode() -> None:
    always = {"steps", "sync_steps", "gradient_evaluations", "effective_k"}
    for mode in MODES:
        model, optimizer = setup(mode)
        new = optimizer.diagnostics()
        assert new["steps"] == 0 and new["effective_k"] == float("inf")
        train(model, optimizer, range(3))
        expected = always | ({"alpha"} if mode.split(",")[0] in SHEAR_MODES and mode != "periodic, k=1" else set())
        expected |= {"phi", "phi_deviation", "threshold"} if mode.startswith("aga") else set()
        seen = optimizer.diagnostics()
        assert set(seen) == set(new) == expected and all(type(value) is float for value in seen.values())


# --- copies ---


@pytest.mark.parametrize("mode", ["sync", "aga"])
def test_a_deep_copy_trains_independently_to_the_same_result(mode: str) -> None:
    model, optimizer = setup(mode)
    train(model, optimizer, range(5))
    other, other_optimizer = deepcopy((model, optimizer))
    assert set(parameters_of(other_optimizer)) == set(other.parameters())
    before = snapshot(optimizer)
    train(other, other_optimizer, range(5, 12))
    assert_identical(before, snapshot(optimizer))
    train(model, optimizer, range(5, 12))
    assert_identical(snapshot(optimizer), snapshot(other_optimizer))


@pytest.mark.parametrize(
    ("mode", "steps"), [*((mode, 7) for mode in MODES), ("aga", 0), ("aga", 1), ("aga", 2), ("sync", 0)]
)
def test_resume_is_no_interruption(mode: str, steps: int) -> None:
    model, optimizer = setup(mode)
    train(model, optimizer, range(steps))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other, other_optimizer = setup(mode)
    train(other, other_optimizer, range(20, 23))  # its earlier state must not matter
    other.load_state_dict(saved["model"])
    other_optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(steps, steps + 15))
    train(other, other_optimizer, range(steps, steps + 15))
    assert_identical(snapshot(optimizer), snapshot(other_optimizer))


@pytest.mark.parametrize("mode", ["base", "aga"])
def test_resume_keeps_float32_moments_of_bfloat16_parameters(mode: str) -> None:
    model, optimizer = setup(mode, torch.bfloat16)
    train(model, optimizer, range(5))
    saved = through_a_file(optimizer.state_dict())
    moments = [t for state in saved["state"].values() for t in state.values()]
    assert any(not torch.equal(t, t.bfloat16().float()) for t in moments), "nothing to lose here"
    other, other_optimizer = setup(mode, torch.bfloat16)
    other.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(saved)
    assert_identical(optimizer.state_dict(), other_optimizer.state_dict())
    train(model, optimizer, range(5, 12))
    train(other, other_optimizer, range(5, 12))
    assert_identical(snapshot(optimizer), snapshot(other_optimizer))


def test_loading_shares_no_tensor_with_its_source() -> None:
    model, optimizer = setup("aga")
    train(model, optimizer, range(3))
    other, other_optimizer = setup("aga")
    saved = optimizer.state_dict()
    other_optimizer.load_state_dict(saved)
    before = deepcopy(saved)
    train(other, other_optimizer, range(3, 6))
    assert_identical(before, optimizer.state_dict())
    assert_identical(before, saved)


# --- distributed checkpoints ---


@pytest.mark.parametrize(
    ("mode", "named", "flatten"),
    [("sync", False, False), ("aga", True, True), ("aga", False, True), ("base", True, False)],
)
def test_distributed_state_dicts_resume(mode: str, named: bool, flatten: bool) -> None:
    def named_setup() -> tuple[SmallProblem, ARS2Neo]:
        model = SmallProblem()
        names = {p: name for name, p in model.named_parameters()}
        groups = problem_groups(model)
        for group in groups if named else []:
            group["params"] = [(names[p], p) for p in group["params"]]
        return model, ARS2Neo(groups, ns_dtype="float32", **MODES[mode])

    def clean(optimizer: ARS2Neo) -> list[dict[str, Any]]:
        return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = named_setup()
    train(model, optimizer, range(8))
    saved = through_a_file(deepcopy(get_optimizer_state_dict(model, optimizer, options=options)))
    other, other_optimizer = named_setup()
    other.load_state_dict(model.state_dict())
    before = copies(other.parameters())
    set_optimizer_state_dict(other, other_optimizer, saved, options=options)
    assert_identical(before, copies(other.parameters()))
    assert_identical(clean(optimizer), clean(other_optimizer))
    for step in range(8, 16):
        optimizer.step(closure_of(model, optimizer, step))
        other_optimizer.step(closure_of(other, other_optimizer, step))
    assert_identical(copies(model.parameters()), copies(other.parameters()))
    assert optimizer.diagnostics() == other_optimizer.diagnostics()
