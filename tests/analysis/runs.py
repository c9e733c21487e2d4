"""Unpack real fits of tiny networks, and copy and damage them for the tests."""

import shutil
import zipfile
from pathlib import Path

# Made by tests/analysis/make_runs.py.
ARCHIVE = Path(__file__).with_name("runs.zip")
# The folder that these runs were trained in, which some of them name.
TRAINED_IN = Path("runs/tests")
SEEDS = (0, 1, 2)
EPOCHS = 6


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
