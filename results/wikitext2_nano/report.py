"""Table and picture of the small WikiText-2 runs in this folder: five optimizers, means and spreads over seeds.

    for seed in 42 43 44; do for row in adamw muon base sync aga; do
        python train.py fit --config configs/wikitext2_nano_$row.yaml --runs results/wikitext2_nano --wandb false \
            --seed_everything $seed --data.seed $seed
    done; done
    python results/wikitext2_nano/report.py

Reads every run's metrics.csv and summary.json, writes table.md and curves.png here.
"""

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
ROWS = {
    "wikitext2_nano_adamw": "AdamW",
    "wikitext2_nano_muon": "Muon",
    "wikitext2_nano_base": "ARS2-Neo Base",
    "wikitext2_nano_sync": "ARS2-Neo Sync",
    "wikitext2_nano_aga": "ARS2-Neo AGA",
}
METRIC = "val/word_perplexity"


def column(path: Path, name: str) -> list[float]:
    """Return the values of one column in their order, empty cells left out."""
    with path.open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def by_epoch(path: Path, name: str) -> list[float]:
    """Return the last value of one column in each epoch, which is logged within epochs too."""
    with path.open(newline="") as file:
        last = {int(row["epoch"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}
    return [last[epoch] for epoch in sorted(last)]


def spread(values: list[float], digits: int) -> str:
    """Return mean and standard deviation, which one value does not have."""
    mean = f"{statistics.mean(values):,.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else mean


def finished(experiment: str) -> list[tuple[Path, dict[str, Any]]]:
    """Return folder and summary of every finished run of an experiment."""
    found = [(path.parent, json.loads(path.read_text())) for path in sorted((HERE / experiment).glob("*/summary.json"))]
    return [(folder, summary) for folder, summary in found if summary["status"] == "finished"]


def main() -> None:
    """Write the table and the picture."""
    lines = [
        "| optimizer | seeds | best PPL per token | last | best PPL per word | last | train loss | seconds"
        " | gradient evaluations |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    environments, data = set(), {}
    for experiment, label in ROWS.items():
        runs = finished(experiment)
        if not runs:
            continue
        metrics = [summary["metrics"] for _, summary in runs]
        cells = [
            spread([run[name][which] for run in metrics], 1 if name == "val/perplexity" else 0)
            for name in ("val/perplexity", METRIC)
            for which in ("best", "last")
        ]
        losses = [column(folder / "metrics.csv", "train/loss")[-1] for folder, _ in runs]
        seconds = [summary["costs"]["training_seconds"] for _, summary in runs]
        evaluations = [summary["costs"]["gradient_evaluations"] for _, summary in runs]
        rest = f"{spread(losses, 3)} | {spread(seconds, 0)} | {spread(evaluations, 0)}"
        lines.append(f"| {label} | {len(runs)} | {' | '.join(cells)} | {rest} |")
        environments |= {(s["environment"]["torch"], s["environment"]["processor"]) for _, s in runs}
        data = runs[0][1]["data"]
        line = None
        for folder, _ in runs:
            values = column(folder / "metrics.csv", METRIC)
            evaluations = by_epoch(folder / "metrics.csv", "cost/gradient_evaluations")
            color = {} if line is None else {"color": line.get_color()}
            shown = None if line else label
            (line,) = left.plot(range(1, len(values) + 1), values, marker="o", ms=3, label=shown, **color)
            right.plot(evaluations, values, marker="o", ms=3, color=line.get_color())
    lines += ["", f"{data['corpus']}; protocol {data['protocol']}, vocabulary {data['vocabulary']:,}."]
    lines += [
        "Mean ± standard deviation over seeds; seconds of training alone, one thread, on a machine with other work."
    ]
    lines += [f"Measured with torch {torch}, {processor}." for torch, processor in sorted(environments)]
    (HERE / "table.md").write_text("\n".join(lines) + "\n")
    left.set_yscale("log")
    left.set_ylabel("validation perplexity per word")
    left.set_xlabel("epoch (500 optimizer steps)")
    right.set_xlabel("gradient evaluations")
    left.legend()
    figure.suptitle("WikiText-2, the nano model, a line a seed: optimizer settings as published")
    figure.tight_layout()
    figure.savefig(HERE / "curves.png", dpi=120)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
