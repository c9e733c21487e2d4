"""Measure the optimizer step of two checkouts of this project side by side.

    git worktree add ../before COMMIT
    python -m benchmarks.two_checkouts ../before [--networks grokking resnet18 qwen3] [--seconds 3]

One process for each checkout makes the same steps; they alternate row by row, so that other work on the machine slows
both alike. Times are medians. On grokking a forward and backward pass precedes every step, as in training, and the last
column is the complete step, passes included, over AdamW's. On the other networks gradients are random and the passes
are left out. The products row is the time of the matrix products of five steps on grokking's shapes, without
normalisation, copies or any other work.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NETWORKS = ("grokking", "resnet18", "qwen3")
PASSES, PRODUCTS, ADAMW = "forward and backward", "products of five steps", "torch.optim.AdamW fused"


def rows(name: str) -> dict[str, Callable[[], float]]:
    """Return a function for each row that makes one step and returns its seconds."""
    import torch

    import ars2
    from ars2 import ARS2Neo, param_groups
    from benchmarks.networks import build, loss_function
    from benchmarks.optimizer_step import groups_of, matrices_of, use_the_allocator_as_training_does
    from benchmarks.per_tensor import PerTensorARS2

    use_the_allocator_as_training_does()
    torch.manual_seed(0)
    trained = name == "grokking"
    network = build(name) if trained else None
    loss = loss_function(name, network) if network is not None else None

    def passes() -> float:
        start = time.perf_counter()
        if network is not None and loss is not None:
            network.zero_grad()
            loss().backward()
        return time.perf_counter() - start

    def groups() -> list[dict[str, Any]]:
        return param_groups(network, "all") if network is not None else groups_of(name)

    def timed(step: Callable[[], Any]) -> Callable[[], float]:
        def call() -> float:
            passes()
            start = time.perf_counter()
            step()
            return time.perf_counter() - start

        return call

    # A learning rate that changes nothing: on a fixed batch gradients would become denormal numbers, which are slow.
    lr: dict[str, Any] = {"lr": 1e-9}
    found: dict[str, Callable[[], float]] = {PASSES: passes} if trained else {}
    found[ADAMW] = timed(torch.optim.AdamW([p for g in groups() for _, p in g["params"]], fused=True, **lr).step)
    found["ARS2-Neo, tensor by tensor"] = timed(PerTensorARS2(groups(), **lr).step)
    for steps in (5, 3, 2):
        found[f"ARS2-Neo base, {steps} steps"] = timed(ARS2Neo(groups(), mode="base", ns_steps=steps, **lr).step)
    found["ARS2-Neo sync"] = timed(step_by_parts(ARS2Neo(groups(), mode="sync", **lr)))
    # A threshold that phi does not reach: only the first step makes a second pass.
    found["ARS2-Neo aga, one pass"] = timed(step_by_parts(ARS2Neo(groups(), mode="aga", phi_lambda=1e9, **lr)))
    found["torch.optim.Muon, matrices"] = timed(torch.optim.Muon(matrices_of(name), **lr).step)
    found["ars2.Muon, matrices"] = timed(ars2.Muon(matrices_of(name), **lr).step)
    if trained:
        found[PRODUCTS] = timed(products())
    return found


def step_by_parts(optimizer: Any) -> Callable[[], None]:
    """Return a step that makes a second pass where wanted, with the flipped gradient as the second one."""

    def step() -> None:
        if optimizer.wants_second_pass():
            optimizer.perturb()
            for param, gradient in optimizer.first_gradients.items():
                param.grad = gradient.flip(0)
            optimizer.restore()
        else:
            optimizer.param_groups[0]["phi_variance"] = 1.0
        optimizer.step()

    return step


def products() -> Callable[[], None]:
    """Return the products of five steps on grokking's matrices, each shape by its faster algorithm."""
    import torch

    # The operands stay the same, since results that are not iterated would become denormal numbers.
    wide = torch.randn(3, 128, 128).bfloat16()
    elongated = [
        (torch.randn(shape), torch.randn(shape[0], shape[1], shape[1])) for shape in ((12, 32, 128), (2, 128, 512))
    ]

    def multiply() -> None:
        with torch.no_grad():
            for _ in range(5):
                torch.bmm(wide, wide.mT)
                torch.baddbmm(wide, wide, wide)
                torch.baddbmm(wide, wide, wide)
            for stack, square in elongated:
                torch.bmm(stack, stack.mT)
                for step in range(5):
                    torch.baddbmm(square, square, square)
                    for _ in range((step > 0) + 2 * (step < 4)):
                        torch.bmm(square, square)
                torch.bmm(square, stack)

    return multiply


def work(name: str) -> None:
    """Make the steps of a row for each line of standard input, and print their median seconds.

    They take a turn of at least 0.2 seconds. The first step is not counted, since threads of the other process may
    still spin.
    """
    calls = rows(name)
    for call in calls.values():
        call()
    print(json.dumps(list(calls)), flush=True)
    for line in sys.stdin:
        call, end = calls[line.strip()], time.perf_counter() + 0.2
        call()
        times = [call()]
        while time.perf_counter() < end:
            times.append(call())
        print(statistics.median(times), flush=True)


def start(checkout: Path, name: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    command = [sys.executable, str(Path(__file__).resolve()), "--work", name]
    return subprocess.Popen(
        command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask(process: "subprocess.Popen[str]", line: str | None = None) -> Any:
    assert process.stdin is not None and process.stdout is not None
    if line is not None:
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError("a measuring process ended: run it by hand with --work NETWORK to see why")
    return json.loads(answer)


def measure(checkouts: list[Path], name: str, seconds: float) -> dict[str, list[float]]:
    """Return the median seconds of each row in each checkout."""
    processes = [start(checkout, name) for checkout in checkouts]
    names, *_ = [ask(process) for process in processes]
    times: dict[str, list[list[float]]] = {row: [[] for _ in processes] for row in names}
    end = time.perf_counter() + seconds * len(names)
    while time.perf_counter() < end or len(times[names[0]][0]) < 5:
        for row in names:
            for found, process in zip(times[row], processes, strict=True):
                found.append(ask(process, row))
    for process in processes:
        process.kill()
    return {row: [statistics.median(found) for found in both] for row, both in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?", help="the other checkout")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seconds", type=float, default=3.0, help="measured seconds a row and network")
    parser.add_argument("--work", choices=NETWORKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work)
        return
    if options.before is None or not (options.before / "ars2").is_dir():
        parser.error(f"{options.before} is no checkout of this project: make one with git worktree add")
    import torch

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for name in options.networks:
        found = measure([options.before, Path(__file__).parents[1]], name, options.seconds)
        print(f"\n{name:<28} {'before ms':>10} {'ms':>10} {'faster':>8}   complete step / AdamW's, before and now")
        passes, adamw = found.get(PASSES), found[ADAMW]
        for row, (before, now) in found.items():
            line = f"{row:<28} {1e3 * before:10.3f} {1e3 * now:10.3f} {before / now:7.2f}x"
            if passes is not None and row.startswith("ARS2-Neo base"):
                ratios = [(passes[i] + (before, now)[i]) / (passes[i] + adamw[i]) for i in (0, 1)]
                line += f"   {ratios[0]:.2f} {ratios[1]:.2f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
