"""A metric is better in the direction that it, or the checkpoint, names."""

from pathlib import Path

import lightning.pytorch as L
import pytest
from torchmetrics import MeanAbsoluteError, Metric
from torchmetrics.classification import MulticlassAccuracy

from callbacks.best_checkpoint import BestCheckpoint
from callbacks.direction import higher_is_better, lower_is_better
from modules.metrics import BitsPerByte, MeanLoss
from tests.callbacks.fits import data, fit, module


@pytest.mark.parametrize(
    ("name", "metric", "higher"),
    [
        ("val/mae", MeanAbsoluteError(), False),
        ("val/top", MulticlassAccuracy(3), True),
        ("val/loss", MeanLoss(), False),
        ("val/bits", BitsPerByte(1, 1), False),
        ("val_acc", None, True),
        ("val_loss", None, False),
        ("val/score", None, None),
    ],
)
def test_metrics_say_whether_more_is_better(name: str, metric: Metric | None, higher: bool | None) -> None:
    assert higher_is_better(name, {} if metric is None else {name[4:]: metric}) is higher


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_mode_of_the_checkpoint_decides_where_it_is_given(mode: str) -> None:
    trainer = L.Trainer(callbacks=[BestCheckpoint(monitor="val/score", mode=mode)], accelerator="cpu", logger=False)
    assert lower_is_better(trainer, "val/score", {}) is (mode == "min")
    assert lower_is_better(trainer, "val/loss", {}) and not lower_is_better(trainer, "val/other", {})


def test_a_checkpoint_of_the_worst_epoch_is_refused(tmp_path: Path) -> None:
    checkpoint = BestCheckpoint(str(tmp_path), monitor="val/accuracy")
    with pytest.raises(ValueError, match=r"checkpoint.mode is min, but more of val/accuracy is better.*mode max"):
        fit(module(), data(), [checkpoint], None, 1, enable_checkpointing=True)
