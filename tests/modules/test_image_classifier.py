"""The classifier trains correctly under two passes.

A step has one augmentation, BatchNorm and resuming are exact, and every memory format works.
"""

import csv
import functools
import math
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from datamodules.cifar10 import CLASSES, ROOT_VARIABLE, CIFAR10Data
from modules.image_classifier import ImageClassifier
from tests.datamodules.tiny_cifar10 import TEST, accept, tiny_cifar10, tiny_files  # noqa: F401
from tests.helpers.commands import call, fit, folders
from tests.modules.small_task import assert_equal_states, make_optimizer, state_of

pytestmark = pytest.mark.usefixtures("tiny_cifar10")
# On the command line: a narrow network, two batches an epoch.
SMALL = ("--model.width", "2", "--data.batch_size", "128", "--trainer.max_epochs", "1", "--wandb", "false")


class Recorder(L.Callback):
    """Stop after a number of steps with a checkpoint."""

    def __init__(self, save_at: int, path: Path) -> None:
        self.save_at, self.path = save_at, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.save_at:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


class Seen(ImageClassifier):
    """Record the training images of its network, and its running statistics.

    The statistics are recorded before and after.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[Tensor] = []
        self.network.register_forward_pre_hook(self._keep_images)

    def _keep_images(self, network: nn.Module, inputs: tuple[Tensor]) -> None:
        if network.training:
            self.seen.append(inputs[0].clone())


def module(name: str, kind: type[ImageClassifier] = ImageClassifier, **options: Any) -> ImageClassifier:
    torch.manual_seed(0)
    return kind(width=2, optimizer=make_optimizer(name), **options)


def train(
    classifier: ImageClassifier,
    epochs: int = 1,
    ckpt_path: Path | None = None,
    callbacks: list[L.Callback] | None = None,
    **options: Any,
) -> L.Trainer:
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        **options,
    )
    trainer.fit(classifier, CIFAR10Data(batch_size=16, train_examples=60), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def test_both_passes_of_a_step_see_the_same_augmented_batch_and_every_step_another() -> None:
    classifier = module("sync", Seen)
    train(classifier, epochs=2)
    first, second = classifier.seen[0::2], classifier.seen[1::2]  # type: ignore[attr-defined]
    assert len(first) == len(second) == 8
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({step.double().sum().item() for step in first}) == 8


@pytest.mark.parametrize("name", ["muon", "aga"])
def test_running_statistics_after_a_step_are_those_of_one_pass_to_the_bit(name: str) -> None:
    classifier = module(name, Seen)
    train(classifier, limit_train_batches=1, limit_val_batches=0)
    once = module(name).network.train()
    once(classifier.seen[0])  # type: ignore[attr-defined]
    statistics = dict(once.named_buffers())
    assert len(statistics) == 60
    for key, buffer in classifier.network.named_buffers():
        assert torch.equal(buffer, statistics[key]), key


def test_the_second_pass_normalises_with_batch_statistics() -> None:
    """With rho = 0 the second pass has the loss of the first.

    With running statistics it would not.
    """

    class Losses(Seen):
        losses: list[float] = []  # noqa: RUF012

        def compute_loss(self, batch: Any, metrics: Any) -> Tensor:
            loss = super().compute_loss(batch, metrics)
            if self.training:
                Losses.losses.append(loss.item())
            return loss

    torch.manual_seed(0)
    classifier = Losses(width=2, optimizer=make_optimizer("sync", rho=0.0))
    train(classifier)
    assert Losses.losses[0::2] == Losses.losses[1::2]
    images, labels = classifier.seen[-1], torch.zeros(len(classifier.seen[-1]), dtype=torch.int64)
    classifier.train()
    with_batch = F.cross_entropy(classifier.network(images), labels)
    classifier.eval()
    assert not torch.isclose(F.cross_entropy(classifier.network(images), labels), with_batch)


def test_resuming_in_the_middle_of_an_epoch_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    name = "aga"
    expected = module(name)
    train(expected, epochs=2)
    train(module(name), 2, callbacks=[Recorder(6, tmp_path / "middle.ckpt")])  # four batches an epoch
    torch.manual_seed(99)
    resumed = module(name)
    train(resumed, 2, tmp_path / "middle.ckpt")
    assert_equal_states(state_of(resumed), state_of(expected))


def test_channels_last_changes_the_updating_gradient_by_rounding_only() -> None:
    name = "sync"
    gradients = []
    for channels_last in (False, True):
        classifier = module(name, Seen, channels_last=channels_last)
        train(classifier, limit_train_batches=1, limit_val_batches=0, precision="64-true")
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert classifier.seen[0].is_contiguous(memory_format=layout)  # type: ignore[attr-defined]
        assert classifier.network.layer4[0].conv2.weight.is_contiguous(memory_format=layout)
        gradients.append([param.grad for param in classifier.network.parameters()])
    largest = max(gradient.norm() for gradient in gradients[0])
    for actual, contiguous in zip(*gradients, strict=True):
        assert (actual - contiguous).norm() < 1e-9 * largest


@pytest.mark.parametrize("name", ["adamw", "muon", "base"])
def test_optimizers_read_channels_last_kernels_in_the_right_order(name: str) -> None:
    """The update of a kernel does not depend on its memory layout."""
    torch.manual_seed(0)
    kernel, gradient = torch.randn(2, 8, 4, 3, 3)
    updates = []
    for layout in (torch.contiguous_format, torch.channels_last):
        param = nn.Parameter(kernel.clone(memory_format=layout))
        param.grad = gradient.clone(memory_format=layout)
        make_optimizer(name)([param]).step()
        updates.append(param.detach() - kernel)
    # Newton-Schulz rounds to bfloat16.
    torch.testing.assert_close(updates[1], updates[0], rtol=0, atol=1e-2 * updates[0].abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon", "sync", "aga"])
def test_compiled_in_bfloat16_and_channels_last_it_learns_under_every_optimizer(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager"))
    options = {"rho": 0.01} if name in ("sync", "aga") else {}
    torch.manual_seed(0)
    optimizer = make_optimizer(name, **options)
    classifier = ImageClassifier(width=2, optimizer=optimizer, channels_last=True, compile=True)
    before = set(classifier.state_dict())
    trainer = train(classifier, epochs=8, precision="bf16-mixed")
    assert classifier.network._compiled_call_impl is not None
    assert set(classifier.state_dict()) == before
    assert trainer.callback_metrics["train/loss"] < 0.9 * math.log(10)
    assert classifier.gradient_evaluations > (32 if name in ("sync", "aga") else 31)


def test_compiled_it_keeps_the_names_of_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    classifier = module("sync", channels_last=True, compile=True)
    before = set(classifier.state_dict())
    trainer = train(classifier, max_steps=2, limit_val_batches=0, precision="bf16-mixed")
    assert classifier.network._compiled_call_impl is not None
    assert set(classifier.state_dict()) == before
    assert trainer.callback_metrics["train/loss"].isfinite()


@pytest.mark.slow
def test_compiled_training_equals_eager_training_up_to_rounding() -> None:
    losses = []
    for compiled in (False, True):
        trainer = train(module("sync", compile=compiled), precision="64-true")
        losses.append(trainer.callback_metrics["train/loss"].item())
    # In float64, but for Newton-Schulz, which rounds to bfloat16.
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_label_smoothing_applies_to_training_only() -> None:
    classifier = module("adamw", label_smoothing=0.1)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    for training in (True, False):
        classifier.train(training)
        log_probabilities = classifier.network(images).log_softmax(1)
        expected = -log_probabilities[range(4), labels].mean()
        if training:
            expected = 0.9 * expected - 0.1 * log_probabilities.mean()
        torch.testing.assert_close(classifier.compute_loss((images, labels), None), expected)


@pytest.fixture(scope="module")
def trained(tiny_files: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Return the folder of a run of one epoch by the command."""
    root, sums = tiny_files
    with pytest.MonkeyPatch.context() as patch:
        accept(sums, patch)
        patch.setenv(ROOT_VARIABLE, str(root))
        return fit(tmp_path_factory.mktemp("runs"), "--config", "configs/cifar_base.yaml", *SMALL)


