"""Measure a full training step of each mode against AdamW, split into its phases.

    python -m benchmarks.step_cost [--networks grokking resnet18 qwen3] [--seconds 2] [--device cpu] [--json]
        [--picture FILE]

The networks and batches are those of benchmarks/networks.py, at the published settings of each task. A step is one or
two forward and backward passes and the optimizer's work. The modes alternate step by step, and the times of the phases
are medians. AGA and periodic are timed with a second pass at every second step. Their times are then weighted as for a
second pass at every tenth step. "passes" is the resulting number of gradient evaluations per step.
--processor-time is that of benchmarks/optimizer_step.py. On CUDA the passes run under bfloat16 autocast, ResNet-18 in
channels_last, Qwen3 with the chunked cross-entropy, and the device is synchronised between the phases of a step.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ars2 import ARS2Neo, param_groups
from benchmarks.device_timing import clock_of
from benchmarks.networks import TASKS, build, loss_function

COUNTED_PERIOD, TIMED_PERIOD = 10, 2
MODES: dict[str, dict[str, Any]] = {
    "base": {"mode": "base"},
    "sync": {"mode": "sync"},
    "aga": {"mode": "aga", "k": TIMED_PERIOD, "phi_lambda": 1e9},
    "periodic": {"mode": "periodic", "k": TIMED_PERIOD},
}


class Trainer:
    """Time the phases of the steps of one network and optimizer.

    Args:
        name: of the network.
        mode: ``"AdamW"`` or one of ``MODES``.
        clock: times the phases; on CUDA it must synchronise with the device.
        device: on CUDA the step is as in the published runs, see the top of this file.
        small: for a rehearsal, see :mod:`benchmarks.networks`.
        chunk: logits that the chunked cross-entropy makes at a time, 0 for its default; ``None`` makes all at once.
    """

    def __init__(
        self,
        name: str,
        mode: str,
        clock: Callable[[], float] = time.perf_counter,
        device: str = "cpu",
        small: bool = False,
        chunk: int | None = None,
    ) -> None:
        self.name, self.clock = name, clock
        torch.manual_seed(0)
        self.network: nn.Module = build(name, small).to(device)
        if device == "cuda" and name == "resnet18":
            self.network.to(memory_format=torch.channels_last)
        self.loss = loss_function(name, self.network, small, half=device == "cuda", chunk=chunk)
        # On a fixed batch gradients would otherwise become denormal numbers, which some processors multiply slowly.
        unchanging: dict[str, Any] = {"lr": 1e-9}
        self.optimizer: Any = (
            torch.optim.AdamW(self.network.parameters(), fused=True, **unchanging)
            if mode == "AdamW"
            else ARS2Neo(param_groups(self.network, "all"), **MODES[mode], **unchanging)
        )
        self.two_pass = mode not in ("AdamW", "base")
        # Seconds of a pass, and of the optimizer in steps without and with a second pass.
        self.passes: list[float] = []
        self.optimizer_seconds: dict[bool, list[float]] = {False: [], True: []}

    def forward_and_backward(self) -> float:
        start = self.clock()
        self.loss().backward()
        return self.clock() - start

    def step(self, record: bool) -> None:
        self.optimizer.zero_grad()
        passes = [self.forward_and_backward()]
        if self.two_pass:
            self.optimizer.param_groups[0]["phi_variance"] = 1.0  # AGA: the period alone decides
        start, again = self.clock(), False
        if self.two_pass and (again := self.optimizer.wants_second_pass()):
            self.optimizer.perturb()
            passes.append(self.forward_and_backward())
            self.optimizer.restore()
        self.optimizer.step()
        optimizer_seconds = self.clock() - start - sum(passes[1:])
        if record:
            self.passes += passes
            self.optimizer_seconds[again].append(optimizer_seconds)

    def result(self) -> dict[str, float]:
        """Return passes per step and the median milliseconds of each phase."""
        medians = {again: statistics.median(times) for again, times in self.optimizer_seconds.items() if times}
        rate = 0.0 if not self.two_pass else 1.0 if False not in medians else 1 / COUNTED_PERIOD
        optimizer = rate * medians.get(True, 0.0) + (1 - rate) * medians.get(False, 0.0)
        one_pass = statistics.median(self.passes)
        return {
            "passes": 1 + rate,
            "first_pass_ms": 1e3 * one_pass,
            "second_pass_ms": 1e3 * one_pass * rate,
            "optimizer_ms": 1e3 * optimizer,
            "step_ms": 1e3 * ((1 + rate) * one_pass + optimizer),
        }


def measure(
    name: str, seconds: float, clock: Callable[[], float] = time.perf_counter, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Alternate between AdamW and all modes, and return the phases of each step."""
    chunk = 0 if device == "cuda" else None
    trainers = {mode: Trainer(name, mode, clock, device, chunk=chunk) for mode in ("AdamW", *MODES)}
    return measure_in_turns(trainers, seconds)


def measure_in_turns(trainers: dict[str, Trainer], seconds: float) -> dict[str, dict[str, float]]:
    """Alternate between the trainers, and return the phases of each step."""
    for trainer in trainers.values():
        trainer.step(record=False)
    end, count = time.perf_counter() + seconds * len(trainers), 0
    # At least two periods, so that both kinds of step are measured.
    while count < 2 * TIMED_PERIOD or time.perf_counter() < end:
        for trainer in trainers.values():
            trainer.step(record=True)
        count += 1
    return {mode: trainer.result() for mode, trainer in trainers.items()}


def picture(found: dict[str, Any], file: Path) -> None:
    """Draw a stacked bar for each mode and task, relative to AdamW's step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(4 * len(found), 3.2), squeeze=False)
    for axis, (name, modes) in zip(axes[0], found.items(), strict=True):
        adamw, bottom = modes["AdamW"]["step_ms"], [0.0] * len(modes)
        for part in ("first_pass_ms", "second_pass_ms", "optimizer_ms"):
            heights = [row[part] / adamw for row in modes.values()]
            axis.bar(list(modes), heights, bottom=bottom, label=part.removesuffix("_ms").replace("_", " "))
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axis.set(title=name, ylabel="step, AdamW = 1")
        axis.tick_params(axis="x", rotation=45)
    axes[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seconds", type=float, default=2.0, help="measured seconds a mode and task")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processor-time", action="store_true", help="measure CPU time instead of wall-clock time")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--picture", type=Path, help="write the stacked bars to this file")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    device = options.device
    clock = clock_of(device, time.process_time if options.processor_time else time.perf_counter)
    kind = "processor's" if options.processor_time else "clock's"
    if not options.json:
        print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, the {kind} time")
        print("network    mode       passes  first ms  second ms  optimizer ms   step ms   / AdamW")
    for name in options.networks:
        found[name] = measure(name, options.seconds, clock, device)
        for mode, row in found[name].items() if not options.json else ():
            parts = f"{row['first_pass_ms']:9.2f} {row['second_pass_ms']:10.2f} {row['optimizer_ms']:13.2f}"
            ratio = row["step_ms"] / found[name]["AdamW"]["step_ms"]
            print(f"{name:<10} {mode:<10} {row['passes']:6.1f} {parts} {row['step_ms']:9.2f} {ratio:8.2f}x", flush=True)
    if options.picture:
        picture(found, options.picture)
    if options.json:
        print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), **found}))


if __name__ == "__main__":
    sys.exit(main())
