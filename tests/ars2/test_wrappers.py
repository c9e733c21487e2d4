"""Wrappers of torch pass other tensors than the model's parameters."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer

from ars2 import ARS2Neo, Muon


@pytest.fixture
def process(tmp_path: Path) -> Iterator[None]:
    """Make a process group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize(("use_orig_params", "cls"), [(False, ARS2Neo), (True, Muon)])
def test_parameters_that_fsdp1_flattens_are_refused(use_orig_params: bool, cls: type) -> None:
    model = FullyShardedDataParallel(nn.Linear(3, 4), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="fully_shard"):
        cls([{"params": list(model.parameters()), "track": "vector"}])


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("mode", ["sync", "periodic"])
def test_two_passes_under_zero_are_refused(mode: str) -> None:
    options: dict[str, Any] = {"mode": mode, "k": 2 if mode == "periodic" else 0}
    with pytest.raises(ValueError, match=f'use mode "base" with it, not "{mode}"'):
        ZeroRedundancyOptimizer([nn.Parameter(torch.ones(3, 4))], ARS2Neo, **options)


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize(("cls", "options"), [(ARS2Neo, {"mode": "base"}), (Muon, {})])
def test_one_pass_under_zero_is_a_step_without_it(cls: type, options: dict[str, Any]) -> None:
    params = [nn.Parameter(torch.arange(12.0).view(3, 4)) for _ in range(2)]
    under_zero = ZeroRedundancyOptimizer(params[:1], cls, **options)
    for param, optimizer in zip(params, (under_zero, cls(params[1:], **options)), strict=True):
        for step in range(1, 4):
            param.grad = torch.full((3, 4), float(step))
            optimizer.step()
    assert torch.equal(*params)
