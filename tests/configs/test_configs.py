from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from studies.newton_schulz_steps import winner
from tests.datamodules.tiny_cifar10 import tiny_cifar10, tiny_files  # noqa: F401
from tests.helpers import text
from tests.helpers.commands import ROOT, SMALL, call, fit
from tests.helpers.marks import slow

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
NEO = {"lr": 1e-3, "betas": [0.9, 0.98], "weight_decay": 1.0, "ns_steps": 5}
MUON = {"lr": 0.02, "momentum": 0.95, "nesterov": True, "betas": [0.9, 0.95], "ns_steps": 5}

# As published: optimizer class, its options, policy, options of the vector track, epochs.
PUBLISHED: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], int]] = {
    "grok_adamw": ("torch.optim.AdamW", {"lr": 1e-3, "betas": [0.9, 0.98], "weight_decay": 1.0}, "all", {}, 600),
    "grok_muon": ("ars2.Muon", {**MUON, "weight_decay": 0.0}, "hidden", {"lr": 3e-4, "weight_decay": 0.0}, 400),
    "grok_muon_wd": ("ars2.Muon", {**MUON, "weight_decay": 1.0}, "hidden", {"lr": 3e-4, "weight_decay": 0.0}, 400),
    "grok_base": (
        "ars2.ARS2Neo",
        {**NEO, "mode": "base"},
        "all",
        {"betas": [0.9, 0.999], "weight_decay": 0.01},
        400,
    ),
    "grok_sync": (
        "ars2.ARS2Neo",
        {**NEO, "mode": "sync", "rho": 0.1},
        "all",
        {"betas": [0.9, 0.999], "weight_decay": 0.01},
        400,
    ),
    "grok_aga": (
        "ars2.ARS2Neo",
        {**NEO, "mode": "aga", "k": 10, "rho": 0.1, "alpha": 0.1, "phi_lambda": 0.1, "phi_beta": 0.99, "phi_gamma": 2},
        "all",
        {"betas": [0.9, 0.999], "weight_decay": 0.01},
        400,
    ),
}
NETWORK = {"p": 113, "width": 128, "heads": 4, "mlp_width": 512}
DATA = {"p": 113, "train_fraction": 0.3, "batch_size": 512}

# What makes a task's configs small enough for a step: one batch an epoch.
TINY_CIFAR = (
    "--model.width",
    "2",
    "--data.train_examples",
    "null",
    "--data.validation",
    "test",
    "--data.batch_size",
    "200",
)


