"""Measure the optimizer's step beside other optimizers and the floor under it.

The floor is the time that the device needs at its measured limits: the operations of five standard Newton-Schulz
steps at the rate of a large bfloat16 product, plus the bytes that must move at the rate of a large copy. "gap" is the
device's time over the floor. Where the time in a row exceeds the device's, the host limits the step.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch

import ars2
from ars2 import ARS2Neo
from ars2.distributed import newton_schulz_cost
from ars2.orthogonalize import stack_shape
from benchmarks import device_timing, optimizer_step
from benchmarks.gpu_parts.report import NEEDS_GPU, Report, shown
from benchmarks.networks import build
from benchmarks.optimizer_step import Competitor, groups_of, matrices_of, parts, per_tensor, plain

NETWORKS = ("resnet18", "qwen3", "grokking")
COUNTED = ("resnet18", "qwen3")  # of which kernels are counted
NS_STEPS = 5
SECONDS = 0.12  # of each kind of time, an optimizer
# Reserved for counting kernels; the timings of the last network are left out instead.
SECONDS_OF_KERNELS = 4.0


class Contestant(NamedTuple):
    """Describe an optimizer and its floor.

    Args:
        make: builds the optimizer.
        floats: float32 numbers read and written for each parameter.
        orthogonalizes: whether its matrices go through Newton-Schulz.
        matrices_only: whether it takes the matrices alone, as torch.optim.Muon does.
    """

    make: Competitor
    floats: int
    orthogonalizes: bool = True
    matrices_only: bool = False


# Numbers a parameter: an update reads p, g, m, v and writes p, m, v. Perturb and restore read p, g, v, write p and its
# copy, read the copy and write p. AGA reads g and s for phi, then reads s again to inject it, or reads both gradients
# and writes s.
UPDATE, MOVE, PHI = 7, 7, 2
CONTESTANTS: dict[str, Contestant] = {
    "ARS2-Neo base": Contestant(plain(ARS2Neo, mode="base"), UPDATE),
    "ARS2-Neo sync": Contestant(parts(True, mode="sync"), UPDATE + MOVE),
    "ARS2-Neo aga, one pass": Contestant(parts(False, mode="aga", phi_lambda=1e9), UPDATE + PHI + 1),
    "ARS2-Neo aga, two passes": Contestant(parts(True, mode="aga", phi_lambda=1e9, k=2), UPDATE + MOVE + PHI + 3),
    "AdamW fused": Contestant(plain(torch.optim.AdamW, fused=True), UPDATE, orthogonalizes=False),
    "ars2.Muon, matrices": Contestant(plain(ars2.Muon), UPDATE - 2, matrices_only=True),
    "torch.optim.Muon, matrices": Contestant(plain(torch.optim.Muon), UPDATE - 2, matrices_only=True),
    "tensor by tensor, base": Contestant(per_tensor, UPDATE),
}


class Limits(NamedTuple):
    """Keep the FLOP/s in bfloat16 and the bytes a second that the device reaches."""

    rate: float
    bandwidth: float


def newton_schulz_operations(stacks: Iterable[torch.Size]) -> int:
    """Return the operations of five Newton-Schulz steps on stacks.

    A step takes ``4 r^2 n + 2 r^3`` for each of the matrices of a stack (matrices, rows, columns), r <= n.
    """
    return NS_STEPS * sum(2 * newton_schulz_cost(*stack) for stack in stacks)


def floor_milliseconds(operations: int, moved: int, limits: Limits) -> float:
    """Return the time of the operations plus that of the bytes at the limits."""
    return 1e3 * (operations / limits.rate + moved / limits.bandwidth)


def floor_of(groups: list[dict[str, Any]], contestant: Contestant, limits: Limits) -> float:
    """Return the floor under one optimizer's step on ``groups``, in milliseconds."""
    moved = 4 * contestant.floats * sum(param.numel() for group in groups for _, param in group["params"])
    stacks = [
        stack_shape(param.shape, group.get("flatten", False))
        for group in groups
        if group["track"] == "matrix" and contestant.orthogonalizes
        for _, param in group["params"]
    ]
    return floor_milliseconds(newton_schulz_operations(stacks), moved, limits)


