"""Make the table and the picture of studies/natural_gradient.py from its rows."""

import csv
import gzip
import io
import math
import statistics
from pathlib import Path
from typing import Any, TypeAlias

Rows: TypeAlias = list[dict[str, Any]]
TEXT = ("driver", "target", "kind", "candidate")
INTEGERS = ("seed", "step")
MIDDLE = 1e-3  # the damping of tables that show only one
TARGETS = {"natural": "natural gradient", "newton": "damped Newton step"}
# Candidates that are subtracted from each other: (kind, left, right).
PAIRS = (
    ("step", "ARS2 Base", "AdamW"),
    ("step", "ARS2 Sync", "AdamW"),
    ("step", "ARS2 Sync", "ARS2 Base"),
    ("step", "ARS2 Base", "Muon"),
    ("shape", "Adam", "gradient"),
    ("shape", "orthogonal gradient", "gradient"),
    ("shape", "orthogonal Adam", "Adam"),
    ("shape", "orthogonal Adam", "orthogonal gradient"),
    ("shape", "orthogonal 1/sqrt(diagonal Fisher)", "1/sqrt(diagonal Fisher)"),
    ("shape", "orthogonal 1/diagonal Fisher", "1/diagonal Fisher"),
    ("shape", "orthogonal 1/sqrt(diagonal Fisher)", "orthogonal gradient"),
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
    """Return the mean of ``column`` over the chosen rows, for each seed.

    Of a ratio of lengths the decimal logarithm is averaged.
    """
    seeds: dict[int, list[float]] = {}
    for row in rows:
        if all(row[key] == wanted for key, wanted in chosen.items()):
            value = row[column]
            seeds.setdefault(row["seed"], []).append(math.log10(value) if column.startswith("ratio") else value)
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
    candidates: dict[tuple[str, str], Rows] = {}
    for row in rows:
        candidates.setdefault((row["kind"], row["candidate"]), []).append(row)

    def lines(columns: list[tuple[str, dict[str, Any]]], signed: bool = False) -> list[list[str]]:
        """Return a line for each candidate, with a cell for each choice of rows."""
        return [
            [f"{kind}: {name}"] + [cell(by_seed(chosen_rows, column, **chosen), signed) for column, chosen in columns]
            for (kind, name), chosen_rows in candidates.items()
        ]

    def differences(target: str) -> list[list[str]]:
        result = []
        for kind, left, right in PAIRS:
            result.append([f"{kind}: {left} minus {right}"])
            for factor in dampings:
                sides = [
                    by_seed(candidates[kind, name], "cosine_weights", target=target, damping=factor)
                    for name in (left, right)
                ]
                result[-1].append(cell([a - b for a, b in zip(*sides, strict=True)], signed=True))
        return result

    over, middle = [f"damping {factor:g}" for factor in dampings], {"target": "natural", "damping": MIDDLE}
    parts = [
        "# How close optimizers come to the exact natural gradient\n",
        f"Mean over {len(drivers)} drivers and steps {', '.join(map(str, steps))} within a seed, then mean and 95 %"
        f" interval (Student's t) over {seeds} seeds; weight matrices only, unless stated. The terms are"
        " explained at the top of studies/natural_gradient.py; README.md here draws the conclusions, and cosines.csv.gz"
        " has every number.\n",
    ]
    for target, title in TARGETS.items():
        cosines = lines([("cosine_weights", {"target": target, "damping": d}) for d in dampings])
        parts.append(grid(f"Cosine with the {title}", "candidate", over, cosines))
    for target, title in TARGETS.items():
        parts.append(grid(f"Difference of cosines with the {title}, paired by seed", "pair", over, differences(target)))
    scopes = ("all", "weights", "layer1", "layer2")
    title = f"cosine with the natural gradient, damping {MIDDLE:g}"
    layers = lines([(f"cosine_{scope}", middle) for scope in scopes])
    parts.append(grid(f"By layer: {title}", "candidate", list(scopes), layers))
    driven = lines([("cosine_weights", {**middle, "driver": driver}) for driver in drivers])
    parts.append(grid(f"By driver: {title}", "candidate", drivers, driven))
    losses = [["training loss", *(cell(by_seed(rows, "loss", step=step)) for step in steps)]]
    along = lines([("cosine_weights", {**middle, "step": step}) for step in steps])
    parts.append(grid(f"By step: {title}", "candidate", [f"step {step}" for step in steps], along + losses))
    for target, title in TARGETS.items():
        ratios = lines([("ratio_weights", {"target": target, "damping": d}) for d in dampings], signed=True)
        title = f"Length at learning rate 1 over that of the {title}, decimal logarithm"
        parts.append(grid(title, "candidate", over, ratios))
    return "\n".join(parts)


def picture(rows: Rows, path: Path) -> None:
    """Draw the cosines over the damping with 95 % intervals."""
    from matplotlib.figure import Figure

    dampings = sorted({row["damping"] for row in rows})
    figure = Figure(figsize=(12, 9), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    for line, kind in zip(axes, ("step", "shape"), strict=True):
        names = list(dict.fromkeys(row["candidate"] for row in rows if row["kind"] == kind))
        for axis, (target, title) in zip(line, TARGETS.items(), strict=True):
            for index, name in enumerate(names):
                chosen = [row for row in rows if (row["kind"], row["candidate"], row["target"]) == (kind, name, target)]
                points = [interval(by_seed(chosen, "cosine_weights", damping=d)) for d in dampings]
                dashed = "--" if name.startswith("orthogonal") else "-"
                color = f"C{(index % 4) if kind == 'shape' and index < 8 else index}"
                means, halves = zip(*points, strict=True)
                axis.errorbar(dampings, means, halves, label=name, color=color, linestyle=dashed, capsize=2)
            axis.set(xscale="log", title=f"{kind}: cosine with the {title}", ylim=(-0.05, 1.02))
            axis.grid(alpha=0.3)
        line[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for axis in axes[1]:
        axis.set_xlabel("damping over the largest eigenvalue")
    figure.savefig(path, dpi=110)


def write(rows: Rows, folder: Path) -> None:
    """Write table.md and cosines.png."""
    (folder / "table.md").write_text(table(rows), encoding="utf-8")
    picture(rows, folder / "cosines.png")