def read(config: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(config.read_text())
    return content


def part(of: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Return the values of ``of`` at the keys of ``like``.

    Keys that ``of`` lacks are left out.
    """
    return {key: of[key] for key in like if key in of}


def saved_groups(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Return the options of a run's parameter groups, by track.

    All groups of a track have the same options here.
    """
    (state,) = torch.load(checkpoint, weights_only=True)["optimizer_states"]
    return {group["track"]: group for group in state["param_groups"]}


def small(config: Path, folder: Path) -> tuple[object, ...]:
    """Return options that make a config's task tiny.

    The data that they need is written to ``folder``.
    """
    if config.stem.startswith("wikitext2_"):
        root = text.write_corpus(folder / "text")
        return *text.SMALL_TEXT, "--data.root", root, "--data.cache", folder, "--trainer.limit_train_batches", 1
    return TINY_CIFAR if config.stem.startswith("cifar_") else SMALL


# Of each task and each optimizer one; the published settings of grokking take a step below.
QUICK = ("grok_random", "cifar_aga", "cifar_mini_schedulefree", "wikitext2_sync", "wikitext2_nano_soap")


@pytest.mark.parametrize(
    "config",
    [pytest.param(path, marks=() if path.stem in QUICK else pytest.mark.slow, id=path.stem) for path in CONFIGS],
)
def test_config_takes_a_step(config: Path, tmp_path: Path, tiny_cifar10: Path) -> None:  # noqa: F811
    options = small(config, tmp_path / "data")
    folder = fit(tmp_path / "runs", "--config", config, *options, "--trainer.max_epochs", 1, "--wandb", "false")
    assert folder.parent.name == config.stem
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 1


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_ars2_neo_states_its_mode(config: Path) -> None:
    """Let no config depend on the default mode."""
    optimizer = read(config)["model"]["init_args"]["optimizer"]
    assert ("mode" in optimizer["init_args"]) == (optimizer["class_path"] == "ars2.ARS2Neo")


def test_every_config_of_the_task_exists() -> None:
    assert set(PUBLISHED) <= {config.stem for config in CONFIGS}


@pytest.mark.parametrize("name", PUBLISHED)
def test_states_every_option_of_its_optimizer(name: str) -> None:
    """No option of the experiment is left to a default, which could change."""
    kind, published, *_ = PUBLISHED[name]
    model = read(ROOT / f"configs/{name}.yaml")["model"]["init_args"]
    assert model["optimizer"]["class_path"] == kind
    assert {*published, "eps"} <= set(model["optimizer"]["init_args"])
    assert "policy" in model


@pytest.mark.parametrize("name", PUBLISHED)
def test_is_as_published(name: str) -> None:
    _, options, policy, vector, epochs = PUBLISHED[name]
    config = read(ROOT / f"configs/{name}.yaml")
    model = config["model"]["init_args"]
    assert part(model["optimizer"]["init_args"], options) == options
    assert model["policy"] == policy
    assert model.get("vector", {}) == vector
    assert model.get("matrix", {}) == {}
    assert part(model, NETWORK) == NETWORK
    assert part(config["data"]["init_args"], DATA) == DATA
    assert config["trainer"]["max_epochs"] == epochs
    assert config["seed_everything"] == config["data"]["init_args"]["seed"] == 42


@pytest.mark.parametrize("name", [name if name in ("grok_muon", "grok_aga") else slow(name) for name in PUBLISHED])
def test_reaches_the_optimizer_as_stated(name: str, tmp_path: Path) -> None:
    """Read the options of the optimizer of a run from its checkpoint."""
    _, options, _, vector, _ = PUBLISHED[name]
    config = ROOT / f"configs/{name}.yaml"
    folder = fit(tmp_path, "--config", config, *SMALL, "--trainer.max_epochs", 1, "--wandb", "false")
    groups = saved_groups(folder / "checkpoints/last.ckpt")
    expected = {key: value for key, value in options.items() if key in groups["matrix"]}
    assert {"lr", "weight_decay"} <= set(expected)
    for track, wanted in (("matrix", expected), ("vector", {**expected, **vector})):
        found = {key: list(value) if isinstance(value, tuple) else value for key, value in groups[track].items()}
        assert part(found, wanted) == wanted, track


def test_the_two_muons_differ_in_weight_decay_only() -> None:
    muon, with_decay = (read(ROOT / f"configs/{name}.yaml") for name in ("grok_muon", "grok_muon_wd"))
    assert with_decay.pop("experiment") != muon.pop("experiment")
    assert with_decay["model"]["init_args"]["optimizer"]["init_args"].pop("weight_decay") == 1.0
    assert muon["model"]["init_args"]["optimizer"]["init_args"].pop("weight_decay") == 0.0
    assert with_decay == muon


@pytest.mark.parametrize(
    ("config", "study"),
    [("cifar_ceiling_late", "ceiling_cifar"), ("wikitext2_ceiling_late", "ceiling_language")],
)
def test_the_recommended_second_pass_is_the_winner_of_its_study(config: str, study: str) -> None:
    resolved = yaml.safe_load(call("fit", "--config", ROOT / f"configs/{config}.yaml", "--print_config").out)
    found = winner(study, "late_averaged")
    del found["trainer"]["callbacks"][2:]  # these only measure
    found["data"]["init_args"]["seed"] = 42  # a study's seeds are its own
    for part_of_config in ("model", "data", "trainer", "checkpoint", "test_best"):
        assert resolved[part_of_config] == found[part_of_config]


@pytest.mark.parametrize("task", ["grok", "cifar_mini", "wikitext2_nano"])
@pytest.mark.parametrize("name", ["soap", "schedulefree"])
def test_optimizers_of_other_libraries_replace_adamw_alone(task: str, name: str) -> None:
    adamw, other = (read(ROOT / f"configs/{task}_{row}.yaml") for row in ("adamw", name))
    assert (adamw.pop("experiment"), other.pop("experiment")) == (f"{task}_adamw", f"{task}_{name}")
    optimizers = [config["model"]["init_args"].pop("optimizer") for config in (adamw, other)]
    assert len({optimizer["init_args"]["weight_decay"] for optimizer in optimizers}) == 1
    if name == "schedulefree":
        for key in ("scheduler", "scheduler_interval"):
            adamw["model"]["init_args"].pop(key, None)
    assert other == adamw


@pytest.mark.parametrize("task", ["grok", "cifar_mini", "wikitext2_nano"])
def test_sweeps_of_other_libraries_have_the_budget_of_the_first(task: str) -> None:
    first, others = (read(ROOT / f"configs/sweeps/{task}{suffix}.yaml") for suffix in ("", "_others"))
    for sweep in (first, others):
        del sweep["name"], sweep["optimizers"]
    assert others == first
