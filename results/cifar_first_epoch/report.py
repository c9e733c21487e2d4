"""Table and picture of the first epoch of the published CIFAR-10 rows in this folder: published against measured.

    for row in adamw sync; do
        python train.py fit --config configs/cifar_$row.yaml --runs results/cifar_first_epoch --wandb false \
            --trainer.max_epochs 1 --trainer.precision bf16-mixed --model.channels_last true
    done
    python results/cifar_first_epoch/report.py

Reads every run's metrics.csv and summary.json, writes table.md and curves.png here.
"""

import csv
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
# Test accuracy after one epoch, in %, as the ARS2 project reported it.
PUBLISHED = {"cifar_adamw": ("AdamW", 45.8), "cifar_sync": ("ARS2-Neo Sync", 62.9)}


def main() -> None:
    """Write the table and the picture."""
    lines = ["| optimizer | test accuracy after epoch 1 (published) | train loss | test loss | gradient evaluations |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    environments, names = set(), []
    for experiment, (label, published) in PUBLISHED.items():
        for path in sorted((HERE / experiment).glob("*/summary.json")):
            summary = json.loads(path.read_text())
            with (path.parent / "metrics.csv").open(newline="") as file:
                rows = list(csv.DictReader(file))
            train_loss = next(float(row["train/loss"]) for row in rows if row.get("train/loss"))
            accuracy = 100 * summary["metrics"]["val/accuracy"]["last"]
            losses = f"{train_loss:.3f} | {summary['metrics']['val/loss']['last']:.3f}"
            evaluations = summary["costs"]["gradient_evaluations"]
            lines.append(f"| {label} | {accuracy:.2f} % ({published} %) | {losses} | {evaluations} |")
            environments.add(json.dumps({k: v for k, v in summary["environment"].items() if k != "command"}))
            names.append(label)
            left.bar([len(names) - 0.2, len(names) + 0.2], [accuracy, published], 0.36, color=["C0", "C7"])
            inside = [row for row in rows if row.get("optimizer/update_ratio_matrix")]
            steps = [float(row["cost/optimizer_steps"]) for row in inside]
            ratios = [float(row["optimizer/update_ratio_matrix"]) for row in inside]
            right.plot(steps, ratios, marker="o", label=label)
    lines += [
        "",
        "One run a row, seed 42, all 50,000 images, 196 steps of 256, bfloat16 autocast on a processor; the learning"
        " rate is that of the whole schedule's first epoch. The runs were paused and shared their processor with other"
        " work, so their seconds are no measurement.",
        "",
    ]
    lines += [f"Measured with {environment}" for environment in sorted(environments)]
    (HERE / "table.md").write_text("\n".join(lines) + "\n")
    left.set_xticks(range(1, len(names) + 1), names)
    left.set_ylabel("test accuracy after epoch 1, %")
    left.set_title("measured (blue) and published (grey)")
    right.set_xlabel("optimizer step")
    right.set_ylabel("size of update / size of weights, matrices")
    right.set_yscale("log")
    right.legend()
    figure.tight_layout()
    figure.savefig(HERE / "curves.png", dpi=120)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
