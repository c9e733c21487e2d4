"""The command of the example trains its task."""

import shlex
from pathlib import Path

from examples import your_task
from tests.helpers.commands import fit, metrics


def test_the_command_of_its_docstring_trains_it(tmp_path: Path) -> None:
    assert your_task.__doc__ is not None
    command = your_task.__doc__.split("\n\n")[1].replace("\\\n", " ")
    python, script, subcommand, *options = shlex.split(command)
    assert (python, script, subcommand) == ("python", "train.py", "fit")
    # A trial draws no pictures at its end.
    trial = ("--sweep.name", "search", "--sweep.optimizer", "base", "--sweep.trial", "0")
    folder = fit(tmp_path, *options, *trial, "--trainer.max_epochs", "12", "--wandb", "false")
    assert folder.parent.name == "spirals"
    accuracies = [float(row["val/accuracy"]) for row in metrics(folder) if "val/accuracy" in row]
    assert len(accuracies) == 12
    assert accuracies[-1] > 0.6 > accuracies[0]
