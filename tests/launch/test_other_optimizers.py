"""Optimizers of other libraries train by their class path alone.

The libraries are torch, pytorch-optimizer and heavyball. Each optimizer trains, resumes exactly, and has its options by
track, a scheduler and a row. Others are refused with a sentence.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from analysis.rows import group
from analysis.runs import read
from tests.helpers.commands import ROOT, SMALL, TINY, Result, call, fit, folders, metrics
from tests.helpers.marks import slow

MUON = {"matrix": {"use_muon": True}, "vector": {"use_muon": False, "lr": 2e-3}}
# Class path, its options, options of the module. Every one has a learning rate of 0.01 unless it says otherwise.
OPTIMIZERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "torch.optim.AdamW": ({}, {}),
    "torch.optim.SGD": ({"momentum": 0.9}, {}),
    "torch.optim.NAdam": ({}, {}),
    "torch.optim.Adafactor": ({}, {}),
    "pytorch_optimizer.SOAP": ({}, {}),
    "pytorch_optimizer.Lion": ({"lr": 1e-3}, {}),
    "pytorch_optimizer.AdEMAMix": ({}, {}),
    "pytorch_optimizer.ADOPT": ({}, {}),
    "pytorch_optimizer.ScheduleFreeAdamW": ({}, {}),
    "pytorch_optimizer.Shampoo": ({}, {}),
    "pytorch_optimizer.Muon": ({}, MUON),
    "heavyball.AdamW": ({}, {}),
    "heavyball.SOAP": ({}, {}),
    "heavyball.PSGDKron": ({}, {}),
    "heavyball.SFAdamW": ({}, {}),
}
# A kind of each is enough for every day.
QUICK = ("pytorch_optimizer.SOAP", "ADOPT", "ScheduleFreeAdamW", "Muon", "PSGDKron")
SCHEDULER = {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.5}}
EPOCHS, STEPS = 4, 8


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let heavyball compile nothing, which takes minutes on a CPU."""
    monkeypatch.setattr("heavyball.utils.compile_mode", None)


def config(folder: Path, class_path: str, options: dict[str, Any], model: dict[str, Any]) -> Path:
    """Write a config of modular addition with another optimizer."""
    content = yaml.safe_load((ROOT / "configs/grok_adamw.yaml").read_text())
    arguments = content["model"]["init_args"]
    arguments.update({"optimizer": {"class_path": class_path, "init_args": options}, **model})
    content["experiment"] = "other"
    # One in the middle of an epoch of two steps.
    every = {"every_n_train_steps": 3, "save_top_k": -1, "filename": "{step}"}
    content["trainer"]["callbacks"] = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": every},
        {"class_path": "callbacks.milestones.GrokkingMilestones"},
    ]
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def train(folder: Path, *arguments: object, runs: str = "runs") -> Path:
    tiny = (*SMALL, "--data.batch_size", 8, "--wandb", "false", "--trainer.max_epochs", EPOCHS)
    return fit(folder / runs, "--config", folder / "config.yaml", *tiny, *arguments)


def refused(folder: Path, class_path: str, options: dict[str, Any], model: dict[str, Any]) -> Result:
    path = config(folder, class_path, options, model)
    return call("fit", "--config", path, *SMALL, "--data.batch_size", 8, "--wandb", "false", "--runs", folder / "runs")


