"""Make the table and the picture of studies/natural_gradient.py from its rows."""

import csv
import gzip
import io
import math
import statistics
from pathlib import Path
from typing import Any, TypeAlias

from studies.small_network import SCOPES

Rows: TypeAlias = list[dict[str, Any]]
TEXT = ("driver", "target", "kind", "candidate")
INTEGERS = ("seed", "step")
MIDDLE = 1e-3  # the damping of tables that show only one
# The title of a table or panel, for each measure and target.
TITLES = {
    ("share", "natural"): "Share of the natural gradient's descent per KL divergence",
    ("cosine", "natural"): "Euclidean cosine with the natural gradient",
    ("share", "newton"): "Share of the damped Newton step's decrease of the quadratic model",
    ("cosine", "newton"): "Euclidean cosine with the damped Newton step",
}
KINDS = {"step": "Complete optimizer steps (step)", "shape": "Only the geometry, on the full gradient (shape)"}
# Candidates that are subtracted from each other: (kind, left, right).
PAIRS = (
    ("step", "ARS2 Base", "AdamW"),
    ("step", "ARS2 Sync", "AdamW"),
    ("step", "ARS2 Sync", "ARS2 Base"),
    ("step", "ARS2 Base", "Muon"),
    ("step", "ARS2 Base", "Muon, momentum 0.9"),
    ("shape", "Adam", "gradient"),
    ("shape", "orthogonal gradient", "gradient"),
    ("shape", "orthogonal Adam", "Adam"),
    ("shape", "orthogonal Adam", "orthogonal gradient"),
    ("shape", "orthogonal 1/sqrt(diagonal Fisher)", "1/sqrt(diagonal Fisher)"),
    ("shape", "orthogonal 1/diagonal Fisher", "1/diagonal Fisher"),
    ("shape", "orthogonal 1/sqrt(diagonal Fisher)", "orthogonal gradient"),
    ("shape", "SOAP", "Adam"),
    ("shape", "SOAP", "orthogonal Adam"),
    ("shape", "K-FAC", "orthogonal Adam"),
)


def save(rows: Rows, path: Path) -> None:
    """Write the rows as gzipped CSV with four digits, with reproducible bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items()})
    path.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))


def read(path: Path) -> Rows:
    """Read what :func:`save` wrote."""
    with gzip.open(path, "rt", newline="", encoding="utf-8") as file:
        return [
            {key: v if key in TEXT else int(v) if key in INTEGERS else float(v) for key, v in row.items()}
            for row in csv.DictReader(file)
        ]


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean of two or more values and half of its 95 % interval.

    The interval is Student's t.
    """
    from scipy.stats import t

    quantile = float(t.ppf(0.975, len(values) - 1))
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def by_seed(rows: Rows, column: str, **chosen: Any) -> list[float]:
    """Return the mean of ``column`` over the chosen rows, for each seed."""
    seeds: dict[int, list[float]] = {}
    for row in rows:
        if all(row[key] == wanted for key, wanted in chosen.items()):
            seeds.setdefault(row["seed"], []).append(row[column])
    return [statistics.fmean(seeds[seed]) for seed in sorted(seeds)]


def cell(values: list[float], signed: bool = False) -> str:
    """Write mean and interval."""
    center, half = interval(values)
    return f"{center:+.3f} ± {half:.3f}" if signed else f"{center:.3f} ± {half:.3f}"


def grid(title: str, first: str, columns: list[str], lines: list[list[str]]) -> str:
    """Return one Markdown table with its title."""
    head = ["| " + " | ".join([first, *columns]) + " |", "| --- " * (len(columns) + 1) + "|"]
    return "\n".join([f"## {title}", "", *head, *("| " + " | ".join(line) + " |" for line in lines), ""])


