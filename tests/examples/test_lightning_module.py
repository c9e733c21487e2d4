"""The ordinary module trains by itself and in the suite."""

import json
import shlex
from pathlib import Path

import lightning.pytorch as L
import torch

from ars2.lightning import TwoPass
from examples import lightning_module
from examples.lightning_module import Regression, RegressionData
from tests.helpers.commands import fit


def test_it_learns_with_one_callback() -> None:
    L.seed_everything(0)
    two_pass = TwoPass()
    trainer = L.Trainer(
        max_epochs=3, callbacks=[two_pass], accelerator="cpu", barebones=True, enable_checkpointing=False
    )
    module = Regression()
    trainer.fit(module, RegressionData())
    assert two_pass.gradient_evaluations == 2 * trainer.global_step == 2 * 72
    inputs = torch.randn(512, 8)
    with torch.no_grad():
        errors = module.eval().network(inputs) - inputs[:, :2].prod(dim=1, keepdim=True)
    assert errors.square().mean() < 0.5  # the variance of the targets is 1


def test_the_command_of_its_docstring_trains_it_in_the_suite(tmp_path: Path) -> None:
    assert lightning_module.__doc__ is not None
    command = lightning_module.__doc__.split("\n\n")[-1].replace("\\\n", " ")
    python, script, subcommand, *options = shlex.split(command)
    assert (python, script, subcommand) == ("python", "train.py", "fit")
    folder = fit(tmp_path, *options, "--trainer.max_epochs", "2", "--wandb", "false")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["costs"]["gradient_evaluations"] == 96
    assert summary["metrics"]["val_loss"]["last"] < 1
