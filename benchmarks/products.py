"""Measure matrix products, a lower bound of a Newton-Schulz step.

    python -m benchmarks.products [--seconds 0.5]

For each stack (matrices, rows, columns) the table has the rates of the three products of a step (X X^T, A A and P X) in
GFLOP/s, and the milliseconds of the products of five standard steps. The last row shows the rate of large matrices.
"""

import argparse
from functools import partial

import torch

from benchmarks.newton_schulz import milliseconds

# Stacks that ARS2-Neo joins: grokking's heads, its square matrices with and without padding, and its MLP; a wide one of
# ResNet-18; four of Qwen3.
SHAPES = (
    (12, 32, 128),
    (3, 128, 128),
    (2, 114, 128),
    (1, 128, 128),
    (2, 128, 512),
    (1, 512, 4608),
    (4, 512, 512),
    (1, 2048, 2048),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="measured seconds a shape")
    seconds = parser.parse_args().seconds
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, wall-clock time")
    print(f"{'dtype':<9} {'matrices':>8} {'rows':>5} {'columns':>7} {'X X^T':>6} {'A A':>6} {'P X':>6}  ms, five steps")
    for dtype in (torch.bfloat16, torch.float32):
        for matrices, rows, columns in SHAPES:
            torch.manual_seed(0)
            x = torch.randn(matrices, rows, columns).to(dtype)
            a = torch.randn(matrices, rows, rows).to(dtype)
            wide, small = 2e-6 * matrices * rows * rows * columns, 2e-6 * matrices * rows**3
            products = {
                "X X^T": (partial(torch.bmm, x, x.mT), wide),
                "A A": (partial(torch.baddbmm, a, a, a, beta=0.5, alpha=2.0), small),
                "P X": (partial(torch.baddbmm, x, a, x, beta=0.5), wide),
            }
            times = milliseconds({key: call for key, (call, _) in products.items()}, seconds)
            rates = " ".join(f"{work / times[key]:6.0f}" for key, (_, work) in products.items())
            name = str(dtype).removeprefix("torch.")
            all_steps = 5 * sum(times.values())
            print(f"{name:<9} {matrices:8} {rows:5} {columns:7} {rates} {all_steps:15.2f}", flush=True)


if __name__ == "__main__":
    main()
