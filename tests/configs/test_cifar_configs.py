"""The CIFAR-10 configs are as published.

The mini configs are small versions of them, and overlays change only the keys that they state.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.configs.test_configs import TINY_CIFAR, part, read, saved_groups
from tests.datamodules.tiny_cifar10 import tiny_cifar10, tiny_files  # noqa: F401
from tests.helpers.commands import ROOT, changed_by, fit
from tests.helpers.marks import slow

NEO = {"lr": 1e-3, "betas": [0.9, 0.999], "weight_decay": 5e-4, "ns_steps": 5}
AGA = {"mode": "aga", "rho": 0.1, "k": 10, "alpha": 0.1, "phi_beta": 0.99, "phi_lambda": 2.0, "phi_gamma": 2.0}
MUON = {"lr": 1e-3, "momentum": 0.95, "weight_decay": 5e-4}
# Optimizer class, its options, options of the vector track, epochs, where the cosine ends.
PUBLISHED: dict[str, tuple[str, dict[str, Any], dict[str, Any], int, float]] = {
    "adamw": ("torch.optim.AdamW", {"lr": 1e-3, "weight_decay": 5e-4}, {}, 100, 0.0),
    "muon": ("ars2.Muon", MUON, {"weight_decay": 0.01}, 100, 0.0),
    "base": ("ars2.ARS2Neo", {**NEO, "mode": "base"}, {"weight_decay": 0.01}, 100, 0.0),
    "sync": ("ars2.ARS2Neo", {**NEO, "mode": "sync", "rho": 0.1}, {"weight_decay": 0.01}, 60, 0.0),
    "aga": ("ars2.ARS2Neo", {**NEO, **AGA}, {"weight_decay": 0.01}, 20, 1e-5),
}
DATA = {"validation": "test", "seed": 42, "batch_size": 256, "padding": 4, "flip": True, "cutout": 16}


@pytest.mark.parametrize("row", PUBLISHED)
def test_is_as_published(row: str) -> None:
    kind, options, vector, epochs, end = PUBLISHED[row]
    config = read(ROOT / f"configs/cifar_{row}.yaml")
    model = config["model"]["init_args"]
    assert model["optimizer"]["class_path"] == kind
    assert part(model["optimizer"]["init_args"], options) == options
    assert "eps" in model["optimizer"]["init_args"]
    assert (model["policy"], model.get("vector", {}), model.get("matrix", {})) == ("all", vector, {})
    assert (model["width"], model["label_smoothing"]) == (64, 0.0)
    assert model["scheduler"]["class_path"] == "torch.optim.lr_scheduler.CosineAnnealingLR"
    assert model["scheduler"]["init_args"] == {"T_max": epochs, "eta_min": end}
    assert (model["scheduler_interval"], config["trainer"]["max_epochs"]) == ("epoch", epochs)
    assert part(config["data"]["init_args"], DATA) == DATA
    assert config["data"]["init_args"]["train_examples"] is None
    assert "root" not in config["data"]["init_args"]
    assert config["seed_everything"] == 42


@pytest.mark.parametrize("row", PUBLISHED)
def test_the_mini_row_is_the_published_one_with_a_narrow_network_fewer_images_and_epochs(row: str) -> None:
    full, mini = (read(ROOT / f"configs/cifar_{name}.yaml") for name in (row, f"mini_{row}"))
    model, small = full["model"]["init_args"], mini["model"]["init_args"]
    assert (small.pop("width"), model.pop("width")) == (8, 64)
    assert small.pop("channels_last") is True
    epochs = {config["trainer"].pop("max_epochs") for config in (mini,)} | {
        small["scheduler"]["init_args"].pop("T_max"),
    }
    assert len(epochs) == 1
    full["trainer"].pop("max_epochs")
    model["scheduler"]["init_args"].pop("T_max")
    assert mini["data"]["init_args"].pop("train_examples") == 10_000
    assert full["data"]["init_args"].pop("train_examples") is None
    assert (mini.pop("experiment"), full.pop("experiment")) == (f"cifar_mini_{row}", f"cifar_{row}")
    assert mini == full


@pytest.mark.usefixtures("tiny_cifar10")
@pytest.mark.parametrize("row", [row if row == "base" else slow(row) for row in PUBLISHED])
def test_reaches_the_optimizer_as_stated_and_names_no_folder(row: str, tmp_path: Path) -> None:
    _, options, vector, _, _ = PUBLISHED[row]
    config = ROOT / f"configs/cifar_{row}.yaml"
    arguments = ("--config", config, *TINY_CIFAR, "--trainer.max_epochs", 1, "--wandb", "false")
    folder = fit(tmp_path, *arguments, "--model.scheduler", "null")
    groups = saved_groups(folder / "checkpoints/last.ckpt")
    expected = {key: value for key, value in options.items() if key in groups["matrix"]}
    for track, wanted in (("matrix", expected), ("vector", {**expected, **vector})):
        found = {key: list(value) if isinstance(value, tuple) else value for key, value in groups[track].items()}
        assert part(found, wanted) == wanted, track
    # A root that the environment names is not written down.
    assert read(folder / "config.yaml")["data"]["init_args"]["root"] is None


def test_overlays_change_layout_precision_and_devices_only() -> None:
    config, gpu, ddp = (f"configs/{name}.yaml" for name in ("cifar_aga", "overlays/cifar_gpu", "overlays/ddp"))
    assert changed_by(("--config", gpu, "--config", ddp), "--config", config) == {
        "channels_last: true",
        "on_device: true",
        "benchmark: true",
        "accelerator: gpu",
        "strategy: ddp",
        "precision: bf16-mixed",
        "sync_batchnorm: true",
    }
