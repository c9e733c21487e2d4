import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.figure import Figure

from analysis.report import write
from analysis.rows import Group, group
from analysis.runs import Problem, Run, read
from analysis.study import Study
from tests.analysis.runs import unpack

# Columns of the robustness and the forgetting probe, and some of their options.
TEST = [
    *(f"robustness/{name}" for name in ("loss", "loss_8_bit", "loss_3_bit", "loss_noise", "hessian_top")),
    *(f"robustness/{name}" for name in ("rise_gradient", "train_loss")),
    *(f"forgetting/{name}" for name in ("loss_before", "loss_after", "new_loss_before", "new_loss_after")),
]
PROBES = {
    "callbacks.robustness_probe.RobustnessProbe": {"noise": 0.2, "rho": 0.05},
    "callbacks.forgetting_probe.ForgettingProbe": {"steps": 100, "lr": 0.001},
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of real runs; tests copy a run before they damage it."""
    return unpack("runs", tmp_path_factory.mktemp("unpacked"))


@pytest.fixture(scope="session")
def groups(runs: Path) -> list[Group]:
    """Return the groups of the real runs, the larger one first; for tests to copy."""
    found, problems = read([runs])
    assert problems == []
    return sorted(group(found), key=lambda entry: -len(entry.rows))


@pytest.fixture(scope="session")
def run(groups: list[Group]) -> Run:
    """Return a run that tests read again, with other values in its log."""
    return groups[0].rows[0].any


@pytest.fixture(scope="session")
def saved() -> list[Figure]:
    """Return the figures that were saved for the report, in order."""
    return []


@pytest.fixture(scope="session")
def written(groups: list[Group], saved: list[Figure], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the report of both groups, for tests to copy."""
    folder = tmp_path_factory.mktemp("report")
    save = Figure.savefig

    def count(figure: Figure, *arguments: Any, **options: Any) -> None:
        saved.append(figure)
        save(figure, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", count)
        write(folder, groups, [Problem(Path("runs/<lost>"), "it has no config.yaml")], Study(title="A & B"))
    return folder


@pytest.fixture(scope="session")
def corners(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a search's winners of all eight corners, two seeds each, probed."""
    return unpack("corners", tmp_path_factory.mktemp("unpacked"))


@pytest.fixture(scope="session")
def tested(corners: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same winners, all but one with random results of both probes in a test."""
    folder = tmp_path_factory.mktemp("tested") / "corners"
    shutil.copytree(corners, folder)
    random = np.random.default_rng(0)
    for log in sorted(folder.rglob("metrics.csv"))[1:]:
        rows = pd.read_csv(log)
        test = {"epoch": rows["epoch"].max() + 1, **dict(zip(TEST, random.random(len(TEST)), strict=True))}
        pd.concat([rows, pd.DataFrame([test])]).to_csv(log, index=False)
        path = log.parent / "config.yaml"
        config = yaml.safe_load(path.read_text())
        config["trainer"]["callbacks"] += [
            {"class_path": name, "init_args": options} for name, options in PROBES.items()
        ]
        path.write_text(yaml.safe_dump(config))
    return folder
