"""Compare Newton-Schulz algorithms in bfloat16, and ways to symmetric products.

On the CPU Gram is faster for elongated matrices, and so are blocks for large symmetric products: they save up to half
the operations, at the price of more and smaller kernels.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ars2 import orthogonalize
from benchmarks.device_timing import device_milliseconds, milliseconds_in_a_row
from benchmarks.gpu_parts.report import Report, shown
from benchmarks.newton_schulz import relative_errors

ALGORITHMS = ("standard", "gram")
# (matrices, rows, columns), wide, as the step joins them: ResNet-18's convolutions; Qwen3's attention and MLPs;
# grokking's MLP.
SHAPES = (
    (4, 64, 576),
    (3, 128, 1152),
    (3, 256, 2304),
    (3, 512, 4608),
    (12, 512, 512),
    (9, 512, 2048),
    (2, 128, 512),
)
SYMMETRIC = ((3, 512, 4608), (9, 512, 2048), (4, 1024, 4096), (1, 2048, 8192))
SMALL_SHAPES, SMALL_SYMMETRIC = ((2, 16, 64), (2, 16, 16)), ((1, 32, 64),)
SECONDS = 0.12
# A smaller gain does not pay for a second path, and a larger error is not acceptable.
LEAST_GAIN, MOST_ERROR = 1.05, 1.1
KINDS = ("random", "low rank", "condition 1e6", "tiny")


def by_blocks(left: Tensor, right: Tensor, width: int) -> Tensor:
    """Return the symmetric ``left @ right`` from its blocks up to the diagonal."""
    matrices, rows, _ = left.shape
    result = left.new_empty(matrices, rows, rows)
    for start in range(0, rows, width):
        strip, before = slice(start, start + width), slice(0, start)
        upto = slice(0, start + width)
        torch.bmm(left[:, strip], right[:, :, upto], out=result[:, strip, upto])
        if start:
            result[:, before, strip] = result[:, strip, before].mT
    return result


def milliseconds(report: Report, call: Callable[[], object]) -> float:
    """Return the time of ``call`` on the device; on the CPU that of the clock."""
    seconds = report.seconds(SECONDS)
    if report.device == "cuda":
        return device_milliseconds(call, seconds)
    return milliseconds_in_a_row(call, report.device, seconds, 2)


def run(report: Report) -> None:
    """Compare the algorithms, then the symmetric products."""
    report.row("matrices x rows x columns", ["standard ms", "gram ms", "gram gains", "error, gram / standard"], 11)
    for shape in SMALL_SHAPES if report.small else SHAPES:
        label = " x ".join(map(str, shape))
        report.attempt(label, partial(algorithms, report, shape, label), needs=0.5)
    report.line()
    report.row("symmetric products", ["full ms", "halves ms", "quarters ms", "best gains"], 11)
    for shape in SMALL_SYMMETRIC if report.small else SYMMETRIC:
        for kind in ("X X^T", "A A"):
            label = f"{kind}, {' x '.join(map(str, shape if kind == 'X X^T' else (*shape[:2], shape[1])))}"
            report.attempt(label, partial(products, report, shape, kind, label), needs=0.5)


def algorithms(report: Report, shape: tuple[int, int, int], label: str) -> None:
    """Compare the algorithms on one shape and write the row and the verdict."""
    stack = torch.randn(shape, device=report.device)
    times = {
        name: report.attempt(
            f"{label}, {name}",
            partial(milliseconds, report, partial(orthogonalize, stack, dtype=torch.bfloat16, algorithm=name)),
        )
        for name in ALGORITHMS
    }
    errors = {
        name: report.attempt(
            f"{label}, {name}, errors",
            partial(relative_errors, shape[1], shape[2], torch.bfloat16, name, 0, report.device),
        )
        for name in ALGORITHMS
    }
    standard, gram = times["standard"], times["gram"]
    gain = standard / gram if isinstance(standard, float) and isinstance(gram, float) else None
    ratios = [1e9]
    text = "failed"
    if isinstance(errors["standard"], list) and isinstance(errors["gram"], list):
        ratios = [b / a for a, b in zip(errors["standard"], errors["gram"], strict=True)]
        text = " ".join(f"{ratio:.2f}" for ratio in ratios)
    report.row(label, [shown(standard), shown(gram), shown(gain, ".2f"), text], 11)
    for name in ALGORITHMS:
        report.number("ms", times[name], shape=label, algorithm=name)
        found = errors[name]
        for kind, error in zip(KINDS, found if isinstance(found, list) else (), strict=False):
            report.number("error", error, shape=label, algorithm=name, kind=kind)
    if gain is not None:
        wins = gain >= LEAST_GAIN and max(ratios) <= MOST_ERROR
        report.line(f"    {label}: {'gram' if wins else 'standard'}")


def products(report: Report, shape: tuple[int, int, int], kind: str, label: str) -> None:
    """Compare a symmetric product with its blocks and write the row and the verdict."""
    matrices, rows, columns = shape
    # A A needs a symmetric A.
    left = torch.randn(matrices, rows, columns if kind == "X X^T" else rows, device=report.device)
    if kind == "A A":
        left = (left + left.mT) / 2
    left = left.bfloat16()
    right = left.mT
    calls: dict[str, Callable[[], Tensor]] = {"full": partial(torch.bmm, left, right)}
    for name, width in (("halves", rows // 2), ("quarters", rows // 4)):
        calls[name] = partial(by_blocks, left, right, width)
    expected = calls["full"]().float()
    times = {}
    for name, call in calls.items():
        times[name] = report.attempt(f"{label}, {name}", partial(milliseconds, report, call))
        off = ((call().float() - expected).norm() / expected.norm()).item()
        if not off < 1e-2:
            report.check(f"{label}, {name} equals the full product", False, f"{off:.1e}")
        report.number("ms", times[name], product=label, how=name)
    known = {name: time for name, time in times.items() if isinstance(time, float)}
    full = known.get("full")
    blocks = min((time for name, time in known.items() if name != "full"), default=None)
    gain = full / blocks if full and blocks else None
    report.row(label, [*(shown(time) for time in times.values()), shown(gain, ".2f")], 11)
    if gain is not None:
        report.line(f"    {label}: {'blocks' if gain >= LEAST_GAIN else 'full'}")
