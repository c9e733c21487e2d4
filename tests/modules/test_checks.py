"""A user's module that lacks something is refused before training.

The error is one sentence.
"""

from collections import UserDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from modules.two_pass import TwoPassModule
from tests.modules.small_task import SmallTask, batches, fit, make_optimizer
from tests.modules.users import Sums, Tutorial

ADAMW = make_optimizer("adamw")


class Optimizes(Sums):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("kind", "name"), [(Tutorial, "training_step"), (Optimizes, "configure_optimizers")])
def test_a_class_that_replaces_the_step_or_the_optimizers_is_refused(kind: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{kind.__name__} .*{name}\(\)"):
        fit(kind(optimizer=ADAMW))


def test_a_step_that_calls_the_inherited_one_is_accepted() -> None:
    class Counts(SmallTask):
        batches = 0

        def training_step(self, batch: Any, batch_index: int) -> Tensor:
            self.batches += 1
            return super().training_step(batch, batch_index)

    module = Counts(optimizer=make_optimizer("sync"))
    assert fit(module).global_step == module.batches == 12


def test_parameters_that_would_not_be_trained_are_named() -> None:
    module = SmallTask(optimizer=ADAMW)
    module.head = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"self.network.*head.weight, head.bias"):
        fit(module)
    module.head.requires_grad_(False)
    assert fit(module).global_step == 12


def test_training_that_never_steps_is_an_error() -> None:
    class Spoilt(SmallTask):
        def compute_loss(self, batch: Any, metrics: Any) -> Tensor:
            return super().compute_loss(batch, metrics) * torch.nan

    with pytest.raises(RuntimeError, match=r"without one optimizer step.* 12 "):
        fit(Spoilt(optimizer=ADAMW, nonfinite="skip"))
    fit(SmallTask(optimizer=ADAMW), limit_train_batches=0)  # no steps were requested


IMAGES, LABELS = torch.randn(8, 2), torch.arange(8) % 3


class Linear(TwoPassModule):
    """Accept batches of any structure that has the two tensors somewhere."""

    def __init__(self) -> None:
        super().__init__(optimizer=ADAMW)
        self.network = nn.Linear(2, 3)
        self.set_metrics({})

    def compute_loss(self, batch: Any, metrics: Any) -> Tensor:
        tensors = (batch,) if isinstance(batch, Tensor) else tuple(getattr(batch, "values", lambda: batch)())
        return F.cross_entropy(self.network(tensors[0]), LABELS[: len(tensors[0])])


@pytest.mark.parametrize(
    "batch",
    [
        (IMAGES, LABELS),
        IMAGES,  # its first entry is an image, not all of them
        {"images": IMAGES, "labels": LABELS},
        UserDict(images=IMAGES),
        {"scale": torch.tensor(1.0), "nested": [{"images": IMAGES}]},
        (["a"] * 8, IMAGES),
    ],
    ids=["tuple", "tensor", "dict", "like a dict", "nested", "strings first"],
)
def test_examples_are_counted_in_any_nested_batch(batch: Any) -> None:
    assert Linear().batch_size(batch) == 8


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ([1, 2], "no tensor with a length"),
        (torch.tensor(1.0), "no tensor with a length"),
        (object(), "no tensor with a length"),
        ({"mask": torch.ones(2, 2), "images": IMAGES}, "tensors of lengths 2, 8"),
        ({"temperature": torch.ones(1), "images": IMAGES}, "tensors of lengths 1, 8"),
    ],
)
def test_a_batch_that_cannot_be_counted_asks_for_batch_size(batch: Any, found: str) -> None:
    with pytest.raises(TypeError, match=rf"has {found}, .*override batch_size\(batch\) in Linear"):
        Linear().batch_size(batch)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ([MeanMetric()], r"dictionary of torchmetrics by name, .* got a list"),
        ({"accuracy": nn.L1Loss()}, r"'accuracy' is L1Loss\(\)"),
        ({"accuracy": MeanMetric}, "'accuracy' is the class MeanMetric: make an object of it"),
        ({"loss": MeanMetric()}, "'loss' is no valid name"),
        ({"top.5": MeanMetric()}, "'top.5' is no valid name"),
    ],
)
def test_metrics_that_cannot_be_logged_are_refused(metrics: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^Linear.set_metrics\(\) .*{message}"):
        Linear().set_metrics(metrics)


def test_a_metric_that_is_never_updated_is_an_error() -> None:
    module = SmallTask(optimizer=ADAMW)
    module.set_metrics({"accuracy": MeanMetric()})
    with pytest.raises(ValueError, match=r"SmallTask.compute_loss\(\) did not update the metric accuracy"):
        fit(module).validate(module, batches(), verbose=False)


def test_a_loss_with_other_arguments_is_refused() -> None:
    class NoMetrics(SmallTask):
        def compute_loss(self, batch: Any) -> Tensor:  # type: ignore[override]
            return super().compute_loss(batch, None)

    with pytest.raises(ValueError, match=r"NoMetrics cannot be trained yet: implement compute_loss\(batch, metrics\)"):
        fit(NoMetrics(optimizer=ADAMW))


def test_a_module_trains_on_batches_that_are_dicts() -> None:
    import lightning.pytorch as L

    examples: Any = [{"images": image, "labels": label} for image, label in zip(IMAGES, LABELS, strict=True)]
    module = Linear()
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(module, DataLoader(examples, batch_size=3))
    loss = F.cross_entropy(module.network(IMAGES), LABELS)
    assert trainer.global_step == 3
    assert torch.isfinite(loss) and torch.isfinite(trainer.callback_metrics["train/loss"])


class AsDictionary(SmallTask):
    def compute_loss(self, batch: Any, metrics: Any) -> Any:
        return {"loss": super().compute_loss(batch, metrics)}


class OfEachExample(SmallTask):
    def compute_loss(self, batch: Any, metrics: Any) -> Tensor:
        return super().compute_loss(batch, metrics).expand(len(batch[0]))


class Nothing(SmallTask):
    def compute_loss(self, batch: Any, metrics: Any) -> Any:
        super().compute_loss(batch, metrics)


def test_a_loss_without_a_gradient_is_refused() -> None:
    class Detached(SmallTask):
        def compute_loss(self, batch: Any, metrics: Any) -> Tensor:
            return super().compute_loss(batch, metrics).detach()

    with pytest.raises(TypeError, match=r"Detached.compute_loss\(\) .* no parameter of self.network.* detach\(\)"):
        fit(Detached(optimizer=ADAMW))


@pytest.mark.parametrize(
    ("kind", "returned"), [(AsDictionary, "a dict"), (OfEachExample, r"one of shape \(4,\)"), (Nothing, "a NoneType")]
)
def test_a_loss_that_is_no_scalar_is_refused(kind: type[SmallTask], returned: str) -> None:
    message = rf"{kind.__name__}.compute_loss\(\) .*{returned}"
    with pytest.raises(TypeError, match=message):
        fit(kind(optimizer=ADAMW))
    module = kind(optimizer=ADAMW)
    with pytest.raises(TypeError, match=message):
        module.validation_step(next(iter(batches())), 0)
