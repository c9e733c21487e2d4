"""Measure training steps, concurrent processes, loss chunks, and compilation.

Under bfloat16 autocast, ResNet-18 in channels_last on batches of 256 images, Qwen3 on 8 rows of 255 tokens with the
chunked cross-entropy. The worker processes of the second table run this module, with device and size as arguments.
"""

import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch

from benchmarks import cross_entropy, optimizer_step
from benchmarks.device_timing import clock_of, milliseconds_in_a_row, synchronize
from benchmarks.gpu_parts.report import Report, shown
from benchmarks.networks import build
from benchmarks.step_cost import COUNTED_PERIOD, Trainer, measure_in_turns

NETWORKS = ("qwen3", "resnet18")
MODES = ("AdamW", "base", "sync", "aga")
SECONDS = 0.35  # a mode and kind of time
PROCESSES, TOGETHER = (1, 2, 3), 1.2  # seconds
CHUNKS = (1 << 23, 1 << 25, 1 << 27)  # logits at a time
workers: list[subprocess.Popen[str]] = []


def prepare(device: str, small: bool) -> None:
    """Import the libraries, and start the worker processes, which wait."""
    command = [sys.executable, "-u", "-m", "benchmarks.gpu_parts.training", device, str(int(small))]
    for _ in range(max(PROCESSES)):
        workers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    for network in NETWORKS:
        build(network, small=True)


def work(device: str, small: bool) -> None:
    """Train Qwen3 under Base as the lines of standard input ask for it.

    A line "warm" asks for three steps, a number for steps during as many seconds. The answer is the number of steps.
    """
    torch.set_num_threads(1)
    trainer = Trainer("qwen3", "base", device=device, small=small, chunk=0)
    for line in sys.stdin:
        seconds = 0.0 if line.strip() == "warm" else float(line)
        end, count = time.perf_counter() + seconds, 0
        while count < 3 or time.perf_counter() < end:
            trainer.step(record=False)
            synchronize(device)
            count += 1
        print(count, flush=True)


