"""Measure optimizer steps on the parameter shapes of the tasks and GPT-2.

    python -m benchmarks.optimizer_step [--networks grokking resnet18 qwen3 gpt2] [--seconds 5] [--device cpu] [--json]

The first table is of complete models. It compares ARS2-Neo in its modes (policy "all", optimizer only, no forward or
backward), the same algorithm written tensor by tensor (benchmarks/per_tensor.py), and torch's AdamW. The second table
compares implementations of Muon on the matrix track. Convolutions are flattened to (out, in*kh*kw) and stacks are split
into matrices, because torch.optim.Muon accepts only 2-D tensors.

All run five Newton-Schulz steps in bfloat16 and keep float32 state. They alternate in turns of 50 ms, or of one step if
that is longer, until each has run for --seconds (at least three turns), so that a slowdown of the machine affects all.
Times are medians. The first of many steps in a turn is not counted, because its caches are cold. heavyball compiles its
step by default; of the others only the row named "compiled" does. All optimizers are in memory at the same time.

--processor-time measures CPU time instead of wall-clock time. With one thread (OMP_NUM_THREADS=1) it hardly depends on
the machine's other load. On CUDA the device is synchronised after each step.

"peak" is the peak memory of a step beyond parameters, gradients and state. "state" is the memory kept between steps.
"""

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import ars2
from ars2 import ARS2Neo, param_groups
from ars2.orthogonalize import stack_shape
from benchmarks import device_timing
from benchmarks.networks import NETWORKS, build
from benchmarks.per_tensor import PerTensorARS2

PER_TENSOR, TORCH_MUON = "ARS2-Neo, tensor by tensor", "torch.optim.Muon"
Step = Callable[[], Any]
# Makes the optimizer of a list of groups; returns its step and its state tensors.
Competitor = Callable[[list[dict[str, Any]]], tuple[Step, Callable[[], list[Tensor]]]]


def groups_of(name: str, device: str = "cpu", small: bool = False) -> list[dict[str, Any]]:
    """Return a network's groups under policy "all", with random gradients."""
    with torch.device("meta"):
        groups = param_groups(build(name, small), "all")
    torch.manual_seed(0)
    for group in groups:
        group["params"] = [(key, _random(p.shape, device)) for key, p in group["params"]]
    return groups


def matrices_of(name: str, device: str = "cpu", small: bool = False) -> list[dict[str, Any]]:
    """Return the matrix track of a network as one group of 2-D tensors."""
    with torch.device("meta"):
        groups = [group for group in param_groups(build(name, small), "all") if group["track"] == "matrix"]
    torch.manual_seed(0)
    params = []
    for group in groups:
        for key, p in group["params"]:
            matrices, rows, columns = stack_shape(p.shape, group.get("flatten", False))
            params += [(f"{key}.{index}", _random((rows, columns), device)) for index in range(matrices)]
    return [{"params": params, "track": "matrix"}]


def _random(shape: Any, device: str) -> nn.Parameter:
    param = nn.Parameter(torch.randn(shape, device=device) * 0.02)
    param.grad = torch.randn(shape, device=device) * 1e-3
    return param


