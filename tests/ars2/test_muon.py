"""Compare Muon with a plain float64 loop and torch's AdamW.

The loop is written for this test; AdamW is the reference of the vector track.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from ars2 import Muon
from tests.ars2.problems import SmallProblem, gradients, problem_groups, split_by_track
from tests.ars2.reference import geometry
from tests.ars2.training import closure_of, train, worst_difference

STEPS = 50
# Over 50 steps; measured: 1.0e-15 and 1.6e-6.
BOUNDS = {torch.float64: (6e-15, "float64"), torch.float32: (8e-6, "float32")}


def groups_of(model: SmallProblem, flatten: bool = False) -> list[dict[str, Any]]:
    params = split_by_track(model)
    matrix = {"params": params["matrix"], "lr": 0.005, "weight_decay": 0.2, "flatten": flatten}
    vector = {"params": params["vector"], "track": "vector", "lr": 0.003, "weight_decay": 0.01, "betas": (0.8, 0.97)}
    return [matrix, vector]


class PlainMuon:
    """Update one tensor at a time, in float64; leave the second group to AdamW."""

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float, momentum: float, nesterov: bool) -> None:
        self.params, self.lr, self.weight_decay = params, lr, weight_decay
        self.momentum, self.nesterov = momentum, nesterov
        self.buffers = [torch.zeros_like(p, requires_grad=False) for p in params]

    @torch.no_grad()
    def step(self, grads: list[Tensor], flatten: bool) -> None:
        for index, (p, g) in enumerate(zip(self.params, grads, strict=True)):
            decay = self.momentum
            self.buffers[index] = decay * self.buffers[index] + (1 - decay) * g
            direction = decay * self.buffers[index] + (1 - decay) * g if self.nesterov else self.buffers[index]
            if p.ndim == 3 and not flatten:
                rows, cols = p.shape[1], p.shape[2]
            else:
                rows, cols = p.shape[0], p[0].numel()
            update = geometry(direction, flatten, 5) * math.sqrt(max(1.0, rows / cols))
            p.copy_(p * (1 - self.lr * self.weight_decay) - self.lr * update)


@pytest.mark.parametrize(
    ("dtype", "nesterov", "flatten"),
    [(torch.float64, True, False), (torch.float64, False, True), (torch.float32, True, True)],
)
def test_follows_a_plain_loop(dtype: torch.dtype, nesterov: bool, flatten: bool) -> None:
    bound, ns_dtype = BOUNDS[dtype]
    model, plain_model = SmallProblem(dtype), SmallProblem(torch.float64)
    optimizer = Muon(groups_of(model, flatten), momentum=0.9, nesterov=nesterov, ns_dtype=ns_dtype, eps=1e-7)
    matrix, vector = groups_of(plain_model, flatten)
    plain = PlainMuon(matrix["params"], matrix["lr"], matrix["weight_decay"], 0.9, nesterov)
    adamw = torch.optim.AdamW(
        vector["params"], vector["lr"], betas=vector["betas"], eps=1e-7, weight_decay=vector["weight_decay"]
    )
    worst = 0.0
    for step in range(STEPS):
        optimizer.step(closure_of(model, optimizer, step))
        found = gradients(plain_model, [matrix, vector], step)
        count = len(matrix["params"])
        plain.step([g for g in found[:count] if g is not None], flatten)
        for p, g in zip(vector["params"], found[count:], strict=True):
            p.grad = g
        adamw.step()
        worst = max(worst, worst_difference(model.parameters(), plain_model.parameters()))
    assert worst <= bound


def test_the_vector_track_is_torch_adamw() -> None:
    model, plain = SmallProblem(torch.float64), SmallProblem(torch.float64)
    optimizer = Muon(
        [{"params": list(model.parameters()), "track": "vector"}], lr=0.01, betas=(0.9, 0.98), weight_decay=0.3
    )
    adamw = torch.optim.AdamW(plain.parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=0.3)
    train(model, optimizer, range(30))
    train(plain, adamw, range(30))
    assert worst_difference(model.parameters(), plain.parameters()) <= 1.6e-15  # measured: 3.3e-16


def test_state_is_a_momentum_for_matrices_and_two_moments_for_vectors() -> None:
    model = SmallProblem(torch.bfloat16)
    optimizer = Muon(groups_of(model))
    for p, state in optimizer.state.items():
        momenta = {"momentum_buffer"} if p.ndim > 1 else {"exp_avg", "exp_avg_sq", "step"}
        assert set(state) == momenta | {"remainder"}
        assert all(t.dtype == torch.float32 and t.shape in (p.shape, ()) for t in state.values())


@pytest.mark.parametrize("scheduler", [OneCycleLR, CyclicLR])
def test_schedulers_cycle_the_momentum_of_matrices(scheduler: type) -> None:
    params = [torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(4))]
    optimizer = Muon([{"params": params[:1]}, {"params": params[1:], "track": "vector"}], momentum=0.9)
    torch_muon = torch.optim.Muon([torch.nn.Parameter(torch.ones(3, 4))], momentum=0.9)
    options = {"max_lr": 0.1, "base_momentum": 0.8, "max_momentum": 0.95}
    options |= {"total_steps": 8} if scheduler is OneCycleLR else {"base_lr": 0.01, "step_size_up": 3}
    schedules = [scheduler(each, **options) for each in (optimizer, torch_muon)]
    seen = []
    for _ in range(5):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        torch_muon.step()
        for schedule in schedules:
            schedule.step()
        seen.append(optimizer.param_groups[0]["momentum"])
        assert optimizer.param_groups[0]["momentum"] == torch_muon.param_groups[0]["momentum"]
        assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)
    assert len(set(seen)) > 2
    other = Muon([torch.nn.Parameter(torch.ones(3, 4))])
    other.add_param_group({"params": [torch.nn.Parameter(torch.ones(4))], "track": "vector"})
    assert other.param_groups[1]["betas"] == (0.9, 0.95)


def test_the_step_size_follows_from_lr_and_shape() -> None:
    # Orthogonal rows of a wide matrix: an RMS of about lr * sqrt(1 / cols), whatever the size of the gradient.
    param = torch.nn.Parameter(torch.zeros(16, 64))
    optimizer = Muon([param], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    sizes = []
    for scale in (1e-4, 1e4):
        before = param.detach().clone()
        param.grad = torch.randn(16, 64, generator=generator) * scale
        optimizer.step()
        sizes.append((param.detach() - before).norm().item())
    assert all(0.1 * 4 * 0.6 < size < 0.1 * 4 * 1.2 for size in sizes)


def test_step_evaluates_a_closure_once_and_returns_its_value() -> None:
    model = SmallProblem()
    optimizer = Muon(problem_groups(model))
    expected = model.loss(0).item()
    assert optimizer.step(closure_of(model, optimizer, 0)).item() == expected
    assert [group["step"] for group in optimizer.param_groups] == [1, 1]


def test_the_loss_falls() -> None:
    model = SmallProblem()
    optimizer = Muon(groups_of(model))
    before = sum(model.loss(step).item() for step in range(3))
    train(model, optimizer, range(60))
    assert sum(model.loss(step).item() for step in range(3)) < 0.5 * before
