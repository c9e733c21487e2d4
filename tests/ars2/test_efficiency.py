"""Count what a step costs beside its arithmetic.

The costs are reads of the device, calls of the matrix kernel, and memory that is kept.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ars2 import ARS2Neo, Muon
from tests.ars2.problems import problem_groups
from tests.ars2.training import MODES, setup, step_by_parts

# Operations that return values of a tensor to Python, so that the host waits for the device.
READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select")


class Calls(TorchDispatchMode):
    """Count operations that reach kernels, by name, and values read by Python.

    Step counts are on the host, as torch.optim.AdamW's: reading one waits for nothing.
    """

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.on_host = {id(state.get("step")) for state in optimizer.state.values()} if optimizer else set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if id(args[0] if args else None) not in self.on_host:
            self.counts[func.overloadpacket._qualified_op_name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


def count(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object], optimizer: Any = None) -> Counter[str]:
    real = torch.Tensor.tolist
    calls = Calls(optimizer)

    def tolist(tensor: torch.Tensor) -> Any:
        calls.counts["tolist"] += 1
        return real(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    with calls:
        run()
    monkeypatch.undo()
    return calls.counts


def optimizer_calls(mode: str, monkeypatch: pytest.MonkeyPatch, steps: int = 8) -> list[Counter[str]]:
    """Return the calls of the optimizer alone, step by step.

    The forward and backward passes are not counted.
    """
    model, optimizer = setup(mode)
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        model.loss(step).backward()
        decision: list[bool] = []
        counts = count(monkeypatch, lambda: decision.append(optimizer.wants_second_pass()), optimizer)  # noqa: B023
        if decision[0]:
            counts += count(monkeypatch, optimizer.perturb, optimizer)
            model.loss(step).backward()
            counts += count(monkeypatch, optimizer.restore)
        counts += count(monkeypatch, optimizer.step, optimizer)
        seen.append(counts)
    return seen


def reads(counts: Counter[str]) -> int:
    return sum(counts[name] for name in (*READS, "tolist"))


def test_the_counter_sees_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3)
    assert reads(count(monkeypatch, lambda: x.sum().item())) == 1
    assert reads(count(monkeypatch, lambda: float(x.sum()))) == 1
    assert reads(count(monkeypatch, lambda: bool(x.any()))) >= 1
    assert reads(count(monkeypatch, lambda: x.tolist())) == 1
    assert reads(count(monkeypatch, lambda: x * 2)) == 0


@pytest.mark.parametrize("mode", ["base", "sync", "periodic", "periodic, k=1", "random"])
def test_a_step_reads_nothing_from_the_device(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [reads(counts) for counts in optimizer_calls(mode, monkeypatch)] == [0] * 8


def test_a_step_of_aga_reads_once_from_its_second_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [reads(counts) for counts in optimizer_calls("aga", monkeypatch)] == [0] + [1] * 7


def test_diagnostics_read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = setup("aga")
    for step in range(3):
        step_by_parts(model, optimizer, step)
    assert not count(monkeypatch, optimizer.diagnostics)


def products_of(shapes: list[tuple[int, ...]], cls: type, monkeypatch: pytest.MonkeyPatch) -> int:
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = cls(params, **({"mode": "base"} if cls is ARS2Neo else {}))
    for p in params:
        p.grad = torch.randn(p.shape)
    counts = count(monkeypatch, optimizer.step)
    assert not counts["mm"] and not counts["addmm"]
    return counts["bmm"] + counts["baddbmm"]


@pytest.mark.parametrize("cls", [ARS2Neo, Muon])
def test_products_depend_on_the_number_of_shapes_not_of_tensors(cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(8, 6), (6, 8), (3, 5, 7), (4, 3, 2, 2)]  # a transposed shape is no other shape
    once = products_of(shapes, cls, monkeypatch)
    assert once == 3 * 15  # three shapes, five steps of three products
    assert products_of(shapes * 10, cls, monkeypatch) == once
    assert products_of([*shapes, (9, 9)], cls, monkeypatch) == once + 15


@pytest.mark.parametrize("mode", MODES)
def test_the_number_of_state_tensors(mode: str) -> None:
    model, optimizer = setup(mode)
    expected = 2 if mode in ("base", "sync", "late", "periodic, k=1") else 3
    for _ in range(2):
        tensors = [[t for t in state.values() if t.ndim] for state in optimizer.state.values()]
        assert {len(of_parameter) for of_parameter in tensors} == {expected}
        step_by_parts(model, optimizer, 0)
    assert len(optimizer.state) == len(problem_groups(model)[0]["params"]) + len(problem_groups(model)[1]["params"])
