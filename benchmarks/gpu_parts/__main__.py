"""Run one part of benchmarks/gpu.py.

    python -m benchmarks.gpu_parts NAME [--device cpu] [--rehearse]

The process imports its modules, prepares, reads its limit in seconds from standard input, and measures.
"""

import argparse
import importlib
import os
import sys
import traceback

import torch

from benchmarks.gpu_parts import FAILED
from benchmarks.gpu_parts.report import Report, one_line


def main() -> int:
    """Run the part; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    module = importlib.import_module(f"benchmarks.gpu_parts.{options.name}")
    if options.device == "cuda":
        torch.zeros((), device="cuda")  # creates the context while an earlier part runs
    if hasattr(module, "prepare"):
        module.prepare(options.device, options.rehearse)
    go = sys.stdin.readline()
    if not go.strip():
        return 0  # the run ended before this part's turn
    report = Report(options.name, options.device, options.rehearse, float(go))
    try:
        module.run(report)
    except Exception as error:
        traceback.print_exc()
        report.failed = True
        report.line(f"  failed: {one_line(error)}")
    return FAILED if report.failed else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Without waiting for a driver or a pool of compilers to shut down.
    os._exit(code)
