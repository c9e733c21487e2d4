"""Table and picture of the grokking runs in this folder: published against measured, over seeds.

    for seed in 42 43 44 45 46; do for row in adamw muon muon_wd base sync aga periodic random; do
        python train.py fit --config configs/grok_$row.yaml --runs results/grok --wandb false \
            --seed_everything $seed --data.seed $seed
    done; done
    python results/grok/report.py

Reads every run's metrics.csv and summary.json, writes table.md and curves.png here.
"""

import csv
import json
import math
import statistics
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
    "grok_periodic": ("looks every second step", "-", "-", "-", "-"),
    "grok_random": ("looks at random, as often as AGA", "-", "-", "-", "-"),
}
MILESTONES = ("train_loss_0.5", "grok", "converge", "full")


def curve(path: Path, column: str) -> tuple[list[float], list[float]]:
    """Return the epochs (from 1) and values of one column, empty cells left out."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get(column)]
    return [float(row["epoch"]) + 1 for row in rows], [float(row[column]) for row in rows]


def over_seeds(summaries: list[dict[str, Any]], milestone: str, cost: str) -> str:
    """Return median and range of what a milestone cost; a run that ended without it cost more than it spent."""
    found = [summary["milestones"][milestone][cost] for summary in summaries]
    values = sorted(math.inf if value is None else value for value in found)
    spent = max(s["epochs"] if cost == "epoch" else s["costs"]["gradient_evaluations"] for s in summaries)

    def shown(value: float) -> str:
        return f"> {spent:,}" if value == math.inf else f"{value:,.0f}"

    median = shown(statistics.median_high(values))
    return (
        median if len(values) == 1 or values[0] == math.inf else f"{median} [{shown(values[0])}, {shown(values[-1])}]"
    )


def main() -> None:
    """Write the table and the picture."""
    lines = [
        "| optimizer | seeds | train loss < 0.5 | val 90 % | val 98 % | val 99 % | gradient evaluations to 99 %"
        " | best val |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 8), sharex=True)
    environments = set()
    for number, (experiment, (label, *published)) in enumerate(PUBLISHED.items()):
        runs = [
            (path.parent, json.loads(path.read_text())) for path in sorted((HERE / experiment).glob("*/summary.json"))
        ]
        if not runs:
            continue
        summaries = [summary for _, summary in runs]
        cells = [
            f"{over_seeds(summaries, name, 'epoch')} ({reported})"
            for name, reported in zip(MILESTONES, published, strict=True)
        ]
        best = [100 * summary["metrics"]["val/accuracy"]["best"] for summary in summaries]
        spread = f"{min(best):.1f} to {max(best):.1f} %" if len(best) > 1 else f"{best[0]:.1f} %"
        cost = over_seeds(summaries, "full", "gradient_evaluations")
        lines.append(f"| {label} | {len(runs)} | {' | '.join(cells)} | {cost} | {spread} |")
        for index, (folder, summary) in enumerate(runs):
            environments.add(
                ", ".join(f"{key} {value}" for key, value in summary["environment"].items() if key != "command")
            )
            style = {"color": f"C{number}", "linewidth": 1.0, "label": label if index == 0 else None}
            epochs, values = curve(folder / "metrics.csv", "val/accuracy")
            top.plot(epochs, [100 * value for value in values], **style)
            epochs, values = curve(folder / "metrics.csv", "val/loss")
            bottom.plot(epochs, values, **style)
    lines += [
        "",
        "Epochs, measured over seeds 42, 43, ...: median [least, most] (published); > where a run ended without it.",
        "Settings as published, tuned for none; nothing here says which optimizer is better when tuned.",
        "Where Newton-Schulz rounds differently (threads, its algorithm), the same seed passes 99 % at another epoch.",
        "",
    ]
    lines += [f"Measured with {environment}" for environment in sorted(environments)]
    (HERE / "table.md").write_text("\n".join(lines) + "\n")
    top.axhline(99, color="grey", linewidth=0.8)
    top.set_ylabel("validation accuracy, %")
    top.set_title("Modular addition, p = 113, 30 % of the pairs: settings as published, a line a seed")
    top.legend(loc="center right", fontsize=8)
    bottom.set_yscale("log")
    bottom.set_ylabel("validation loss, nats")
    bottom.set_xlabel("epoch (8 optimizer steps)")
    figure.tight_layout()
    figure.savefig(HERE / "curves.png", dpi=120)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
