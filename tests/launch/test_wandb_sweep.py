"""The files for W&B's agents are written completely and replace no others."""

from pathlib import Path

import pytest

from launch import wandb_sweep
from launch.sweep_specification import read
from tests.launch.test_sweep_specification import write


def test_files_are_rewritten_but_those_of_a_user_are_kept(tmp_path: Path) -> None:
    sweep, folder = read(write(tmp_path)), tmp_path / "files"
    wandb_sweep.write(sweep, folder)
    names = {path.name for path in folder.iterdir()}
    wandb_sweep.write(sweep, folder)
    assert {path.name for path in folder.iterdir()} == names
    (folder / "sync.yaml").write_text("mine: 1\n")
    with pytest.raises(ValueError, match=r"sync.yaml exists with other contents"):
        wandb_sweep.write(sweep, folder)
    assert (folder / "sync.yaml").read_text() == "mine: 1\n"
