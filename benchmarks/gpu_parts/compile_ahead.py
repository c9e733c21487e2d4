"""Compile for later parts, and record the seconds beside the results.

    python -m benchmarks.gpu_parts.compile_ahead JOB DEVICE SMALL

Cold compilations take longer than all parts together may. So they run at the same time, from the start until the end of
the part ``graphs``, and leave their results in torch's cache on disk.
"""

import os
import sys
import time

from benchmarks.gpu_parts import graphs, training
from benchmarks.gpu_parts.report import seconds_file
from benchmarks.step_cost import Trainer

JOBS = (graphs.OPTIMIZER_JOB, *training.NETWORKS)


def seconds_of(job: str, device: str, small: bool) -> float:
    """Compile for ``job``; returns the seconds until the end of the first step."""
    if job in training.NETWORKS:
        return training.compile_network(Trainer(job, "base", device=device, small=small, chunk=0))
    optimizer, _ = graphs.make(device, small, compile=True)
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


if __name__ == "__main__":
    name, place, is_small = sys.argv[1:]
    took = seconds_of(name, place, is_small == "1")
    temporary = seconds_file(name).with_suffix(".partial")
    temporary.write_text(f"{took:.1f}")
    temporary.rename(seconds_file(name))
    os._exit(0)
