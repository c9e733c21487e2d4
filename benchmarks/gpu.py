"""Measure this project on one GPU in 90 seconds.

    python -m benchmarks.gpu [--seconds 90] [--parts tests parity ...] [--output FILE] [--json FILE]
    python -m benchmarks.gpu --device cpu --rehearse

tests           the tests that need a GPU (tests/gpu)
parity          twenty steps of every mode on GPU and CPU, in float32 and against float64
step            the optimizer's step beside others: time, memory, kernels, host syncs, and the floor under it
graphs          the step captured in a CUDA graph, and compiled
newton_schulz   which iteration for which shape, and whether half of a symmetric product is faster
training        training steps, several processes at once, chunks of the cross-entropy, compiled networks

Each part runs in a separate process and is stopped at its limit, so that one that hangs or crashes does not affect the
others. The limit is the part's share of the remaining time: time that one part leaves goes to the later ones. Exits
with 1 if a part failed or was stopped. --rehearse runs every part at a tiny size.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from benchmarks.gpu_parts import FAILED, NUMBER

ROOT = Path(__file__).parents[1]
SECONDS, REHEARSAL_SECONDS = 90.0, 900.0
# Seconds reserved for the head of the output, and for ending processes.
MARGIN = 3.0


class Part(NamedTuple):
    """Name a part, its share of the time, and the command that runs it."""

    name: str
    share: float
    command: tuple[str, ...]


# The first share includes the imports of every process.
SHARES = {"tests": 24.0, "parity": 6.0, "step": 14.0, "graphs": 11.0, "newton_schulz": 7.0, "training": 25.0}


def limits(shares: Sequence[float], seconds: float) -> list[float]:
    """Return the limits of parts that use up their time; they sum to ``seconds``."""
    return [seconds * share / sum(shares) for share in shares]


class Output:
    """Write lines to standard output and a file, numbers to another, unbuffered."""

    def __init__(self, text: IO[str] | None = None, numbers: IO[str] | None = None) -> None:
        self.text, self.numbers = text, numbers

    def line(self, line: str) -> None:
        """Write a line of text, or the number that a part has sent."""
        if line.startswith(NUMBER):
            if self.numbers is not None:
                print(line.removeprefix(NUMBER), file=self.numbers, flush=True)
            return
        print(line, flush=True)
        if self.text is not None:
            print(line, file=self.text, flush=True)


class Running:
    """Run the process of a part, which imports and waits until :meth:`finish`."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        # A new session, so that the processes that the part starts can be stopped with it.
        self.process = subprocess.Popen(
            part.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            errors="replace",
            cwd=ROOT,
            start_new_session=True,
        )

    def finish(self, limit: float, output: Output) -> bool:
        """Let the part run for at most ``limit`` seconds, and return whether it succeeded."""
        start = time.monotonic()
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(OSError):  # it may have ended already
            process.stdin.write(f"{limit}\n")
            process.stdin.close()

        def pass_on(lines: IO[str]) -> None:
            for line in lines:
                output.line(line.rstrip("\n"))

        reader = threading.Thread(target=pass_on, args=(process.stdout,), daemon=True)
        reader.start()
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            self.stop()
            reader.join(0.5)
            output.line(f"  stopped after {time.monotonic() - start:.0f} s")
            return False
        self.stop()  # what the part may have started and left
        reader.join(0.5)
        if process.returncode not in (0, FAILED):
            self._explain(output)
        output.line(f"  ({time.monotonic() - start:.1f} of {limit:.0f} s)")
        return process.returncode == 0

    def _explain(self, output: Output) -> None:
        """Write how the process ended, and its last line about it."""
        code = self.process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip()]
        output.line(f"  failed ({how}){': ' + lines[-1][:300] if lines else ''}")

    def stop(self) -> None:
        """End the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def started(parts: Sequence[Part]) -> Iterator[list[Running]]:
    """Start the interpreters of all parts, and stop the running ones at the end.

    They start together and not each during the part before it, because importing would disturb that part's timings.
    They are not forked from one process that has imported everything, because CUDA does not survive a fork, and a
    library that queries the device while it is imported would break every part.
    """
    running: list[Running] = []
    try:
        for part in parts:
            running.append(Running(part))
        yield running
    finally:
        for one in running:
            one.stop()


def run_in_turn(running: Sequence[Running], end: float, output: Output) -> int:
    """Let the parts run one after the other, and return the exit code.

    ``end`` is the time at which the last one is stopped, on the monotonic clock.
    """
    failed: list[str] = []
    for index, one in enumerate(running):
        left = max(end - time.monotonic(), 0.0)
        limit = limits([other.part.share for other in running[index:]], left)[0]
        output.line(f"\n{one.part.name}")
        if not one.finish(limit, output):
            failed.append(one.part.name)
    output.line(f"\nfailed or stopped: {', '.join(failed) or 'none'}")
    return int(bool(failed))


def head(device: str) -> list[str]:
    """Return the first lines: hardware, versions, date and number of runs."""
    import torch

    cores = f"{os.cpu_count()} cores, {platform.machine()}"
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        hardware = f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {found.multi_processor_count} SMs; {cores}"
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, timeout=3, check=True).stdout.splitlines()[0]
        except (OSError, subprocess.SubprocessError, IndexError):
            driver = "unknown"
        versions = f"driver {driver}; torch {torch.__version__}, CUDA {torch.version.cuda}"
    else:
        hardware, versions = f"no GPU; {cores}", f"torch {torch.__version__}"
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return [hardware, f"{versions}, Python {platform.python_version()}", f"{date}, one run"]


def command_of(name: str, device: str, rehearse: bool) -> tuple[str, ...]:
    """Return the command that runs the part ``name``."""
    command = (sys.executable, "-u", "-m", "benchmarks.gpu_parts", name, "--device", device)
    return (*command, "--rehearse") if rehearse else command


def main() -> int:
    """Run the parts, print their results, and return the exit code."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help=f"for all parts together (default {SECONDS:g})")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--output", type=Path, help="write the lines to this file too")
    parser.add_argument("--json", type=Path, help="write the numbers to this file, one JSON object a line")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rehearse", action="store_true", help="every part at a tiny size")
    options = parser.parse_args()
    if options.device == "cpu" and not options.rehearse:
        parser.error("--device cpu is for a rehearsal: add --rehearse")
    seconds = options.seconds or (REHEARSAL_SECONDS if options.rehearse else SECONDS)
    parts = [Part(name, SHARES[name], command_of(name, options.device, options.rehearse)) for name in options.parts]
    with contextlib.ExitStack() as stack:
        # An empty cache, so that compilations are timed cold, and shared, so that later parts find their results.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="ars2_gpu_", ignore_cleanup_errors=True)
        )
        running = stack.enter_context(started(parts))
        import torch  # beside the parts, which import it too

        if options.device == "cuda" and not torch.cuda.is_available():
            print("error: there is no GPU; --device cpu --rehearse makes every part at a tiny size", file=sys.stderr)
            return 1
        files = [stack.enter_context(path.open("w")) if path else None for path in (options.output, options.json)]
        output = Output(files[0], files[1])
        lines = head(options.device)
        for line in lines:
            output.line(line)
        output.line(NUMBER + json.dumps({"part": "head", "what": "lines", "value": lines}))
        code = run_in_turn(running, start + seconds - MARGIN, output)
        output.line(f"{time.monotonic() - start:.0f} of {seconds:g} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