def test_test_logs_every_class_and_draws_the_confusion_matrix(trained: Path, tmp_path: Path) -> None:
    arguments = ("--config", "configs/cifar_base.yaml", *SMALL[:4], "--runs", tmp_path / "tests", "--wandb", "true")
    result = call("test", *arguments, "--ckpt_path", trained / "checkpoints/last.ckpt")
    assert result.code == 0, result.err
    (folder,) = folders(tmp_path / "tests")
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    per_class = [float(row[f"test/accuracy_{name}"]) for name in CLASSES]
    assert float(row["test/accuracy"]) == pytest.approx(sum(per_class) / 10, abs=1e-6)  # four images of each
    assert {round(4 * value, 4) for value in per_class} <= {0, 1, 2, 3, 4}
    assert float(row["test/top5_accuracy"]) >= float(row["test/accuracy"])
    assert f"confusion matrix: {folder / 'confusion_matrix.png'}" in result.out
    with Image.open(folder / "confusion_matrix.png") as picture:
        assert min(picture.size) > 400
        assert len(picture.convert("L").getcolors(256) or []) > 10
    (uploaded,) = folder.glob("wandb/offline-run-*/files/media/images/test/*.png")
    assert uploaded.read_bytes() == (folder / "confusion_matrix.png").read_bytes()


