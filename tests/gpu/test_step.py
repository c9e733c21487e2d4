"""The optimizer's step on a GPU equals the CPU's, without host syncs."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from ars2 import ARS2Neo, Muon
from benchmarks.device_timing import host_syncs
from benchmarks.gpu_parts.graphs import captured
from tests.ars2.problems import SmallProblem, problem_groups
from tests.ars2.training import (
    MODES,
    assert_identical,
    copies,
    parameters_of,
    same,
    step_by_parts,
    train,
    worst_difference,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(autouse=True)
def full_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep float32 products from being rounded to TF32, in convolutions too."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def setup(mode: str, device: str = "cuda", **options: object) -> tuple[SmallProblem, ARS2Neo]:
    """Return the small problem on a device and an ARS2Neo over its two tracks."""
    model = SmallProblem().to(device)
    return model, ARS2Neo(problem_groups(model), ns_dtype="float32", **(MODES[mode] | options))


@pytest.mark.parametrize("mode", MODES)
def test_training_on_the_gpu_equals_that_on_the_cpu(mode: str) -> None:
    (on_gpu, gpu), (on_cpu, cpu) = setup(mode), setup(mode, "cpu")
    for step in range(8):
        assert step_by_parts(on_gpu, gpu, step) == step_by_parts(on_cpu, cpu, step)
    assert worst_difference([p.cpu() for p in on_gpu.parameters()], on_cpu.parameters()) < 1e-4


def test_muon_on_the_gpu_equals_that_on_the_cpu() -> None:
    results = []
    for device in ("cuda", "cpu"):
        model = SmallProblem().to(device)
        optimizer = Muon(problem_groups(model), ns_dtype="float32")
        train(model, optimizer, range(8))
        results.append([p.detach().cpu() for p in parameters_of(optimizer)])
    assert worst_difference(*results) < 1e-4


def test_the_counter_of_host_syncs_sees_a_read() -> None:
    x = torch.ones(3, device="cuda")
    assert host_syncs(lambda: x.sum().item()) == 1
    assert host_syncs(lambda: x.tolist()) == 1
    assert host_syncs(lambda: x.sum()) == 0
    assert torch.cuda.get_sync_debug_mode() == 0


def syncs_of_step(step: int, model: SmallProblem, optimizer: ARS2Neo) -> int:
    """Make a step and return the host syncs of the optimizer, without the passes."""
    optimizer.zero_grad()
    model.loss(step).backward()
    decision: list[bool] = []
    count = host_syncs(lambda: decision.append(optimizer.wants_second_pass()))
    if decision[0]:
        count += host_syncs(optimizer.perturb)
        model.loss(step).backward()
        count += host_syncs(optimizer.restore)
    return count + host_syncs(optimizer.step)


@pytest.mark.parametrize("mode", ["base", "sync", "periodic", "random"])
def test_a_step_makes_no_host_sync(mode: str) -> None:
    model, optimizer = setup(mode)
    assert [syncs_of_step(step, model, optimizer) for step in range(5)] == [0] * 5


def test_a_step_of_aga_makes_one_host_sync_to_decide() -> None:
    model, optimizer = setup("aga")
    assert [syncs_of_step(step, model, optimizer) for step in range(8)] == [0] + [1] * 7


def test_an_exception_in_the_second_pass_restores_the_parameters() -> None:
    model, optimizer = setup("sync")
    train(model, optimizer, range(2))
    before, passes = copies(model.parameters()), []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        passes.append(copies(model.parameters()))
        if len(passes) == 2:
            raise RuntimeError("in the second pass")
        loss = model.loss(2)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="in the second pass"):
        optimizer.step(closure)
    assert not same(passes[1], before)
    assert same(model.parameters(), before)


def test_a_captured_step_equals_the_eager_one_whatever_the_learning_rate() -> None:
    results = []
    for as_graph in (False, True):
        model, optimizer = setup("base", capturable=True)
        model.loss(0).backward()
        if as_graph:
            step = captured(optimizer)
        else:
            step = optimizer.step
            for _ in range(3):
                step()
        for rate in (1e-2, 3e-3, 1e-3, 3e-4):
            for group in optimizer.param_groups:
                group["lr"].fill_(rate)
            step()
        results.append((copies(model.parameters()), optimizer.param_groups[0]["step"].item()))
    assert worst_difference(results[0][0], results[1][0]) < 1e-5
    assert results[0][1] == results[1][1] == 7


@pytest.mark.parametrize("mode", ["sync", "aga"])
def test_a_state_survives_a_move_to_the_cpu_and_back(mode: str) -> None:
    model, optimizer = setup(mode)
    train(model, optimizer, range(3))
    saved = optimizer.state_dict()
    _, on_cpu = setup(mode, "cpu")
    on_cpu.load_state_dict(saved)
    assert all(t.device.type == "cpu" for state in on_cpu.state.values() for t in state.values())
    again_model, again = setup(mode)
    again_model.load_state_dict(model.state_dict())
    again.load_state_dict(on_cpu.state_dict())
    assert all(t.device.type == "cuda" for state in again.state.values() for t in state.values())
    assert_identical(again.state_dict(), saved)
    for step in range(3, 5):
        train(model, optimizer, [step])
        train(again_model, again, [step])
    assert worst_difference(model.parameters(), again_model.parameters()) < 1e-4


@pytest.mark.parametrize("mode", ["sync", "aga"])
def test_parameters_in_channels_last_are_updated_like_others(mode: str) -> None:
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = nn.Conv2d(8, 16, 3).cuda().to(memory_format=memory_format)
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(torch.randn(param.shape, generator=torch.Generator().manual_seed(0)))
        groups = [{"params": [model.weight]}, {"params": [model.bias], "track": "vector"}]
        optimizer = ARS2Neo(groups, lr=1e-2, ns_dtype="float32", **MODES[mode])
        images = torch.randn(4, 8, 9, 9, generator=torch.Generator().manual_seed(1)).cuda()
        images = images.contiguous(memory_format=memory_format)
        for _ in range(4):

            def closure(model: nn.Module = model, images: torch.Tensor = images) -> torch.Tensor:
                model.zero_grad()
                loss = model(images).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
        results.append(copies(model.parameters()))
    assert worst_difference(*results) < 1e-4