def ask(process: "subprocess.Popen[str]", line: str) -> None:
    """Send a line to a worker."""
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def answer(process: "subprocess.Popen[str]") -> int:
    """Return the number of steps that a worker made."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a worker ended with {process.wait()}")
    return int(line)


def run(report: Report) -> None:
    """Make the four tables."""
    for network in NETWORKS:
        report.attempt(network, partial(modes, report, network))
        if network == NETWORKS[0]:
            report.line()
            report.attempt("processes at once", lambda: at_once(report), needs=2.0)
            for worker in workers:
                worker.kill()
        report.line()
    report.attempt("chunks", lambda: chunks(report), needs=1.0)
    report.line()
    report.row("compiled network, base", ["eager ms", "compiled ms", "compiled in s"])
    for network in NETWORKS:
        ahead = report.attempt(network, partial(report.compiled_ahead, network))
        # Twice the time with a warm cache, or that of a cold compilation.
        done = report.attempt(network, partial(compiled, report, network), needs=100.0 if ahead is None else 5.0)
        if isinstance(done, str):
            report.row(network, [done])


def trainer_of(report: Report, network: str, mode: str, clock: Any = time.perf_counter) -> Trainer:
    """Return the trainer of a network in one mode."""
    return Trainer(network, mode, clock, report.device, report.small, chunk=0)


def modes(report: Report, network: str) -> None:
    """Time the parts of a step in each mode, and steps in a row."""
    report.row(network, ["passes", "a pass ms", "optimizer ms", "step ms", "in a row ms", "/ AdamW"])
    trainers = {mode: trainer_of(report, network, mode, clock_of(report.device)) for mode in MODES}
    parts = measure_in_turns(trainers, report.seconds(SECONDS))
    first = None
    for mode, found in parts.items():
        trainer = trainers[mode]
        trainer.clock = time.perf_counter  # without waits within the step
        period = 1
        if mode == "aga":
            period = COUNTED_PERIOD
            for group in trainer.optimizer.param_groups:
                group["k"] = period
        took = report.attempt(
            f"{network}, {mode}",
            partial(
                milliseconds_in_a_row,
                partial(trainer.step, record=False),
                report.device,
                report.seconds(SECONDS),
                at_least=2,
                multiple=period,
            ),
            needs=0.5,
        )
        first = took if first is None else first
        ratio = took / first if isinstance(took, float) and isinstance(first, float) else "unknown"
        numbers = [found["first_pass_ms"], found["optimizer_ms"], found["step_ms"], took]
        report.row(mode, [f"{found['passes']:.1f}", *(shown(number, ".2f") for number in numbers), shown(ratio, ".2f")])
        for key, value in (*found.items(), ("in_a_row_ms", took), ("ratio", ratio)):
            report.number(key, value, network=network, mode=mode)


def at_once(report: Report) -> None:
    """Count the steps a second of 1, 2 and 3 processes that train at the same time."""
    report.row("qwen3 base, processes at once", ["steps/s each", "steps/s all", "of one"])
    for worker in workers:
        ask(worker, "warm")
    for worker in workers:
        answer(worker)
    alone = None
    for count in PROCESSES:
        start = time.perf_counter()
        for worker in workers[:count]:
            ask(worker, str(report.seconds(TOGETHER)))
        steps = sum(answer(worker) for worker in workers[:count])
        rate = steps / (time.perf_counter() - start)
        alone = alone or rate
        cells = [f"{rate / count:.1f}", f"{rate:.1f}", f"{rate / alone:.2f}"]
        report.row(f"{count} {'process' if count == 1 else 'processes'}", cells)
        report.number("steps/s", rate, processes=count)


def chunks(report: Report) -> None:
    """Measure time and peak memory of the cross-entropy by chunk size."""
    report.row("cross-entropy, bf16 autocast", ["ms", "peak MB"])
    sizes = {"vocabulary": 99, "tokens": 34} if report.small else {}
    width = 32 if report.small else 512
    kinds = [("plain", 0), *(("chunked", chunk >> 15 if report.small else chunk) for chunk in CHUNKS)]
    for kind, chunk in kinds:
        label = f"{kind}, {chunk:,} logits" if chunk else kind

        def one(kind: str = kind, chunk: int = chunk, label: str = label) -> None:
            cross_entropy.step(kind, width, True, report.device, chunk, **sizes)()  # allocates the libraries' buffers
            step = cross_entropy.step(kind, width, True, report.device, chunk, **sizes)
            peak = optimizer_step.peak_bytes(step, report.device) / 1e6
            took = milliseconds_in_a_row(step, report.device, report.seconds(0.2), 2)
            report.row(label, [f"{took:.2f}", f"{peak:.0f}"])
            report.number("ms", took, loss=label)
            report.number("peak MB", peak, loss=label)

        report.attempt(label, one, needs=0.4)


def compile_network(trainer: Trainer) -> float:
    """Compile the network of ``trainer``; returns the seconds until the first step.

    Of a language model the loss is not compiled. Results of another process are read from torch's cache on disk.
    """
    start = time.perf_counter()
    body: Any = trainer.network if trainer.name != "qwen3" else trainer.network.model
    body.compile()
    trainer.step(record=False)
    synchronize(next(trainer.network.parameters()).device.type)
    return time.perf_counter() - start


def compiled(report: Report, network: str) -> None:
    """Time a Base step whose network is compiled, and its compilation."""
    trainer = trainer_of(report, network, "base")

    def step() -> None:
        trainer.step(record=False)

    eager = milliseconds_in_a_row(step, report.device, report.seconds(SECONDS), 2)
    report.line(f"  compiling {network} ...")
    took = compile_network(trainer)
    after = milliseconds_in_a_row(step, report.device, report.seconds(SECONDS), 2)
    report.row(network, [shown(eager, ".2f"), shown(after, ".2f"), f"{took:.1f}"])
    for key, value in (("eager ms", eager), ("compiled ms", after), ("compiled in s", took)):
        report.number(key, value, compiled=network)


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2] == "1")