def test_predict_answers_for_image_files_and_names_one_that_is_none(trained: Path, tmp_path: Path) -> None:
    ask = ("predict", "--config", "configs/cifar_base.yaml", "--model.width", 2)
    ask += ("--ckpt_path", trained / "checkpoints/last.ckpt")
    result = call(*ask)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert len(lines) == 10 <= TEST and lines[3].startswith("image 3: ")
    assert all(line.endswith(", right") or ", wrong, it is " in line for line in lines)
    grey, wide = tmp_path / "grey.png", tmp_path / "wide.jpg"
    Image.new("L", (32, 32), 120).save(grey)
    Image.new("RGB", (300, 90), (10, 200, 30)).save(wide)
    # Files are asked about without the data set.
    elsewhere = ("--data.root", tmp_path / "nothing", "--data.download", "false")
    result = call(*ask, *elsewhere, "--data.images", f"[{grey}, {wide}]")
    assert result.code == 0, result.err
    first, second = result.out.splitlines()
    assert first.startswith(f"{grey}: ") and second.startswith(f"{wide}: ")
    assert first.split(": ")[1].split(" (")[0] in CLASSES and first.endswith(" %)")
    shutil.copy("README.md", tmp_path / "text.png")
    assert "text.png cannot be read as an image" in call(*ask, "--data.images", f"[{tmp_path / 'text.png'}]").error
    assert "none.png" in call(*ask, "--data.images", f"[{tmp_path / 'none.png'}]").error


def test_the_summary_and_the_output_name_the_validation_set(trained: Path, tmp_path: Path) -> None:
    assert '"val": "test set, as published (40 images)' in (trained / "summary.json").read_text()
    options = ("--data.validation", "holdout", "--data.holdout_examples", 20, "--trainer.limit_train_batches", 1)
    result = call("fit", "--config", "configs/cifar_adamw.yaml", *SMALL, *options, "--runs", tmp_path)
    assert result.code == 0, result.err
    assert "val: hold-out from the training set" in result.out
    (folder,) = folders(tmp_path)
    assert '"val": "hold-out from the training set' in (folder / "summary.json").read_text()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
        ({"classes": 7}, "the model has 7 classes, the data 10"),
    ],
)
def test_invalid_options_are_errors_that_name_them(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        train(module("adamw", **options))


def test_three_classes_have_no_top_five() -> None:
    assert set(module("adamw", classes=3).val_metrics) == {"loss", "accuracy"}
    assert set(module("adamw").val_metrics) == {"loss", "accuracy", "top5_accuracy"}
