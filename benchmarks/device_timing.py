"""Measure times, host syncs, kernels and speed limits of a device.

CUDA works asynchronously, so a clock must be read after a synchronisation. Two times of a step are measured. The
wall-clock time of consecutive steps is that of training. The time on the device alone comes from CUDA events around a
step that is queued while the device sleeps, so that the host cannot be the limit.
"""

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType

Step = Callable[[], Any]
# Long enough to queue a few hundred kernels: about 10 ms at the 1.7 to 2 GHz of a data-centre GPU.
SLEEP_CYCLES = 20_000_000
SYNC_WARNING = "called a synchronizing CUDA operation"  # torch's text, c10/cuda/CUDAFunctions.cpp


def synchronize(device: str) -> None:
    """Wait for the queued work of the device; do nothing on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def clock_of(device: str, clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """Return ``clock``; on CUDA it synchronises before it is read."""

    def waiting() -> float:
        synchronize(device)
        return clock()

    return waiting if device == "cuda" else clock


def milliseconds_in_a_row(step: Step, device: str, seconds: float, at_least: int = 3, multiple: int = 1) -> float:
    """Return the mean time of consecutive steps during about ``seconds``.

    Args:
        step: called once before the clock starts.
        device: on CUDA the host may be ahead by five steps, or by one period.
        seconds: duration of the measurement.
        at_least: the fewest steps.
        multiple: length of a period, of which the number of steps is a multiple.
    """
    step()
    synchronize(device)
    start, count = time.perf_counter(), 0
    # Without a bound on the queue the steps after the deadline could take much longer than those before it.
    while count < at_least or time.perf_counter() - start < seconds:
        for _ in range(multiple if multiple > 1 else 5 if device == "cuda" else 1):
            step()
            count += 1
        synchronize(device)
    return 1e3 * (time.perf_counter() - start) / count


def device_milliseconds(step: Step, seconds: float, at_least: int = 3) -> float:
    """Return the median time of a step on the CUDA device, without the host's share.

    A step that reads the device waits for the sleep too; the host's share after that is included.
    """
    step()
    torch.cuda.synchronize()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < at_least or time.perf_counter() < end:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        step()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def peak_bytes(step: Step) -> int:
    """Return the peak of CUDA memory during ``step`` above that before it, in bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def host_syncs(step: Step) -> int:
    """Return how often ``step`` synchronises the host with CUDA; 0 without a GPU."""
    if not torch.cuda.is_available():
        step()
        return 0
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum(SYNC_WARNING in str(warning.message) for warning in caught)


def kernels(step: Step) -> int:
    """Return how many CUDA kernels ``step`` launches, without memcpy and memset.

    The profiler may slow down later launches of the process, so kernels are counted last.

    Raises:
        RuntimeError: the profiler saw none.
    """
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        step()
        torch.cuda.synchronize()
    count = sum(
        event.device_type == DeviceType.CUDA
        and not event.is_user_annotation
        and not event.name.startswith(("Memcpy", "Memset"))
        for event in profile.events()
    )
    if count == 0:
        raise RuntimeError("the profiler saw no kernel")
    return count


def peak_rate(device: str, size: int = 8192, seconds: float = 0.3) -> float:
    """Return the FLOP/s of a square bfloat16 product of ``size`` rows."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    result = torch.empty_like(left)

    def product() -> None:
        torch.mm(left, right, out=result)

    took = device_milliseconds(product, seconds) if device == "cuda" else milliseconds_in_a_row(product, device, 0.0)
    return 2e3 * size**3 / took


def bandwidth(device: str, numel: int = 1 << 28, seconds: float = 0.2) -> float:
    """Return the bytes a second, read plus written, of a float32 copy on the device."""
    source = torch.zeros(numel, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    took = device_milliseconds(copy, seconds) if device == "cuda" else milliseconds_in_a_row(copy, device, 0.0)
    return 2e3 * source.numel() * source.element_size() / took