def table(rows: Rows) -> str:
    """Return all tables as Markdown."""
    dampings, steps = sorted({row["damping"] for row in rows}), sorted({row["step"] for row in rows})
    drivers, seeds = list(dict.fromkeys(row["driver"] for row in rows)), len({row["seed"] for row in rows})
    candidates = list(dict.fromkeys((row["kind"], row["candidate"]) for row in rows))
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        groups.setdefault((row["kind"], row["candidate"], row["target"], row["damping"]), []).append(row)

    def lines(columns: list[tuple[str, tuple[str, float], dict[str, Any]]]) -> list[list[str]]:
        """Return a line for each candidate, with a cell for each column, target and damping, and choice of rows."""
        return [
            [f"{kind}: {name}"]
            + [cell(by_seed(groups[kind, name, *goal], column, **chosen)) for column, goal, chosen in columns]
            for kind, name in candidates
        ]

    def differences(column: str, target: str) -> list[list[str]]:
        result = []
        for kind, left, right in PAIRS:
            result.append([f"{kind}: {left} minus {right}"])
            for factor in dampings:
                sides = [by_seed(groups[kind, name, target, factor], column) for name in (left, right)]
                result[-1].append(cell([a - b for a, b in zip(*sides, strict=True)], signed=True))
        return result

    over, middle = [f"damping {factor:g}" for factor in dampings], ("natural", MIDDLE)
    parts = [
        "# How close optimizers come to the exact natural gradient\n",
        f"Mean over {len(drivers)} drivers and steps {', '.join(map(str, steps))} within a seed, then mean and 95 %"
        f" interval (Student's t) over {seeds} seeds; weight matrices only, unless stated. The terms are"
        " explained at the top of studies/natural_gradient.py; README.md here draws the conclusions, and cosines.csv.gz"
        " has every number.\n",
    ]
    for (measure, target), title in TITLES.items():
        column = f"{measure}_weights"
        parts.append(grid(title, "candidate", over, lines([(column, (target, d), {}) for d in dampings])))
        parts.append(grid(f"{title}: differences, paired by seed", "pair", over, differences(column, target)))
    title = f"{TITLES['share', 'natural']}, damping {MIDDLE:g}"
    layers = lines([(f"share_{scope}", middle, {}) for scope in SCOPES])
    parts.append(grid(f"{title}, by layer", "candidate", list(SCOPES), layers))
    driven = lines([("share_weights", middle, {"driver": driver}) for driver in drivers])
    parts.append(grid(f"{title}, by driver", "candidate", drivers, driven))
    losses = [["training loss", *(cell(by_seed(rows, "loss", step=step)) for step in steps)]]
    along = lines([("share_weights", middle, {"step": step}) for step in steps])
    parts.append(grid(f"{title}, by step", "candidate", [f"step {step}" for step in steps], along + losses))
    return "\n".join(parts)


def picture(rows: Rows, path: Path) -> None:
    """Draw share and cosine with the natural gradient over the damping, with 95 % intervals."""
    from matplotlib.figure import Figure

    dampings = sorted({row["damping"] for row in rows})
    figure = Figure(figsize=(12.8, 9), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    for line, kind in zip(axes, KINDS, strict=True):
        names = list(dict.fromkeys(row["candidate"] for row in rows if row["kind"] == kind))
        plain = [name for name in names if not name.startswith("orthogonal ")]
        for axis, measure in zip(line, ("share", "cosine"), strict=True):
            for name in names:
                chosen = [
                    row for row in rows if (row["kind"], row["candidate"], row["target"]) == (kind, name, "natural")
                ]
                points = [interval(by_seed(chosen, f"{measure}_weights", damping=d)) for d in dampings]
                means, halves = zip(*points, strict=True)
                base = name.removeprefix("orthogonal ")
                style = {"color": f"C{plain.index(base)}", "linestyle": "-" if name == base else "--"}
                axis.errorbar(dampings, means, halves, label=name, capsize=2, **style)
            axis.set(xscale="log", ylim=(-0.03, 1.03), ylabel=TITLES[measure, "natural"], title=KINDS[kind])
            axis.grid(alpha=0.3)
        line[1].legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    for axis in axes[1]:
        axis.set_xlabel("damping, relative to the largest eigenvalue of the Fisher matrix")
    figure.savefig(path, dpi=100)


def write(rows: Rows, folder: Path) -> None:
    """Write table.md and cosines.png."""
    (folder / "table.md").write_text(table(rows), encoding="utf-8")
    picture(rows, folder / "cosines.png")
