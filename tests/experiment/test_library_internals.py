"""No other private names of libraries are used than the listed ones.

The installed versions have all of them.
"""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning_utilities.core.imports import RequirementCache
from torch._dynamo import exc
from torch.nn.modules import batchnorm
from torchmetrics import MeanMetric

from tests.helpers.commands import ROOT

SUITE = ("modules", "datamodules", "callbacks", "experiment", "launch", "analysis", "studies")
# Public in spite of the underscore: of named tuples, of os, and torch's functions on lists of tensors.
PUBLIC = ("_replace", "_exit", "_foreach_")


@pytest.fixture(scope="module")
def trainer() -> L.Trainer:
    return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


def of_the_suite(trainer: L.Trainer) -> dict[str, list[Any]]:
    """Return every private name with the objects that must have it."""
    epoch_loop = trainer.fit_loop.epoch_loop
    return {
        # In experiment/library_internals.py.
        "_NormBase": [batchnorm],
        "_compiled_call_impl": [torch.nn.Linear(1, 1)],
        "_values": [torch.Tensor],
        "_update_count": [MeanMetric()],
        "_computed": [MeanMetric()],
        "_logger_connector": [trainer],
        "_first_loop_iter": [trainer._logger_connector],
        "_num_ready_batches_reached": [epoch_loop],
        "_has_run": [epoch_loop.val_loop],
        "_broadcast_sigterm_tensor": [epoch_loop],
        "_actions": [ArgumentParser()],
        "_trainer": [L.LightningModule()],
        "_update_attr": [L.callbacks.LearningRateFinder()],
        # Used or overridden by subclasses.
        "_parser": [LightningCLI],
        "_parse_ckpt_path": [LightningCLI],
        "_get_train_description": [RichProgressBar],
        "_enable_version_counter": [ModelCheckpoint()],
        "_save_on_train_epoch_end": [ModelCheckpoint()],
        "_defer_save_until_validation": [ModelCheckpoint()],
        "_train_time_interval": [ModelCheckpoint()],
        "_last_global_step_saved": [ModelCheckpoint()],
        "_last_checkpoint_saved": [ModelCheckpoint()],
        "_should_skip_saving_checkpoint": [ModelCheckpoint],
        "_save_topk_checkpoint": [ModelCheckpoint],
        "_save_none_monitor_checkpoint": [ModelCheckpoint],
        "_save_checkpoint": [ModelCheckpoint],
        "_monitor_candidates": [ModelCheckpoint],
        "_record_new_keys": [ExperimentWriter],
        "_check_log_dir_exists": [ExperimentWriter],
        "_experiment": [CSVLogger("x"), WandbLogger.__init__.__code__.co_names],
        # For the time of an import, in launch/lean_imports.py.
        "_check_requirement": [RequirementCache],
    }


OF_THE_OPTIMIZER: dict[str, list[Any]] = {
    "_dynamo": [torch],
    "BackendCompilerFailed": [exc],
    "_NormBase": [batchnorm],
    "_fused_adamw_": [torch],
    "_version": [torch.Tensor],
    "_is_view": [torch.Tensor],
    "_buffers": [torch.nn.Module()],
    "_non_persistent_buffers_set": [torch.nn.Module()],
}


def has(owner: Any, name: str) -> bool:
    return name in owner if isinstance(owner, tuple) else hasattr(owner, name)


def test_the_installed_libraries_have_the_private_names(trainer: L.Trainer) -> None:
    for names in (of_the_suite(trainer), OF_THE_OPTIMIZER):
        for name, owners in names.items():
            for owner in owners:
                assert has(owner, name), f"{owner} has no {name}"


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith(("__", *PUBLIC)) and name.strip("_") != ""


def sources(folders: tuple[str, ...]) -> list[Path]:
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def used(paths: list[Path]) -> Iterator[tuple[str, Path]]:
    """Return every private name that the sources take from another library.

    Names of the sources' classes and modules are left out.
    """
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    nodes = [(node, path) for path, tree in trees.items() for node in ast.walk(tree)]
    ours = {node.name for node, _ in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    ours |= {
        node.attr
        for node, _ in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    ours |= {node.id for node, _ in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node, path in nodes:
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in ours:
            yield node.attr, path
        elif isinstance(node, ast.ImportFrom) and node.module:
            for name in (*node.module.split("."), *(alias.name for alias in node.names)):
                if private(name) and name not in ours:
                    yield name, path


def test_no_other_private_names_are_used(trainer: L.Trainer) -> None:
    known = of_the_suite(trainer)
    for name, path in used([*sources(SUITE), *ROOT.glob("*.py")]):
        assert name in known, f"{path} uses the private name {name}: take a public one, or add it to this list"
    for name, path in used(sources(("ars2",))):
        assert name in OF_THE_OPTIMIZER, f"{path} uses the private name {name}"


def test_lightning_has_an_upper_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "lightning>=2.6.6,<2.8" in project["optional-dependencies"]["suite"]
