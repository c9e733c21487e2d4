"""A training step on a GPU makes one host sync, and two under AGA.

They are counted from batch to batch.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from benchmarks.device_timing import SYNC_WARNING
from datamodules.cifar10 import CIFAR10Data
from modules.image_classifier import ImageClassifier
from tests.datamodules.tiny_cifar10 import tiny_cifar10, tiny_files  # noqa: F401
from tests.modules import language
from tests.modules.small_task import make_optimizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
# Beside the check for finite gradients, AGA's decision.
SYNCS = {"muon": 1, "base": 1, "sync": 1, "aga": 2}


class OneStep(L.Callback):
    """Turn each host sync of the third step into a warning.

    The step is counted from the end of the second to the end of the third one.
    """

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("warn" if trainer.global_step == 2 else "default")


def syncs(module: L.LightningModule, data: L.LightningDataModule) -> int:
    """Train four steps on the GPU and return how often the third one synchronises."""
    trainer = L.Trainer(
        accelerator="gpu",
        devices=1,
        max_steps=4,
        precision="bf16-mixed",
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[OneStep()],
    )
    with pytest.warns() as caught:
        trainer.fit(module, datamodule=data)
    return sum(SYNC_WARNING in str(warning.message) for warning in caught)


@pytest.mark.parametrize("optimizer", SYNCS)
def test_a_step_of_the_language_model(optimizer: str, tmp_path: Path) -> None:
    data = language.data(tmp_path, protocol="packed", on_device=True)
    assert syncs(language.model(optimizer), data) == SYNCS[optimizer]


@pytest.mark.usefixtures("tiny_cifar10")
@pytest.mark.parametrize("optimizer", SYNCS)
def test_a_step_of_the_image_classifier(optimizer: str) -> None:
    classifier = ImageClassifier(width=2, optimizer=make_optimizer(optimizer), channels_last=True)
    assert syncs(classifier, CIFAR10Data(batch_size=16, on_device=True)) == SYNCS[optimizer]
