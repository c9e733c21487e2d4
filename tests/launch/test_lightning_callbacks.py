"""Lightning's callbacks work from the command line or are refused.

The error is one sentence with the reason.
"""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging

from tests.helpers.commands import AGA, TINY, call, fit
from tests.helpers.marks import slow
from tests.modules.small_task import SmallTask, make_optimizer
from tests.modules.small_task import fit as fit_module

MODULE = "lightning.pytorch.callbacks."
FULL_CHECKPOINTS = ("--checkpoint.save_weights_only", "false")


@pytest.mark.parametrize(
    ("name", "options", "status"),
    [
        ("LearningRateMonitor", (), "finished"),
        slow("ModelSummary", (), "finished"),
        slow("TQDMProgressBar", (), "finished"),
        ("StochasticWeightAveraging", ("--trainer.callbacks.swa_lrs", 0.01), "finished"),
        slow("WeightAveraging", FULL_CHECKPOINTS, "finished"),
        ("Timer", ("--trainer.callbacks.duration", "{minutes: 10}"), "finished"),
        (
            "EarlyStopping",
            ("--trainer.callbacks.monitor", "train/loss", "--trainer.callbacks.stopping_threshold", 100.0),
            "stopped early",
        ),
    ],
)
def test_a_run_with_one_is_complete(name: str, options: tuple[object, ...], status: str, tmp_path: Path) -> None:
    folder = fit(tmp_path, *AGA, *TINY, f"--trainer.callbacks+={MODULE}{name}", *options)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == status
    assert (folder / "checkpoints/best.ckpt").exists()
    assert f"{MODULE}{name}" in (folder / "config.yaml").read_text()


def test_the_best_checkpoint_has_the_average_that_was_validated(tmp_path: Path) -> None:
    one_epoch = (*AGA, *TINY, "--trainer.max_epochs", 1)
    average = (f"--trainer.callbacks+={MODULE}EMAWeightAveraging", "--trainer.callbacks.decay", 0.5)
    folder = fit(tmp_path, *one_epoch, *average, *FULL_CHECKPOINTS)
    saved = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)
    name = "network.query"
    assert not torch.equal(saved["state_dict"][name], saved["current_model_state"][name])
    error = call("fit", *one_epoch, *average, "--runs", tmp_path / "others").error
    assert "EMAWeightAveraging saves its average only in full checkpoints" in error
    assert "--checkpoint.save_weights_only false" in error


def test_an_average_that_would_be_trained_on_is_refused() -> None:
    callback = StochasticWeightAveraging(swa_lrs=0.01)
    with pytest.raises(ValueError, match="one more epoch to update the statistics of BatchNorm"):
        fit_module(SmallTask(optimizer=make_optimizer("adamw")), callbacks=[callback])  # type: ignore[arg-type]


def test_a_batch_size_that_would_replace_the_method_is_refused(tmp_path: Path) -> None:
    error = call("fit", *AGA, *TINY, f"--trainer.callbacks+={MODULE}BatchSizeFinder", "--runs", tmp_path).error
    assert "replace the method batch_size() of ModularAddition" in error
