"""Table and picture of the small CIFAR-10 runs in this folder: five optimizers, three seeds each.

    for seed in 42 43 44; do for row in adamw muon base sync aga; do
        python train.py fit --config configs/cifar_mini_$row.yaml --runs results/cifar_mini --wandb false \
            --seed_everything $seed --data.seed $seed
    done; done
    python results/cifar_mini/report.py

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
LABELS = {
    "cifar_mini_adamw": "AdamW",
    "cifar_mini_muon": "Muon",
    "cifar_mini_base": "ARS2-Neo Base",
    "cifar_mini_sync": "ARS2-Neo Sync",
    "cifar_mini_aga": "ARS2-Neo AGA",
}
NOTE = (
    "Test accuracy in %, mean and standard deviation over {seeds} seeds, and the range. ResNet-18 of width 8, 10,000"
    " training images (the seed chooses them, every class alike), 8 epochs of 40 steps, cosine to the end. Validated on"
    " the test set, as published, so that 'best' is chosen on it. Learning rates and all else are those of the"
    " published rows, tuned for none of them; equal epochs, not equal cost. Seconds (median) are of training alone, on"
    " a machine that did other work at the same time: orders of magnitude, no comparison."
)


def spread(values: list[float]) -> str:
    """Return mean, deviation and range of some values."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation} ({min(values):.2f} to {max(values):.2f})"


def columns(path: Path, *names: str) -> list[list[float]]:
    """Return columns of the rows of a metrics.csv in which the first of them is filled."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get(names[0])]
    return [[float(row[name]) for row in rows] for name in names]


def main() -> None:
    """Write the table and the picture."""
    lines = ["| optimizer | best test accuracy | final test accuracy | gradient evaluations | seconds |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    environments, seeds = set(), 0
    for colour, (experiment, label) in enumerate(LABELS.items()):
        runs: list[tuple[Path, dict[str, Any]]] = [
            (path.parent, json.loads(path.read_text())) for path in sorted((HERE / experiment).glob("*/summary.json"))
        ]
        if not runs:
            continue
        seeds = max(seeds, len(runs))
        best, final = ([100 * s["metrics"]["val/accuracy"][key] for _, s in runs] for key in ("best", "last"))
        looks = [s["costs"]["gradient_evaluations"] for _, s in runs]
        seconds = statistics.median(s["costs"]["training_seconds"] for _, s in runs)
        counted = f"{min(looks)}" if min(looks) == max(looks) else f"{min(looks)} to {max(looks)}"
        fewer = "" if len(runs) == 3 else f" ({len(runs)} runs)"
        lines.append(f"| {label}{fewer} | {spread(best)} | {spread(final)} | {counted} | {seconds:.0f} |")
        environments |= {json.dumps({k: v for k, v in s["environment"].items() if k != "command"}) for _, s in runs}
        for number, (folder, _) in enumerate(runs):
            accuracy, epochs, looks = columns(
                folder / "metrics.csv", "val/accuracy", "epoch", "cost/gradient_evaluations"
            )
            named = {"color": f"C{colour}", "label": label if number == 0 else None}
            left.plot([epoch + 1 for epoch in epochs], [100 * value for value in accuracy], **named)
            right.plot(looks, [100 * value for value in accuracy], **named)
    lines += ["", NOTE.format(seeds=seeds), ""]
    lines += [f"Measured with {environment}" for environment in sorted(environments)]
    (HERE / "table.md").write_text("\n".join(lines) + "\n")
    left.set_xlabel("epoch (40 steps)")
    right.set_xlabel("gradient evaluations")
    left.set_ylabel("test accuracy, %")
    left.legend(loc="lower right")
    figure.suptitle("CIFAR-10, ResNet-18 of width 8, 10,000 images: settings as published, not tuned")
    figure.tight_layout()
    figure.savefig(HERE / "curves.png", dpi=120)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