def assert_same(actual: Any, expected: Any, place: str) -> None:
    assert type(actual) is type(expected), place
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected), place
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), place
        for key, value in expected.items():
            assert_same(actual[key], value, f"{place}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), place
        for index, value in enumerate(expected):
            assert_same(actual[index], value, f"{place}.{index}")
    else:
        assert actual == expected, place


@pytest.mark.parametrize("class_path", [path if path.endswith(QUICK) else slow(path) for path in OPTIMIZERS])
def test_trains_by_its_class_path_and_resumes_exactly(class_path: str, tmp_path: Path) -> None:
    options, model = OPTIMIZERS[class_path]
    options = {"lr": 0.01, **options}
    model = {"scheduler": SCHEDULER, "vector": {"lr": 2e-3}, **model}
    config(tmp_path, class_path, options, model)
    folder = train(tmp_path)

    summary = json.loads((folder / "summary.json").read_text())
    costs = summary["costs"]
    assert costs["optimizer_steps"] == costs["gradient_evaluations"] == STEPS
    losses = [float(row["train/loss"]) for row in metrics(folder) if "train/loss" in row]
    assert len(losses) == EPOCHS and losses[-1] < losses[0]

    ended = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    groups = {group["track"]: group for group in ended["optimizer_states"][0]["param_groups"]}
    assert groups["matrix"]["lr"] == pytest.approx(options["lr"] / 2**EPOCHS)
    assert groups["vector"]["lr"] == pytest.approx(2e-3 / 2**EPOCHS)
    assert any("mlp_out" in name for name in groups["matrix"]["param_names"])

    again = train(tmp_path, "--ckpt_path", folder / "checkpoints/step=3.ckpt", runs="again")
    resumed = torch.load(again / "checkpoints/last.ckpt", weights_only=True)
    assert resumed["gradient_evaluations"] == STEPS
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(resumed[part], ended[part], part)


REFUSED: list[Any] = [
    ("torch.optim.Muon", {}, {}, "only supports 2D parameters .*: name ars2.Muon, .* or pytorch_optimizer.Muon with"),
    ("torch.optim.LBFGS", {}, {}, "it evaluates the loss several times in a step and has a single group"),
    ("torch.optim.SparseAdam", {}, {}, "does not support dense gradients"),
    ("pytorch_optimizer.Muon", {}, {}, r"give the module the options matrix: \{use_muon: true\} and vector"),
    ("pytorch_optimizer.AdaHessian", {}, {}, r"AdaHessian differentiates the gradient \(backward\(create_graph=True"),
    slow("pytorch_optimizer.SophiaH", {}, {}, r"SophiaH differentiates the gradient \(backward\(create_graph=True"),
    (
        "pytorch_optimizer.BSAM",
        {"num_data": 9},
        {},
        "evaluates the loss again after it has moved the parameters, .*Neo",
    ),
    ("heavyball.SAMWrapper", {}, {}, r"wraps an optimizer without train\(\) and eval\(\)"),
    slow("pytorch_optimizer.Lookahead", {}, {}, "it wraps another optimizer; name that one"),
    ("pytorch_optimizer.AliG", {}, {}, "AliG needs more than the gradient for its step, such as the loss"),
    ("pytorch_optimizer.LOMO", {}, {}, "cannot be made of groups of parameters, and may need the model"),
    slow("pytorch_optimizer.Conda", {}, {}, r"objects in its state that cannot be loaded .*\(GaLoreProjector\)"),
    # Its enums are numbers, which a config cannot contain.
    ("pytorch_optimizer.ScalableShampoo", {}, {}, r"objects .* cannot be loaded .*\(PreConditioner, SGDGraft\)"),
    ("pytorch_optimizer.Lion", {}, {"matrix": {"learning_rate": 1.0}}, "no option 'learning_rate': did you mean 'lr'"),
    ("pytorch_optimizer.Muon", {}, {**MUON, "matrix": {"use_muon": True, "use_adam": True}}, "no option 'use_adam'"),
]


@pytest.mark.parametrize(("class_path", "options", "model", "message"), REFUSED)
def test_what_cannot_be_used_is_refused_with_a_sentence(
    class_path: str, options: dict[str, Any], model: dict[str, Any], message: str, tmp_path: Path
) -> None:
    error = refused(tmp_path, class_path, options, model).error
    assert re.search(message, error), error
    assert "line " not in error


def test_rows_of_one_experiment_are_named_by_their_optimizers(tmp_path: Path) -> None:
    for class_path in ("heavyball.AdamW", "pytorch_optimizer.ADOPT", "pytorch_optimizer.ADOPT"):
        config(tmp_path, class_path, {"lr": 0.01}, {})
        train(tmp_path, "--seed_everything", len(folders(tmp_path / "runs")), "--trainer.max_epochs", 1)
    runs, problems = read([tmp_path / "runs"])
    (table,) = group(runs)
    assert not problems
    # ADOPT's default is a lambda, whose address is different in each run.
    assert {row.label: sorted(row.runs) for row in table.rows} == {
        "other, AdamW": ["0.42"],
        "other, ADOPT": ["1.42", "2.42"],
    }


PAGE = (ROOT / "docs/other_optimizers.md").read_text()


def table(heading: str) -> list[list[str]]:
    """Return the names of each row of the table below a heading of the page."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [re.findall(r"`([\w.]+)`", line) for line in section.splitlines() if line.startswith("| `")]


def test_the_page_lists_what_is_tested() -> None:
    works = {f"{library}.{name}" for library, *names in table("What works") for name in names}
    assert works == OPTIMIZERS.keys()
    tested = {getattr(case, "values", case)[0] for case in REFUSED}
    names = {line.split(" | ")[0] for line in PAGE.split("## What does not\n")[1].splitlines() if line[:3] == "| `"}
    shown = {name.rpartition(".")[2] for cell in names for name in re.findall(r"`([\w.]+)`", cell)}
    assert shown == {path.rpartition(".")[2] for path in tested} - {"Lion"}


def test_the_overlay_of_the_page_replaces_the_optimizer(tmp_path: Path) -> None:
    overlay, entry = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)
    (tmp_path / "overlay.yaml").write_text(overlay)
    folder = fit(
        tmp_path / "runs", "--config", ROOT / "configs/grok_adamw.yaml", "--config", tmp_path / "overlay.yaml", *TINY
    )
    (state,) = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["optimizer_states"]
    decays = {group["track"]: group["weight_decay"] for group in state["param_groups"]}
    assert decays == {"matrix": 1.0, "vector": 0.0} and "precondition_frequency" in state["param_groups"][0]
    (shown,) = yaml.safe_load(entry)["optimizers"].items()
    committed = yaml.safe_load((ROOT / "configs/sweeps/grok_others.yaml").read_text())["optimizers"][shown[0]]
    assert shown[1]["configs"] == committed["configs"] and shown[1]["space"].items() <= committed["space"].items()
