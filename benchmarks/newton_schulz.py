"""Measure time and error of the Newton-Schulz algorithms by shape and dtype.

    python -m benchmarks.newton_schulz [--rows 64 128 256 512] [--aspects 1 2 3 4 6 9] [--matrices 1] [--device cpu]
        [--json]

Times are medians of alternating calls. "auto" is the chosen algorithm, in float32 where that is faster. "s/auto" and
"s/gram" are the time of standard over that of auto and of Gram, so above 1 the latter is faster. An error is the
relative Frobenius distance to the iteration in float64, averaged over three seeds. The last column has Gram's error
over that of standard for each kind of matrix: random, of rank rows/8, of condition 1e6, and random times 1e-30.
The thresholds of :func:`ars2.newton_schulz.choose` come from this table.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from ars2 import orthogonalize
from ars2.newton_schulz import choose
from ars2.validation import DTYPES
from benchmarks.device_timing import clock_of

ALGORITHMS = ("standard", "gram", "auto")


def kinds(rows: int, columns: int, seed: int) -> Iterator[Tensor]:
    """Return random, low-rank, ill-conditioned and tiny matrices in float64."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    u, _, v_transposed = torch.linalg.svd(matrix, full_matrices=False)
    yield matrix
    yield u[:, : max(1, rows // 8)] @ v_transposed[: max(1, rows // 8)]
    yield u @ torch.diag(torch.logspace(0, -6, rows, dtype=torch.float64)) @ v_transposed
    yield matrix * 1e-30


def relative_errors(
    rows: int, columns: int, dtype: torch.dtype, algorithm: str, seed: int, device: str = "cpu"
) -> list[float]:
    """Return an algorithm's relative error against float64 by kind of matrix."""
    errors = []
    for matrix in kinds(rows, columns, seed):
        given = matrix.float().to(device)
        exact = orthogonalize(given.double(), dtype=torch.float64, algorithm="standard")
        found = orthogonalize(given, dtype=dtype, algorithm=algorithm).double()
        errors.append(((found - exact).norm() / exact.norm()).item())
    return errors


def milliseconds(
    calls: Mapping[str, Callable[[], object]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Return the median time of each call, alternating at least five times.

    On CUDA ``clock`` must synchronise with the device.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 5 or time.perf_counter() < end:
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(1e3 * (clock() - start))
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[32, 64, 128, 256, 512])
    parser.add_argument("--aspects", nargs="+", type=int, default=[1, 2, 3, 4, 6, 9])
    parser.add_argument("--matrices", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processor-time", action="store_true", help="as in benchmarks/optimizer_step.py")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    options = parser.parse_args()
    device = options.device
    clock = clock_of(device, time.process_time if options.processor_time else time.perf_counter)
    kind = "processor's" if options.processor_time else "clock's"
    found = []
    if not options.json:
        threads = f"{torch.get_num_threads()} threads, the {kind} time"
        print(f"torch {torch.__version__}, {device}, {threads}, {options.matrices} matrices a call")
        print(
            "dtype      rows  columns  standard ms   gram ms   auto ms  s/auto  s/gram  chosen    errors, gram/standard"
        )
    for name in options.dtypes:
        dtype = DTYPES[name]
        for rows in options.rows:
            for aspect in options.aspects:
                columns = rows * aspect
                stack = torch.randn(options.matrices, rows, columns).to(device)
                calls = {a: partial(orthogonalize, stack, dtype=dtype, algorithm=a) for a in ALGORITHMS}
                times = milliseconds(calls, options.seconds, clock)
                errors = [
                    [
                        sum(e)
                        for e in zip(
                            *(relative_errors(rows, columns, dtype, a, s, device) for s in range(3)), strict=True
                        )
                    ]
                    for a in ("standard", "gram")
                ]
                row = {
                    "dtype": name,
                    "rows": rows,
                    "columns": columns,
                    **times,
                    "error_ratios": [gram / standard for standard, gram in zip(*errors, strict=True)],
                    "chosen": choose("auto", rows, columns, dtype, torch.device(device))[0],
                }
                found.append(row)
                if not options.json:
                    ratios = " ".join(f"{ratio:5.2f}" for ratio in row["error_ratios"])
                    milli = " ".join(f"{times[a]:9.3f}" for a in ALGORITHMS)
                    gains = " ".join(f"{times['standard'] / times[a]:6.2f}x" for a in ("auto", "gram"))
                    print(
                        f"{name:<9} {rows:5d} {columns:8d}    {milli} {gains}  {row['chosen']:<9} {ratios}", flush=True
                    )
    if options.json:
        print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": found}))


if __name__ == "__main__":
    sys.exit(main())