def measured_limits(report: Report) -> Limits | None:
    """Measure and write the device's limits; ``None`` if that fails."""
    small = report.small
    rate = report.attempt("bf16 product", lambda: device_timing.peak_rate(report.device, 64 if small else 8192))
    speed = report.attempt("copy", lambda: device_timing.bandwidth(report.device, 1 << (10 if small else 28)))
    if not isinstance(rate, float) or not isinstance(speed, float):
        return None
    size = "64" if small else "8192"
    report.line(f"  reached: {rate / 1e12:.3g} TFLOP/s ({size} x {size} bf16 product), {speed / 1e12:.3g} TB/s (copy)")
    report.number("bf16 TFLOP/s", rate / 1e12)
    report.number("copy TB/s", speed / 1e12)
    return Limits(rate, speed)


def prepare(device: str, small: bool) -> None:
    """Import the libraries that the networks come from."""
    for network in NETWORKS:
        build(network, small=True)


def run(report: Report) -> None:
    """Measure the limits, then every optimizer on every network, then the kernels."""
    limits = measured_limits(report)
    for network in NETWORKS:
        report.line()
        columns = ["device ms", "in a row ms", "peak MB", "host syncs", "floor ms", "gap"]
        report.row(network, columns)
        needs = SECONDS_OF_KERNELS if network == NETWORKS[-1] else 0.0
        for name, contestant in CONTESTANTS.items():
            done = report.attempt(
                f"{network}, {name}",
                partial(measure, report, network, name, contestant, limits),
                needs,
            )
            if isinstance(done, str):
                report.row(name, [done])
    report.line()
    report.row("kernels a step", list(COUNTED))
    for name, contestant in CONTESTANTS.items():
        cells = [
            report.attempt(
                f"{network}, {name}, kernels",
                partial(kernels, report, network, contestant),
                needs=1.0,
                gpu=True,
            )
            for network in COUNTED
        ]
        report.row(name, [shown(cell, "d") for cell in cells])
        for network, cell in zip(COUNTED, cells, strict=True):
            report.number("kernels", cell, network=network, optimizer=name)


def groups_for(report: Report, network: str, contestant: Contestant) -> list[dict[str, Any]]:
    """Return the groups that an optimizer takes of ``network``."""
    make = matrices_of if contestant.matrices_only else groups_of
    return make(network, report.device, report.small)


def measure(report: Report, network: str, name: str, contestant: Contestant, limits: Limits | None) -> None:
    """Measure one optimizer on one network and write its row."""
    groups = groups_for(report, network, contestant)
    floor = "failed" if limits is None else floor_of(groups, contestant, limits)
    step, _ = contestant.make(groups)
    for _ in range(2):  # the first one makes state, the second one is of the kind that is measured
        step()
    device_timing.synchronize(report.device)
    seconds, label = report.seconds(SECONDS), f"{network}, {name}"
    found: dict[str, float | str | None] = {
        "device ms": report.attempt(label, lambda: device_timing.device_milliseconds(step, seconds), 0.5, gpu=True),
        "in a row ms": report.attempt(
            label, lambda: device_timing.milliseconds_in_a_row(step, report.device, seconds, 2), 0.5
        ),
        "peak MB": report.attempt(label, lambda: optimizer_step.peak_bytes(step, report.device) / 1e6),
        "host syncs": report.attempt(label, lambda: device_timing.host_syncs(step), gpu=True),
    }
    on_device = found["device ms"]
    gap: float | str = NEEDS_GPU if report.device == "cpu" else "unknown"
    if isinstance(on_device, float) and isinstance(floor, float):
        gap = on_device / floor
    forms = {"peak MB": ".1f", "host syncs": "d"}
    cells = [shown(value, forms.get(key, ".3f")) for key, value in found.items()]
    report.row(name, [*cells, shown(floor), shown(gap, ".1f")])
    for key, value in (*found.items(), ("floor ms", floor), ("gap", gap)):
        report.number(key, value, network=network, optimizer=name)


def kernels(report: Report, network: str, contestant: Contestant) -> int:
    """Count the kernels of a step."""
    step, _ = contestant.make(groups_for(report, network, contestant))
    for _ in range(2):
        step()
    return device_timing.kernels(step)
