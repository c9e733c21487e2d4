"""Table and picture of the grokking runs in this folder: published against measured.

    for row in adamw muon muon_wd base sync aga; do
        python train.py fit --config configs/grok_$row.yaml --runs results/grok --wandb false
    done
    python results/grok/report.py

Reads every run's metrics.csv and summary.json, writes table.md and curves.png here.
"""

import csv
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
# As the ARS2 project reported them: first epoch of train loss < 0.5, validation 90 %, 98 %, 99 %.
PUBLISHED = {
    "grok_adamw": ("AdamW", "113", "> 600", "-", "-"),
    "grok_muon": ("Muon", "22", "> 347", "-", "-"),
    "grok_muon_wd": ("Muon, weight decay 1.0", "-", "-", "-", "-"),
    "grok_base": ("ARS2-Neo Base", "11", "239", "290", "296"),
    "grok_sync": ("ARS2-Neo Sync", "-", "-", "-", "-"),
    "grok_aga": ("ARS2-Neo AGA", "12", "77", "116", "234"),
}
MILESTONES = ("train_loss_0.5", "grok", "converge", "full")


def curve(path: Path, column: str) -> tuple[list[float], list[float]]:
    """Return the epochs (from 1) and values of one column, empty cells left out."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get(column)]
    return [float(row["epoch"]) + 1 for row in rows], [float(row[column]) for row in rows]


def reached(summary: dict[str, Any], name: str) -> str:
    """Return the epoch of a milestone, or how far the run got without it."""
    epoch = summary["milestones"][name]["epoch"]
    return f"> {summary['epochs']}" if epoch is None else str(epoch)


def main() -> None:
    """Write the table and the picture."""
    lines = [
        "| optimizer | train loss < 0.5 | val 90 % | val 98 % | val 99 % | best val | gradient evaluations | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 8), sharex=True)
    environments = set()
    for experiment, (label, *published) in PUBLISHED.items():
        for path in sorted((HERE / experiment).glob("*/summary.json")):
            summary = json.loads(path.read_text())
            pairs = [f"{reached(summary, name)} ({p})" for name, p in zip(MILESTONES, published, strict=True)]
            best = 100 * summary["metrics"]["val/accuracy"]["best"]
            cost = f"{summary['costs']['gradient_evaluations']:,} | {summary['costs']['training_seconds']:.0f}"
            lines.append(f"| {label} | {' | '.join(pairs)} | {best:.1f} % | {cost} |")
            environments.add(
                ", ".join(f"{key} {value}" for key, value in summary["environment"].items() if key != "command")
            )
            epochs, values = curve(path.parent / "metrics.csv", "val/accuracy")
            (line,) = top.plot(epochs, [100 * value for value in values], label=label)
            epochs, values = curve(path.parent / "metrics.csv", "train/loss")
            bottom.plot(epochs, values, color=line.get_color(), linestyle="--", label=f"{label}, train")
            epochs, values = curve(path.parent / "metrics.csv", "val/loss")
            bottom.plot(epochs, values, color=line.get_color())
    lines += [
        "",
        "Epochs, measured (published); seconds are of training alone, on a machine that did other work"
        " during the first rows. Seed 42, one run a row.",
        "",
    ]
    lines += [f"Measured with {environment}" for environment in sorted(environments)]
    (HERE / "table.md").write_text("\n".join(lines) + "\n")
    top.axhline(99, color="grey", linewidth=0.8)
    top.set_ylabel("validation accuracy, %")
    top.set_title("Modular addition, p = 113, 30 % of the pairs: settings as published")
    top.legend(loc="center right")
    bottom.set_yscale("log")
    bottom.set_ylabel("loss, nats (validation; training dashed)")
    bottom.set_xlabel("epoch (8 optimizer steps)")
    figure.tight_layout()
    figure.savefig(HERE / "curves.png", dpi=120)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
