"""Compare twenty steps of every mode on GPU and CPU, in float32.

A float64 run shows which of the two is off. Both get the same gradients, which do not depend on the parameters:
differences would feed back otherwise. Adversarial points are compared too, since such gradients do not reflect them.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ars2 import ARS2Neo, Muon
from benchmarks.gpu_parts.report import Report, shown

STEPS = 20
# Of |a - b| / |b|, the largest over tensors and steps. Newton-Schulz multiplies the rounding of a small singular value
# by up to 3.4445^5 = 485, and 20 steps of it add up: on a CPU float32 is 3e-6 off float64.
TOLERANCE = 3e-5
# A convolution, heads, an embedding and linear layers, one of them tall; gains and biases.
MATRICES = ((16, 8, 3, 3), (4, 32, 64), (113, 64), (64, 256), (300, 40), (96, 96))
VECTORS = ((64,), (300,), (1,))
MODES: dict[str, dict[str, Any]] = {
    "base": {"mode": "base"},
    "sync": {"mode": "sync"},
    "aga": {"mode": "aga", "k": 6, "phi_lambda": 1.0},
    "periodic": {"mode": "periodic", "k": 3},
    "random": {"mode": "random", "probability": 0.3, "seed": 5},
    "Muon": {},
}


class Trajectory(NamedTuple):
    """Keep the parameters of one mode, in float64 on the CPU, and its two-pass steps."""

    adversarial: list[list[Tensor]]
    final: list[Tensor]
    two_pass: list[int]


def draws(seed: int) -> list[Tensor]:
    """Return one tensor of each shape, normal, in float32."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in (*MATRICES, *VECTORS)]


def trajectory(mode: str, device: str, dtype: torch.dtype) -> Trajectory:
    """Make the steps of ``mode`` on ``device``, parameters and products in ``dtype``."""
    params = [torch.nn.Parameter((0.1 * draw).to(device, dtype)) for draw in draws(0)]
    matrices, vectors = params[: len(MATRICES)], params[len(MATRICES) :]
    groups = [{"params": matrices, "track": "matrix"}, {"params": vectors, "track": "vector", "lr": 3e-3}]
    ns_dtype = str(dtype).removeprefix("torch.")
    optimizer: Any = (
        Muon(groups, ns_dtype=ns_dtype)
        if mode == "Muon"
        else ARS2Neo(groups, lr=2e-3, rho=0.1, ns_dtype=ns_dtype, **MODES[mode])
    )
    adversarial: list[list[Tensor]] = []
    two_pass: list[int] = []
    common = draws(1)
    for step in range(STEPS):
        first, turn = draws(2 + step), draws(1000 + step)
        for param, mean, noise in zip(params, common, first, strict=True):
            param.grad = (1e-3 * (mean + noise)).to(device, dtype)
        if mode not in ("base", "Muon") and optimizer.wants_second_pass():
            two_pass.append(step + 1)
            optimizer.perturb()
            adversarial.append(list(to_host(params)))
            for param, mean, noise, other in zip(params, common, first, turn, strict=True):
                param.grad = (1e-3 * (mean + noise + 0.5 * other)).to(device, dtype)
            optimizer.restore()
        optimizer.step()
    return Trajectory(adversarial, list(to_host(params)), two_pass)


def to_host(params: list[torch.nn.Parameter]) -> Iterator[Tensor]:
    """Yield copies on the CPU, in float64."""
    for param in params:
        yield param.detach().to("cpu", torch.float64, copy=True)


def difference(left: list[Tensor], right: list[Tensor]) -> float:
    """Return the largest ``|a - b| / |b|`` over the tensors; NaN counts as infinite."""
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        relative = ((a - b).norm() / b.norm()).item()
        worst = max(worst, relative if relative == relative else float("inf"))
    return worst


def at_adversarial_points(left: Trajectory, right: Trajectory) -> float | str:
    """Return the largest difference at any adversarial point."""
    if not left.adversarial:
        return "none"
    if left.two_pass != right.two_pass:
        return "other steps"
    return max(difference(a, b) for a, b in zip(left.adversarial, right.adversarial, strict=True))


def run(report: Report) -> None:
    """Compare every mode."""
    # Tensors this small gain nothing from threads, and compilers use the cores at the same time.
    torch.set_num_threads(1)
    # Else the GPU may round the factors of float32 products to TF32's ten bits.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    report.line(f"  {STEPS} steps, largest |a - b| / |b| of a tensor; at most {TOLERANCE:g} is allowed")
    columns = ["GPU - CPU", "GPU - f64", "CPU - f64", "at p_adv", "two-pass"]
    report.row("mode", columns, 11)
    for mode in MODES:
        report.attempt(mode, partial(compare, report, mode))


def compare(report: Report, mode: str) -> None:
    """Compare one mode and write its row."""
    on_device = trajectory(mode, report.device, torch.float32)
    on_cpu, exact = (trajectory(mode, "cpu", dtype) for dtype in (torch.float32, torch.float64))
    pairs = {"GPU - CPU": (on_device, on_cpu), "GPU - f64": (on_device, exact), "CPU - f64": (on_cpu, exact)}
    found: dict[str, float | str] = {key: difference(a.final, b.final) for key, (a, b) in pairs.items()}
    found["at p_adv"] = at_adversarial_points(on_device, on_cpu)
    count = f"{len(on_device.two_pass)} of {STEPS}"
    report.row(mode, [*(shown(value, ".1e") for value in found.values()), count], 11)
    for key, value in found.items():
        report.number(key, value, mode=mode)
    numbers = [value for value in (found["GPU - CPU"], found["at p_adv"]) if not isinstance(value, str)]
    report.check(f"{mode}, parameters", max(numbers) <= TOLERANCE, f"{max(numbers):.1e}")
    same = on_device.two_pass == on_cpu.two_pass == exact.two_pass
    report.check(
        f"{mode}, decisions",
        same,
        f"steps {on_device.two_pass}" if same else f"{on_device.two_pass}, CPU {on_cpu.two_pass}, {exact.two_pass}",
    )
