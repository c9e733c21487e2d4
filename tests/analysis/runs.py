"""Unpack real fits of tiny networks, and copy, change and damage them."""

import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from analysis.rows import AXIS, Group, Row
from analysis.runs import Run
from experiment.target import Target

# Made by tests/analysis/make_runs.py.
ARCHIVE = Path(__file__).with_name("runs.zip")
# The folder that these runs were trained in, which some of them name.
TRAINED_IN = Path("runs/tests")
SEEDS = (0, 1, 2)
EPOCHS = 6
HALF = Target("half", "val/accuracy", 0.5)


def unpack(kind: str, target: Path) -> Path:
    """Unpack the runs below ``kind`` in the archive and return their folder."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(target, [name for name in archive.namelist() if name.startswith(f"{kind}/")])
    return target / kind


def copy(folder: Path, runs: Path, name: str) -> Path:
    """Copy a run folder to ``runs/copies/name``."""
    target = runs / "copies" / name
    shutil.copytree(folder, target)
    return target


def cut(folder: Path, lines: int) -> None:
    """Leave the first ``lines`` of the log and no summary, as a killed run does."""
    path = folder / "metrics.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[: lines + 1]))
    (folder / "summary.json").unlink(missing_ok=True)


def repeated(run: Run, seed: int, columns: Mapping[str, float]) -> Run:
    """Read a run again as that of another seed, with some columns constant."""
    found = Run(run.folder)
    found.identity.seed = str(seed)
    for column, value in columns.items():
        found.log[column] = np.full(len(found.log["epoch"]), float(value))
    return found


def valued(run: Run, label: str, values: Sequence[float], metric: str = "val/accuracy", first: int = 0) -> Row:
    """Return a row of copies of a run with these values of a metric, a seed each."""
    return Row({str(seed): repeated(run, seed, {metric: x}) for seed, x in enumerate(values, first)}, label, name=label)


def timed(run: Run, label: str, times: Sequence[float | None], first: int = 0) -> Row:
    """Return a row of copies of a run that reached :data:`HALF` at these times.

    They are evaluations, ``None`` for a run that did not reach it within 1,000.
    """
    logs = [{AXIS: 1000.0 if time is None else time, "val/accuracy": 0.0 if time is None else 1.0} for time in times]
    return Row({str(seed): repeated(run, seed, log) for seed, log in enumerate(logs, first)}, label, name=label)


def ranked(group: Group, rows: Sequence[Row], targets: Sequence[Target] = ()) -> Group:
    """Return a group with these rows, the best first, and with targets of its own."""
    found = replace(group, rows=list(rows), sweeps={}, targets=list(targets), borrowed=False)
    found.rows = sorted(rows, key=found.order)
    return found
