"""Train the tiny runs of ``runs.zip``, which the tests here read.

python -m tests.analysis.make_runs
"""

import json
import shutil
import sys
from itertools import product
from pathlib import Path

from analysis.archive import pack
from tests.analysis.runs import ARCHIVE, EPOCHS, SEEDS, TRAINED_IN
from tests.helpers.commands import ADAMW, AGA, ROOT, TINY, call, fit

# So few epochs do not train a tiny network to the end, but they log every column.
LENGTH = (*TINY, "--trainer.max_epochs", EPOCHS)


def seeded(seed: int) -> tuple[object, ...]:
    return "--seed_everything", seed, "--data.seed", seed


def make_runs(runs: Path) -> None:
    """Train rows of three seeds, one of another protocol, and a search.

    The search has unequal budgets, and a run of its winner.
    """
    for seed in SEEDS:
        fit(runs, *ADAMW, *LENGTH, *seeded(seed), "--model.optimizer.lr", "0.01")
        fit(runs, *AGA, *LENGTH, *seeded(seed), "--internals.every_n_steps", "1")
    fit(runs, *ADAMW, *LENGTH, "--data.train_fraction", "0.6")
    for optimizer, config, rates in (("adamw", ADAMW, (0.003, 0.01, 0.03)), ("aga", AGA, (0.001, 0.01))):
        for trial, rate in enumerate(rates):
            sweep = ("--sweep.name", "search", "--sweep.optimizer", optimizer, "--sweep.trial", trial)
            fit(runs, *config, *LENGTH, *sweep, "--model.optimizer.lr", rate, "--experiment", "search")
    winner = ("--sweep.name", "search", "--sweep.optimizer", "aga", "--experiment", "search")
    fit(runs, *AGA, *LENGTH, *seeded(5), *winner, "--model.optimizer.lr", "0.01")


def make_corners(runs: Path) -> None:
    """Train two seeds of every corner of flatness, geometry and energy.

    They are a search's winners, with the flatness probe.
    """
    probe = {"class_path": "callbacks.flatness_probe.FlatnessProbe", "init_args": {"epochs": 2, "rho": 0.05}}
    probed = (*TINY, "--trainer.max_epochs", 2, "--trainer.callbacks", json.dumps([probe]), "--experiment", "corners")
    for mode, geometry, energy in product(("base", "sync"), ("true", "false"), ("true", "false")):
        options = ("--model.optimizer.geometry", geometry, "--model.optimizer.energy", energy)
        name = ("--sweep.name", "corners", "--sweep.optimizer", f"{mode} {geometry} {energy}")
        for seed in SEEDS[:2]:
            fit(runs, "--config", f"configs/grok_{mode}.yaml", *probed, *options, *name, *seeded(seed))


def make_others(folder: Path) -> None:
    """Train the runs of single tests, in a folder for each test."""
    for rate in ("0.001", "0.002"):
        fit(folder / "settings", *AGA, *LENGTH, "--model.optimizer.lr", rate)
    first = fit(folder / "resumed", *AGA, *TINY, "--trainer.max_epochs", 3)
    checkpoint = first / "checkpoints" / "last.ckpt"
    fit(folder / "resumed", *AGA, *LENGTH, "--ckpt_path", checkpoint)
    fit(folder / "continuous", *AGA, *LENGTH)
    lightning = "lightning.pytorch.callbacks"
    callbacks = (
        *(f"--trainer.callbacks+={lightning}.LearningRateMonitor", "--trainer.callbacks.logging_interval", "step"),
        *(f"--trainer.callbacks+={lightning}.DeviceStatsMonitor", "--trainer.callbacks.cpu_stats", "false"),
        f"--trainer.callbacks+={lightning}.ModelSummary",
        *("--trainer.log_every_n_steps", 1),
    )
    fit(folder / "watched", *AGA, *LENGTH, *seeded(0), "--internals.every_n_steps", "1", *callbacks)
    options = ("--model.optimizer.lr", "1e30", "--model.optimizer.weight_decay", "0")
    diverged = call("fit", *ADAMW, *TINY, *options, "--runs", folder / "diverged")
    assert "the loss is nan" in diverged.error
    for traceback in (folder / "diverged").rglob("error.txt"):
        traceback.write_text(traceback.read_text().replace(f"{ROOT}/", ""))
    length = ("--wandb", "false", "--ckpt_path", checkpoint, "--runs", folder / "evaluation")
    assert call("test", *AGA, *TINY[:-4], *length).code == 0


def main() -> None:
    """Train the runs and pack them."""
    folder = ROOT / TRAINED_IN
    shutil.rmtree(folder, ignore_errors=True)
    sys.argv = ["train.py"]  # the runs record their command
    make_runs(TRAINED_IN / "runs")
    make_corners(TRAINED_IN / "corners")
    make_others(TRAINED_IN)
    print(f"{pack(folder, ARCHIVE)} runs, {ARCHIVE.stat().st_size:,} bytes")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
