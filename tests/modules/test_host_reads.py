"""Count how often each training step reads the device.

Each read makes the device wait for Python.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest

from modules.image_classifier import ImageClassifier
from tests.datamodules.tiny_cifar10 import tiny_cifar10, tiny_files  # noqa: F401
from tests.helpers.dispatched import Dispatched
from tests.modules import language
from tests.modules.small_task import make_optimizer
from tests.modules.test_image_classifier import train

OPTIMIZERS = ["adamw", "sync", "aga"]
# What torch's one_hot, under the top-5 accuracy, checks on the CPU alone: the least and the largest class.
ONLY_ON_THE_CPU = 2


class ReadsOfAStep(L.Callback):
    """Count the values that Python reads from tensors in the second step.

    In the first one the floating-point operations are counted. ``tolist()`` of the CPU is not counted.
    """

    def __init__(self) -> None:
        self.operations = Dispatched()

    @property
    def count(self) -> int:
        return self.operations.count("aten._local_scalar_dense")

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 1:
            self.operations = Dispatched(trainer.optimizers)
            self.operations.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            self.operations.__exit__(None, None, None)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_of_the_language_model_reads_whether_it_is_finite_and_nothing_else(
    optimizer: str, tmp_path: Path
) -> None:
    reads = ReadsOfAStep()
    trainer = language.trainer(max_steps=3, limit_val_batches=0, callbacks=[reads])
    trainer.fit(language.model(optimizer), datamodule=language.data(tmp_path))
    assert reads.count == 1


@pytest.mark.usefixtures("tiny_cifar10")
@pytest.mark.parametrize("optimizer", ["muon", "aga"])
def test_a_step_of_the_image_classifier_reads_whether_it_is_finite_and_nothing_else(optimizer: str) -> None:
    reads = ReadsOfAStep()
    classifier = ImageClassifier(width=2, optimizer=make_optimizer(optimizer))
    train(classifier, max_steps=3, limit_val_batches=0, callbacks=[reads])
    assert reads.count == 1 + ONLY_ON_THE_CPU
