"""Train the demo's config to 99 % within its range of epochs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_aga_reaches_99_percent_between_epochs_90_and_240(tmp_path: Path) -> None:
    command = [sys.executable, "train.py", "fit", "--config", "configs/grok_aga.yaml", "--wandb", "false"]
    # The epoch depends on rounding, so on the processor and the threads: 133 on an AMD EPYC, 171 on an Intel Xeon (144
    # with one thread), 119 to 223 over seeds. Waiting threads sleep, because other tests share the machine.
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [*command, "--runs", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "grok_aga").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "stopped early (milestone)"
    epochs = {name: milestone["epoch"] for name, milestone in summary["milestones"].items()}
    assert None not in epochs.values()
    assert 90 <= epochs["full"] == summary["epochs"] <= 240
    assert epochs["train_loss_0.5"] <= epochs["fit"] < epochs["grok"] < epochs["converge"] <= epochs["full"]
    costs = summary["costs"]
    assert costs["optimizer_steps"] == 8 * summary["epochs"]
    assert costs["optimizer_steps"] < costs["gradient_evaluations"] < 2 * costs["optimizer_steps"]
    assert str(folder) in done.stdout