def _state_of(optimizer: Any) -> Callable[[], list[Tensor]]:
    def tensors(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            for part in value.values():
                yield from tensors(part)

    def state() -> list[Tensor]:
        params = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [t for t in tensors(dict(optimizer.state)) if id(t) not in params]

    return state


def plain(make: Callable[..., Any], **options: Any) -> Competitor:
    """Measure an optimizer by its ``step()`` alone."""

    def competitor(groups: list[dict[str, Any]]) -> tuple[Step, Callable[[], list[Tensor]]]:
        optimizer = make(groups, **options)
        return optimizer.step, _state_of(optimizer)

    return competitor


def per_tensor(groups: list[dict[str, Any]]) -> tuple[Step, Callable[[], list[Tensor]]]:
    optimizer = PerTensorARS2(groups)
    return optimizer.step, lambda: [t for pair in optimizer.moments for t in pair]


def parts(two_pass: bool, **options: Any) -> Competitor:
    """Call ARS2-Neo's phases separately, with or without a second pass.

    The passes themselves cost nothing here, because gradients are assigned.
    """

    def competitor(groups: list[dict[str, Any]]) -> tuple[Step, Callable[[], list[Tensor]]]:
        optimizer = ARS2Neo(groups, **options)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        first = [p.grad for p in params]
        second = [g.flip(0) for g in first if g is not None]

        def put(gradients: list[Any]) -> None:
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient

        def step() -> None:
            put(first)
            if two_pass:
                optimizer.param_groups[0]["last_sync"] = -2  # a period ago, so that phi does not matter
            else:
                optimizer.param_groups[0]["phi_variance"] = 1.0  # a threshold that phi cannot reach
            wanted = optimizer.wants_second_pass()
            if wanted:
                optimizer.perturb()
                put(second)
                optimizer.restore()
            if wanted != two_pass and optimizer.diagnostics()["steps"] > 0:
                raise RuntimeError("the measured step has the wrong number of passes")
            optimizer.step()

        return step, _state_of(optimizer)

    return competitor


def pytorch_optimizer_muon(groups: list[dict[str, Any]]) -> tuple[Step, Callable[[], list[Tensor]]]:
    from pytorch_optimizer import Muon

    params = [p for group in groups for _, p in group["params"]]
    optimizer = Muon([{"params": params, "use_muon": True}])
    return optimizer.step, _state_of(optimizer)


def heavyball_muon(groups: list[dict[str, Any]]) -> tuple[Step, Callable[[], list[Tensor]]]:
    import heavyball

    params = [p for group in groups for _, p in group["params"]]
    gradients = [p.grad for p in params]
    optimizer = heavyball.Muon(params)

    def step() -> None:
        for p, gradient in zip(params, gradients, strict=True):  # heavyball clears the gradients
            p.grad = gradient
        optimizer.step()

    return step, _state_of(optimizer)


WHOLE_MODEL: dict[str, Competitor] = {
    PER_TENSOR: per_tensor,
    "ARS2-Neo base": plain(ARS2Neo, mode="base"),
    "ARS2-Neo base, compiled": plain(ARS2Neo, mode="base", compile=True),
    "ARS2-Neo sync": parts(True, mode="sync"),
    "ARS2-Neo aga, one pass": parts(False, mode="aga", phi_lambda=1e9),
    "ARS2-Neo aga, two passes": parts(True, mode="aga", phi_lambda=1e9, k=2),
    "torch.optim.AdamW foreach": plain(torch.optim.AdamW, foreach=True),
    "torch.optim.AdamW fused": plain(torch.optim.AdamW, fused=True),
}
MATRICES: dict[str, Competitor] = {
    TORCH_MUON: plain(torch.optim.Muon),
    "ars2.Muon": plain(ars2.Muon),
    "ARS2-Neo base": plain(ARS2Neo, mode="base"),
    "pytorch_optimizer.Muon": pytorch_optimizer_muon,
    "heavyball.Muon": heavyball_muon,
}


def peak_bytes(step: Step, device: str = "cpu") -> int:
    """Return the peak of bytes that ``step`` allocates, as the allocator counts them."""
    if device == "cuda":
        return device_timing.peak_bytes(step)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def use_the_allocator_as_training_does() -> None:
    """Make glibc keep freed memory, as it does in a training process.

    glibc raises its mmap threshold when a large block is freed for the first time, which the first training step does.
    """
    torch.empty(31 << 18)


def turn(step: Step, clock: Callable[[], float]) -> list[float]:
    """Make steps for 50 ms, and return the milliseconds of each measured one."""
    times: list[float] = []
    end = time.perf_counter() + 0.05
    while not times or time.perf_counter() < end:
        start = clock()
        step()
        times.append(1e3 * (clock() - start))
    return times[1:] or times


def measure(
    competitors: dict[str, Competitor],
    make_groups: Callable[[], list[dict[str, Any]]],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    device: str = "cpu",
) -> dict[str, dict[str, float]]:
    """Alternate between optimizers, and return median milliseconds and peak bytes.

    On CUDA ``clock`` must synchronise with the device, see :func:`benchmarks.device_timing.clock_of`.
    """
    results: dict[str, dict[str, float]] = {}
    steps: dict[str, Step] = {}
    for name, competitor in competitors.items():
        step, state = competitor(make_groups())
        step()
        held = sum(t.numel() * t.element_size() for t in state())
        steps[name], results[name] = step, {"peak": peak_bytes(step, device), "state": held}
    times: dict[str, list[float]] = {name: [] for name in competitors}
    end, turns = time.perf_counter() + seconds * len(steps), 0
    while turns < 3 or time.perf_counter() < end:
        for name, step in steps.items():
            times[name] += turn(step, clock)
        turns += 1
    for name, values in times.items():
        results[name]["ms"] = statistics.median(values)
    return results


def table(title: str, results: dict[str, dict[str, float]], against: str) -> str:
    """Return the results as text, with the speed relative to ``against`` as "faster"."""
    lines = [f"{title:<40} {'ms/step':>9} {'faster':>8} {'peak MB':>9} {'state MB':>9}"]
    for name, row in results.items():
        ratio = results[against]["ms"] / row["ms"]
        megabytes = f"{row['peak'] / 1e6:9.2f} {row['state'] / 1e6:9.2f}"
        lines.append(f"  {name:<38} {row['ms']:9.3f} {ratio:7.2f}x {megabytes}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seconds", type=float, default=5.0, help="measured seconds an optimizer")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="leave out optimizers whose name does not contain this")
    parser.add_argument("--processor-time", action="store_true", help="measure CPU time instead of wall-clock time")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    use_the_allocator_as_training_does()
    found: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    device = options.device
    clock = device_timing.clock_of(device, time.process_time if options.processor_time else time.perf_counter)
    found["time"] = "processor's" if options.processor_time else "clock's"
    found["processor"] = (
        torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    )
    if not options.json:
        print(
            f"torch {found['torch']}, {found['threads']} threads, {found['processor']}, the {found['time']} time",
            flush=True,
        )
    for name in options.networks:
        found[name] = {}
        for part, competitors, make, against in (
            ("whole model", WHOLE_MODEL, groups_of, PER_TENSOR),
            ("matrices", MATRICES, matrices_of, TORCH_MUON),
        ):
            chosen = {key: value for key, value in competitors.items() if options.only in key or key == against}
            results = measure(chosen, lambda make=make, name=name: make(name, device), options.seconds, clock, device)
            found[name][part] = results
            if not options.json:
                print("\n" + table(f"{name}, {part}", results, against), flush=True)
    if options.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    sys.exit(main())
