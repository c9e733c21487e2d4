"""Compare a Base step on ResNet-18's shapes eager, as a CUDA graph, and compiled."""

import os
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor

from ars2 import ARS2Neo
from benchmarks.device_timing import Step, device_milliseconds, milliseconds_in_a_row, synchronize
from benchmarks.gpu_parts.parity import difference
from benchmarks.gpu_parts.report import Report, shown
from benchmarks.optimizer_step import groups_of

NETWORK = "resnet18"
WARM_UP, COMPARED = 3, 5
SECONDS = 0.3
# Largest |a - b| / |b| after the last step. A graph launches the same kernels, and a capturable step has its learning
# rate in float32. A compiler may round bfloat16 products at other places, by 2^-8 of a direction.
SAME, ROUNDED = 1e-5, 1e-3
OPTIMIZER_JOB = "optimizer step"
# Seconds that dynamo and a warm cache may take, and a cold compilation.
WARM, COLD = 3.0, 100.0


def prepare(device: str, small: bool) -> None:
    """Start to compile in separate processes, which end with this part at the latest."""
    from benchmarks.gpu_parts import compile_ahead

    # Torch would start a worker process a core for each job.
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    for job in compile_ahead.JOBS:
        command = [sys.executable, "-m", "benchmarks.gpu_parts.compile_ahead", job, device, str(int(small))]
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


def make(device: str, small: bool, **options: Any) -> tuple[ARS2Neo, list[Tensor]]:
    """Return a Base optimizer on the network's shapes, and its parameters."""
    groups = groups_of(NETWORK, device, small)
    params = [param for group in groups for _, param in group["params"]]
    return ARS2Neo(groups, mode="base", **options), params


def captured(optimizer: ARS2Neo) -> Step:
    """Make warm-up steps, capture a step, which is not made, and return its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay


def after_some_steps(step: Step, params: list[Tensor], count: int) -> list[Tensor]:
    """Make ``count`` steps; returns the parameters in float64 on the CPU."""
    for _ in range(count):
        step()
    return [param.detach().to("cpu", torch.float64, copy=True) for param in params]


def run(report: Report) -> None:
    """Measure the step eager, capturable, captured and compiled.

    Compilation is last because it may take a minute; results that were compiled ahead are read from disk.
    """
    ahead = report.attempt("compiled ahead", lambda: report.compiled_ahead(OPTIMIZER_JOB))
    report.row(f"Base on {NETWORK}", ["device ms", "in a row ms", "prepared s", "difference"])
    eager = report.attempt("eager", lambda: one(report, "eager", {}, None))
    expected = eager if isinstance(eager, list) else None
    kept = report.attempt("capturable", lambda: one(report, "capturable", {"capturable": True}, expected))
    report.attempt(
        "CUDA graph",
        lambda: one(report, "CUDA graph", {"capturable": True}, kept if isinstance(kept, list) else None),
        needs=1.0,
        gpu=True,
    )
    needs = COLD if ahead is None else WARM
    done = report.attempt("compiled", lambda: one(report, "compiled", {"compile": True}, expected), needs=needs)
    if isinstance(done, str):
        report.row("compiled", [done])


def one(report: Report, name: str, options: dict[str, Any], expected: list[Tensor] | None) -> list[Tensor]:
    """Measure one way to make the step; returns the parameters after the steps."""
    optimizer, params = make(report.device, report.small, **options)
    start = time.perf_counter()
    if name == "compiled":
        report.line("  compiling ...")
    if name == "CUDA graph":
        step: Step = captured(optimizer)
    else:
        step = optimizer.step
        for _ in range(WARM_UP):
            step()
    synchronize(report.device)
    prepared = time.perf_counter() - start
    found = after_some_steps(step, params, COMPARED)
    off = "none" if expected is None else difference(found, expected)
    seconds = report.seconds(SECONDS)
    on_device = report.attempt(name, lambda: device_milliseconds(step, seconds), gpu=True)
    in_a_row = report.attempt(name, lambda: milliseconds_in_a_row(step, report.device, seconds, 2))
    report.row(name, [shown(on_device), shown(in_a_row), f"{prepared:.1f}", shown(off, ".1e")])
    for key, value in (("device ms", on_device), ("in a row ms", in_a_row), ("prepared s", prepared), ("off", off)):
        report.number(key, value, way=name)
    if isinstance(off, float):
        most = ROUNDED if name == "compiled" else SAME
        report.check(
            f"{name}, parameters after {WARM_UP + COMPARED} steps", off <= most, f"{off:.1e}, at most {most:g}"
        )
    return found
