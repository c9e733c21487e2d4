"""Run folders for the tests: real fits of tiny networks, made once, and copies of them that are damaged."""

import json
import shutil
from itertools import product
from pathlib import Path

from tests.helpers.commands import ADAMW, AGA, TINY, fit

SEEDS = (0, 1, 2)
EPOCHS = 6
# On the third of its epochs nothing of a tiny network is settled, but every column is there.
LENGTH = (*TINY, "--trainer.max_epochs", EPOCHS)


def seeded(seed: int) -> tuple[object, ...]:
    return "--seed_everything", seed, "--data.seed", seed


def make_runs(runs: Path) -> None:
    """Two rows of three seeds, one of another protocol, and a search with unequal budgets and its winner."""
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
    """Two seeds of every corner of flatness, geometry and energy, as a search's winners, with the flatness probe."""
    probe = {"class_path": "callbacks.flatness_probe.FlatnessProbe", "init_args": {"epochs": 2, "rho": 0.05}}
    probed = (*TINY, "--trainer.max_epochs", 2, "--trainer.callbacks", json.dumps([probe]), "--experiment", "corners")
    for mode, geometry, energy in product(("base", "sync"), ("true", "false"), ("true", "false")):
        switches = ("--model.optimizer.geometry", geometry, "--model.optimizer.energy", energy)
        name = ("--sweep.name", "corners", "--sweep.optimizer", f"{mode} {geometry} {energy}")
        for seed in SEEDS[:2]:
            fit(runs, "--config", f"configs/grok_{mode}.yaml", *probed, *switches, *name, *seeded(seed))


def copy(folder: Path, runs: Path, name: str) -> Path:
    """Copy a run folder to ``runs/copies/name``."""
    target = runs / "copies" / name
    shutil.copytree(folder, target)
    return target


def cut(folder: Path, lines: int) -> None:
    """Leave of the log its head and so many lines, and no summary: a run that was killed."""
    path = folder / "metrics.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[: lines + 1]))
    (folder / "summary.json").unlink(missing_ok=True)
