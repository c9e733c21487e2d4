"""The loops of the examples make the steps of a loop with passes by hand."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from ars2 import ARS2Neo, param_groups
from examples import accelerate_loop, fabric_loop, plain_loop
from examples.tiny_task import loader, network
from tests.examples import by_hand
from tests.examples.by_hand import EPOCHS, MODES
from tests.examples.in_two_processes import together
from tests.helpers.commands import ROOT
from tests.helpers.launching import launch
from tests.helpers.marks import slow

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the loops by hand run on the CPU")


@pytest.fixture(autouse=True)
def new_accelerate_state() -> Iterator[None]:
    """Let Accelerate begin anew, since it keeps the precision of its first use."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def assert_same(
    model: nn.Module, losses: list[float], expected: nn.Module, expected_losses: list[list[float]], _: int
) -> None:
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert losses == [loss for (loss,) in expected_losses][-len(losses) :]


@pytest.mark.parametrize("mode", MODES)
def test_the_plain_loop_equals_the_one_by_hand(mode: str) -> None:
    scaler = torch.amp.GradScaler("cpu")
    model, losses = plain_loop.train(EPOCHS, **MODES[mode])
    assert_same(model, losses, *by_hand.train(torch.float16, scaler=scaler, **MODES[mode]))


@pytest.mark.parametrize("mode", MODES)
def test_the_loop_of_accelerate_equals_the_one_by_hand(mode: str) -> None:
    model, losses = accelerate_loop.train(EPOCHS, **MODES[mode])
    assert_same(model, losses, *by_hand.train(torch.bfloat16, seed_epochs=True, **MODES[mode]))


@pytest.mark.parametrize("mode", MODES)
def test_the_loop_of_fabric_equals_the_one_by_hand_also_when_resumed(mode: str, tmp_path: Path) -> None:
    expected = by_hand.train(torch.bfloat16, seed_epochs=True, **MODES[mode])
    fabric_loop.train(tmp_path / "checkpoint", EPOCHS // 2, **MODES[mode])
    model, losses = fabric_loop.train(tmp_path / "checkpoint", EPOCHS, **MODES[mode])
    assert len(losses) == len(expected[1]) // 2
    assert_same(model, losses, *expected)


def test_the_loops_learn() -> None:
    _, losses = plain_loop.train(mode="sync", rho=0.05)
    assert sum(losses[-3:]) < 0.2 * sum(losses[:3])


@pytest.mark.parametrize("mode", ["aga", slow("base"), slow("sync")])
def test_two_processes_equal_the_loop_by_hand(mode: str, tmp_path: Path) -> None:
    in_float32 = {**MODES[mode], "precision": "no", "ns_dtype": "float32"}
    runs = {"accelerate": MODES[mode], "fsdp2": in_float32, "fabric": MODES[mode]}
    first, second = launch(together, 2, tmp_path, runs)
    for loop, options in runs.items():
        shares = by_hand.every_nth_example if loop == "fabric" else by_hand.every_nth_batch
        dtype = torch.float32 if loop == "fsdp2" else torch.bfloat16
        options = {name: value for name, value in options.items() if name != "precision"}
        model, losses, unexchanged = by_hand.train(dtype, 2, shares, seed_epochs=True, **options)
        # Shards are summed in another order than complete tensors.
        tolerance = 1e-4 if loop == "fsdp2" else 0.0
        for name, param in model.named_parameters():
            assert torch.equal(first[loop]["params"][name], second[loop]["params"][name])
            torch.testing.assert_close(first[loop]["params"][name], param.detach(), rtol=0.0, atol=tolerance)
        for result, expected in zip((first, second), zip(*losses, strict=True), strict=True):
            assert result[loop]["losses"] == pytest.approx(expected, rel=tolerance, abs=0.0)
            assert result[loop]["unexchanged"] == (0 if loop == "fsdp2" else unexchanged)


@pytest.mark.slow
@pytest.mark.parametrize("example", [plain_loop, accelerate_loop, fabric_loop])
def test_the_command_of_its_docstring_trains_it(example: ModuleType, tmp_path: Path) -> None:
    assert example.__doc__ is not None
    command = example.__doc__.split("\n\n")[1].strip()
    assert f"```bash\n{command}\n```" in (ROOT / "docs/your_own_loop.md").read_text()
    words = shlex.split(command.replace(" examples/", f" {ROOT}/examples/").removeprefix("PYTHONPATH=. "))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words[0] = str(Path(sys.executable).parent / words[0])
    shown = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    final = re.findall(r"epoch 20: loss ([\d.]+)", shown.stdout)
    assert [float(loss) < 0.2 for loss in final] == [True]


def accumulate(**options: Any) -> float:
    """Accumulate two of ten micro-batches with Accelerate, and count the steps."""
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    model = network()
    optimizer = ARS2Neo(param_groups(model, policy="hidden"), **options)
    model, prepared, batches = accelerator.prepare(model, optimizer, loader())
    assert prepared.optimizer is optimizer and not hasattr(prepared, "passes")
    for inputs, targets in batches:
        with accelerator.accumulate(model):
            for _ in optimizer.passes(model):
                accelerator.backward(nn.functional.mse_loss(model(inputs), targets))
            prepared.step()
            prepared.zero_grad()
    return optimizer.diagnostics()["steps"]


def test_accelerate_accumulates_by_its_context_in_one_pass_only() -> None:
    assert accumulate(mode="base") == 5
    with pytest.raises(RuntimeError, match=r"accumulate all micro-batches of a step in its body"):
        accumulate(mode="sync")
