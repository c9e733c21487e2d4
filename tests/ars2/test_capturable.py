"""A capturable step can be recorded in a CUDA graph.

It does the same arithmetic, its counters and learning rate are on the device, and it never reads from the device.
"""

import copy
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from ars2 import ARS2Neo
from tests.ars2.problems import SmallProblem, problem_groups
from tests.ars2.test_efficiency import count, reads
from tests.ars2.training import (
    assert_identical,
    copies,
    parameters_of,
    setup,
    step_by_parts,
    through_a_file,
    train,
    worst_difference,
)

CAPTURABLE_MODES = ["base", "sync"]
TENSORS = ("step", "lr", "sync_steps", "last_sync")


@pytest.mark.parametrize(
    ("mode", "options"),
    [*((mode, {}) for mode in CAPTURABLE_MODES), ("base", {"cautious": True, "adjust_lr_fn": "match_rms_adamw"})],
)
def test_a_capturable_step_does_the_same_arithmetic(mode: str, options: dict[str, Any]) -> None:
    results = []
    for capturable in (False, True):
        model, optimizer = setup(mode, capturable=capturable, **options)
        scheduler = CosineAnnealingLR(optimizer, 20)
        for step in range(20):
            train(model, optimizer, [step])
            scheduler.step()
        results.append((copies(parameters_of(optimizer)), optimizer.diagnostics()))
    # The learning rate is rounded to float32.
    assert worst_difference(results[0][0], results[1][0]) < 2e-6
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("mode", CAPTURABLE_MODES)
def test_a_capturable_step_makes_the_same_calls_whatever_the_step_and_reads_nothing(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = setup(mode, capturable=True, relative_rho=True)
    calls = []
    for step in range(4):
        optimizer.zero_grad()
        model.loss(step).backward()
        counts = count(monkeypatch, optimizer.wants_second_pass)
        if mode == "sync":
            counts += count(monkeypatch, optimizer.perturb)
            model.loss(step).backward()
            counts += count(monkeypatch, optimizer.restore)
        counts += count(monkeypatch, optimizer.step)
        assert reads(counts) == 0
        calls.append(counts)
    assert calls[0] == calls[1] == calls[2] == calls[3]


def test_values_that_change_each_step_are_persistent_tensors() -> None:
    model, optimizer = setup("sync", capturable=True)
    scheduler = CosineAnnealingLR(optimizer, 20)
    main = optimizer.param_groups[0]
    before = {name: main[name] for name in TENSORS}
    for step in range(3):
        train(model, optimizer, [step])
        scheduler.step()
    assert all(main[name] is before[name] and main[name].device == main["params"][0].device for name in TENSORS)
    assert [main[name].item() for name in ("step", "sync_steps", "last_sync")] == [3, 3, 3]
    assert optimizer.param_groups[1]["step"].item() == 3
    assert main["lr"].item() == pytest.approx(scheduler.get_last_lr()[0].item())


@pytest.mark.parametrize("capturable", [False, True])
def test_states_are_saved_as_plain_numbers_and_loaded_into_either_kind(capturable: bool) -> None:
    model, optimizer = setup("sync", capturable=capturable)
    train(model, optimizer, range(3))
    saved = through_a_file(optimizer.state_dict())
    assert all(type(saved["param_groups"][0][name]) is int for name in ("step", "sync_steps", "last_sync"))
    assert all(type(group["lr"]) is float for group in saved["param_groups"])
    for other in (False, True):
        _, loaded = setup("sync", capturable=other)
        loaded.load_state_dict(saved)
        assert isinstance(loaded.param_groups[0]["step"], torch.Tensor) is other
        again = loaded.state_dict()
        assert_identical(again["state"], saved["state"])
        for group, same in zip(again["param_groups"], saved["param_groups"], strict=True):
            assert {**group, "lr": 0.0} == {**same, "lr": 0.0}
            assert group["lr"] == pytest.approx(same["lr"], rel=1e-6)  # float32 on the device


def test_a_copy_is_capturable_and_has_separate_counters() -> None:
    model, optimizer = setup("base", capturable=True)
    train(model, optimizer, range(2))
    copied = copy.deepcopy(optimizer)
    train(model, optimizer, [2])
    assert copied.param_groups[0]["step"].item() == 2
    copied.load_state_dict(optimizer.state_dict())
    assert copied.param_groups[0]["step"].item() == 3


@pytest.mark.parametrize("mode", ["aga", "random", "late"])
def test_modes_that_decide_in_python_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"capturable.*got '{mode}'"):
        setup(mode, capturable=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU, and there is none")
@pytest.mark.parametrize("mode", CAPTURABLE_MODES)
def test_a_cuda_graph_replays_complete_steps(mode: str) -> None:
    results = []
    for captured in (False, True):
        model = SmallProblem().cuda()
        optimizer = ARS2Neo(problem_groups(model), mode=mode, ns_dtype="float32", capturable=True)
        scheduler = CosineAnnealingLR(optimizer, 20)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step_by_parts(model, optimizer, 0)
        torch.cuda.current_stream().wait_stream(stream)
        scheduler.step()
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                step_by_parts(model, optimizer, 0)
        for _ in range(5):
            if captured:
                graph.replay()
            else:
                step_by_parts(model, optimizer, 0)
            scheduler.step()
        results.append((copies(parameters_of(optimizer)), optimizer.diagnostics()))
    assert worst_difference(results[0][0], results[1][0]) < 1e-5
    assert results[0][1] == results[1][1]
