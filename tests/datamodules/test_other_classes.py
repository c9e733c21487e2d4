from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from callbacks.forgetting_probe import ForgettingProbe
from datamodules.cifar10 import CIFAR10Data
from datamodules.other_classes import OtherClasses
from modules.image_classifier import ImageClassifier
from tests.callbacks.fits import adamw, values_of_a_test
from tests.datamodules.tiny_cifar10 import TRAIN, tiny_cifar10, tiny_files  # noqa: F401

pytestmark = pytest.mark.usefixtures("tiny_cifar10")


def run(**options: Any) -> CIFAR10Data:
    return CIFAR10Data(validation="holdout", holdout_examples=20, batch_size=8, val_batch_size=20, **options)


def other(data: Any, **options: Any) -> OtherClasses:
    found = OtherClasses(**options)
    found.trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    found.setup("fit")
    return found


def pictures(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_they_are_the_images_of_the_classes_that_the_run_does_not_use() -> None:
    data = run(train_examples=60)
    data.setup("fit")
    found = other(data, classes=(3, 8))
    images, labels = found.train_set
    assert set(labels.tolist()) == {3, 8}
    # Of every class there are 20 images; the run trains on six, and holds out two.
    assert len(images) == 2 * (TRAIN // 10 - 6 - 2)
    assert not pictures(images) & (pictures(data.train_set[0]) | pictures(data.val_set[0]))
    chosen = torch.isin(data.test_set[1], torch.tensor([3, 8]))
    assert torch.equal(found.val_set[0], data.test_set[0][chosen])


def test_a_run_that_uses_every_image_and_other_data_are_refused() -> None:
    data = run()
    data.setup("test")
    with pytest.raises(ValueError, match=r"no image left to train on: lower data\.train_examples"):
        other(data)
    with pytest.raises(ValueError, match="which is not the data of this run"):
        other(None)


@pytest.mark.parametrize("classes", [(), (3, 10), (-1,)])
def test_unknown_classes_are_refused(classes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="classes must be numbers from 0 to 9, got"):
        OtherClasses(classes)


def test_a_classifier_forgets_by_them(tmp_path: Path) -> None:
    model = ImageClassifier(width=2, optimizer=adamw)
    row = values_of_a_test(model, ForgettingProbe(OtherClasses(), steps=8, lr=0.01), run(train_examples=60))
    assert row["forgetting/loss_before"] == pytest.approx(row["test/loss"], rel=1e-5)
    assert row["forgetting/new_loss_after"] < row["forgetting/new_loss_before"]
