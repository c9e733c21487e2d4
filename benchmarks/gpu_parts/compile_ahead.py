"""Compile for later parts and print the seconds it took.

    python -m benchmarks.gpu_parts.compile_ahead JOB DEVICE SMALL SECONDS

Cold compilations take longer than all parts together may. So they run at the same time, beside the parts that take no
timings, and leave their results in torch's cache on disk.
"""

import os
import sys
import threading
import time

from benchmarks.gpu_parts import graphs, training
from benchmarks.step_cost import Trainer

JOBS = ("optimizer step", *training.NETWORKS)


def seconds_of(job: str, device: str, small: bool) -> float:
    """Compile for ``job``; returns the seconds until the end of the first step."""
    if job in training.NETWORKS:
        return training.compile_network(Trainer(job, "base", device=device, small=small, chunk=0))
    optimizer, _ = graphs.make(device, small, compile=True)
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


if __name__ == "__main__":
    name, place, is_small, limit = sys.argv[1:]
    timer = threading.Timer(float(limit), os._exit, (1,))
    timer.daemon = True
    timer.start()
    print(f"{seconds_of(name, place, is_small == '1'):.1f}", flush=True)
    os._exit(0)
