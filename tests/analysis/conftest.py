import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

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
