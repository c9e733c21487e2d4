"""Measure peak memory and time of the chunked cross-entropy against the plain one.

    python -m benchmarks.cross_entropy [--width 512] [--rounds 5] [--device cpu]

Forward and backward of an unembedding of 40,479 tokens on 8 x 255 hidden states, in float32 and under bf16 autocast.
Times are medians over rounds in which the two alternate, in this process. A peak is measured in a separate process,
relative to its memory before the first pass. Exits with 1 if the chunked peak is above half of the plain one.
"""

import argparse
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import device_timing
from modules.chunked_cross_entropy import CHUNK_ELEMENTS, chunked_cross_entropy

VOCABULARY, TOKENS = 40_479, 8 * 255
LARGEST_SHARE = 0.5


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 0) -> Tensor:
    """Return the plain loss."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


KINDS: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {"plain": plain, "chunked": chunked_cross_entropy}


def step(
    kind: str,
    width: int,
    half: bool,
    device: str = "cpu",
    chunk: int = CHUNK_ELEMENTS,
    vocabulary: int = VOCABULARY,
    tokens: int = TOKENS,
) -> Callable[[], None]:
    """Return a function that makes one forward and backward pass in chunks."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width).to(device).requires_grad_()
    weight = (0.02 * torch.randn(vocabulary, width)).to(device).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,)).to(device)

    def run() -> None:
        hidden.grad = weight.grad = None
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = KINDS[kind](hidden, weight, targets, chunk)
        loss.backward()

    return run


def highest_resident() -> float:
    """Return the peak memory of this process in MiB (Linux, macOS)."""
    if sys.platform == "linux":
        # Not getrusage, whose peak starts at the memory of the parent process.
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak(kind: str, width: int, half: bool, device: str = "cpu") -> float:
    """Return the peak memory in MiB that one pass adds, on CUDA that of the device."""
    # Warm up, so that buffers that libraries allocate once are not counted.
    F.cross_entropy(torch.randn(64, 64, requires_grad=True) @ torch.randn(64, 64), torch.zeros(64).long()).backward()
    run = step(kind, width, half, device)
    if device == "cuda":
        step(kind, 64, half, device, vocabulary=64, tokens=64)()  # the same for the GPU's libraries
        return device_timing.peak_bytes(run) / 2**20
    before = highest_resident()
    run()
    return highest_resident() - before


def seconds(width: int, half: bool, rounds: int, device: str = "cpu") -> dict[str, float]:
    """Alternate between both, and return the median seconds of each."""
    steps = {kind: step(kind, width, half, device) for kind in KINDS}
    clock = device_timing.clock_of(device)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds + 1):
        for kind, run in steps.items():
            start = clock()
            run()
            if number:
                times[kind].append(clock() - start)
    return {kind: statistics.median(values) for kind, values in times.items()}


def main() -> int:
    """Measure and print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peak", choices=KINDS, help="measure one peak only and print it")
    parser.add_argument("--half", action="store_true", help="with --peak: under bf16 autocast")
    options = parser.parse_args()
    if options.peak:
        print(peak(options.peak, options.width, options.half, options.device))
        return 0
    device = options.device
    processor = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {processor}")
    print(f"vocabulary {VOCABULARY:,}, {TOKENS:,} tokens, width {options.width}, forward and backward")
    worst = 0.0
    for half in (False, True):
        peaks = {}
        for kind in KINDS:
            command = [sys.executable, "-m", "benchmarks.cross_entropy", "--peak", kind, "--width", str(options.width)]
            command += ["--device", device]
            process = subprocess.run([*command, *(["--half"] if half else [])], capture_output=True, check=True)
            peaks[kind] = float(process.stdout)
        times = seconds(options.width, half, options.rounds, device)
        share = peaks["chunked"] / peaks["plain"]
        worst = max(worst, share)
        print("bf16 autocast" if half else "float32")
        for kind in KINDS:
            print(f"  {kind:8} {peaks[kind]:8.0f} MiB   {times[kind]:6.3g} s")
        print(f"  ratio    {share:8.2f}       {times['chunked'] / times['plain']:6.2f}")
    print(f"peak memory must be at most {LARGEST_SHARE} of the plain one's")
    return int(worst > LARGEST_SHARE)


if __name__ == "__main__":
    sys.exit(main())
