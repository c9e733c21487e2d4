"""Steps with a loss or gradient that is not finite leave no trace.

They are found before anything is updated, and named.
"""

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from modules.nonfinite import all_finite
from tests.modules.by_hand import Loop
from tests.modules.small_task import (
    TWO_PASS,
    SmallTask,
    assert_equal_states,
    batches,
    fit,
    make_optimizer,
    state_of,
)
from tests.modules.test_precision import Damaged


@pytest.mark.parametrize(
    ("in_pass", "factor", "sentence"),
    [
        (1, torch.nan, "step 4 in epoch 1, first pass: .* nan .*convolution.weight"),
        (2, torch.inf, "step 4 in epoch 1, second pass: .* inf .*convolution.weight"),
    ],
)
def test_by_default_the_run_stops_with_step_pass_and_parameter(in_pass: int, factor: float, sentence: str) -> None:
    module = Damaged((3,), in_pass, factor, optimizer=make_optimizer("sync"))
    with pytest.raises(FloatingPointError, match=f"^{sentence}") as error:
        fit(module)
    assert "lower the learning rate" in str(error.value)
    # Parameters, moments and statistics are those of the three good steps.
    assert_equal_states(state_of(module), Loop("sync", limit=3, epochs=1).train())


def test_a_gradient_alone_is_named_by_its_parameter() -> None:
    class Breaks(SmallTask):
        def on_after_backward(self) -> None:
            if self.global_step == 2:
                self.network.head.bias.grad[1] = -torch.inf  # type: ignore[index, union-attr]

    for name in ("adamw", "muon", "aga"):
        module = Breaks(optimizer=make_optimizer(name))
        with pytest.raises(FloatingPointError, match=r"step 3 in epoch 1, first pass: .*head.bias"):
            fit(module)
        assert_equal_states(state_of(module), Loop(name, limit=2, epochs=1).train())


@pytest.mark.parametrize(
    ("name", "in_pass"), [("adamw", 1), ("muon", 2), ("sync", 1), ("sync", 2), ("aga", 2), ("random", 1)]
)
def test_by_option_such_steps_are_skipped_and_counted(name: str, in_pass: int) -> None:
    module = Damaged((0, 7), in_pass, torch.nan, optimizer=make_optimizer(name), nonfinite="skip")
    trainer = fit(module)
    if in_pass == 1:
        damaged = {0, 7}
    elif name in TWO_PASS:
        # All of them make a second pass in step 0, and in step 7 depending on the mode.
        damaged = {0, 7} if module.skipped_steps == 2 else {0}
    else:
        damaged = set()
    assert_equal_states(state_of(module), Loop(name, damaged=damaged).train())
    assert module.skipped_steps == len(damaged)
    assert trainer.global_step == 12 - len(damaged)
    if damaged:
        assert trainer.callback_metrics["train/skipped_steps"] == len(damaged)
        assert trainer.callback_metrics["train/loss"].isfinite()
    else:
        assert "train/skipped_steps" not in trainer.callback_metrics


def test_a_batch_that_is_not_finite_leaves_no_trace_in_running_statistics() -> None:
    class BrokenInput(SmallTask):
        def compute_loss(self, batch: Any, metrics: Any) -> torch.Tensor:
            broken = self.global_step == 3 and self.skipped_steps == 0
            return super().compute_loss((batch[0] * (torch.nan if broken else 1.0), batch[1]), metrics)

    module = BrokenInput(optimizer=make_optimizer("sync"), nonfinite="skip")
    fit(module)
    assert_equal_states(state_of(module), Loop("sync", damaged={3}).train())
    assert all(buffer.isfinite().all() for buffer in module.network.buffers())
    module = BrokenInput(optimizer=make_optimizer("sync"), nonfinite="skip")
    module.network.norm = nn.InstanceNorm2d(4, track_running_stats=True)  # type: ignore[assignment]
    fit(module)
    assert module.skipped_steps == 1
    assert all(buffer.isfinite().all() for buffer in module.network.buffers())


def test_schedulers_do_not_count_a_skipped_step() -> None:
    module = Damaged(
        (2,),
        1,
        optimizer=make_optimizer("sync"),
        nonfinite="skip",
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5),
        scheduler_interval="step",
    )
    trainer = fit(module)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**11)


def test_skipped_steps_are_remembered_by_a_resumed_run(tmp_path: Path) -> None:
    module = Damaged((1,), 1, optimizer=make_optimizer("sync"), nonfinite="skip")
    fit(module, epochs=1).save_checkpoint(tmp_path / "run.ckpt")
    again = SmallTask(optimizer=make_optimizer("sync"), nonfinite="skip")
    assert fit(again, ckpt_path=tmp_path / "run.ckpt").callback_metrics["train/skipped_steps"] == 1


def test_an_epoch_without_any_good_step_is_logged_as_nan_and_training_continues() -> None:
    """Train one batch an epoch, whose first and third have no finite loss.

    Validation has none either then.
    """

    class Watched(Accurate):
        def on_train_epoch_end(self) -> None:
            super().on_train_epoch_end()
            seen.append({name: self.trainer.callback_metrics[f"train/{name}"].item() for name in ("loss", "accuracy")})

    seen: list[dict[str, float]] = []
    module = Watched((0, 2), 1, torch.nan, optimizer=make_optimizer("sync"), nonfinite="skip")
    trainer = fit(module, epochs=4, limit_train_batches=1)
    assert (trainer.global_step, module.skipped_steps) == (2, 2)
    for number, values in enumerate(seen):
        assert all(math.isnan(value) == (number in (0, 2)) for value in values.values()), number


def test_a_validation_loss_that_is_nan_is_logged_and_training_continues() -> None:
    class Validates(Accurate):
        def compute_loss(self, batch: Any, metrics: Any) -> torch.Tensor:
            return super().compute_loss(batch, metrics) * (1.0 if self.training else torch.nan)

    module = Validates((0,), 1, torch.nan, optimizer=make_optimizer("sync"), nonfinite="skip")
    module.val_dataloader = batches  # type: ignore[method-assign]
    trainer = fit(module, epochs=3, limit_train_batches=1, num_sanity_val_steps=0)
    assert trainer.global_step == 2 and trainer.callback_metrics["val/loss"].isnan()
    assert trainer.callback_metrics["train/loss"].isfinite()


def test_a_run_without_finite_steps_stops_at_the_end_of_an_epoch() -> None:
    module = Damaged(tuple(range(5, 999)), 1, optimizer=make_optimizer("sync"), nonfinite="skip")
    with pytest.raises(FloatingPointError, match=r" 103 steps .*epoch 18"):
        fit(module, epochs=99)
    assert module.skipped_steps == 103


class Accurate(Damaged):
    """Log the accuracy too."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.set_metrics({"accuracy": MulticlassAccuracy(3, average="micro")})

    def compute_loss(self, batch: Any, metrics: Any) -> torch.Tensor:
        if metrics is not None:
            metrics["accuracy"].update(self.network(batch[0]).detach(), batch[1])
        return super().compute_loss(batch, metrics)


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("in_pass", [1, 2])
def test_no_metric_has_the_batches_of_a_skipped_step(in_pass: int, window: int) -> None:
    """Leave out the batches of the window, also if only the second pass failed."""

    class Counts(Accurate):
        examples: ClassVar[dict[str, int]] = {}

        def on_train_batch_end(self, *arguments: Any) -> None:
            if self.trainer.is_last_batch:
                accuracy, loss = self.train_metrics["accuracy"], self.train_metrics["loss"]
                self.examples["accuracy"] = int((accuracy.tp + accuracy.fn).sum())
                self.examples["loss"] = int(loss.examples)
            super().on_train_batch_end(*arguments)

    # Six batches of four images, the last of two; the damaged one is the fourth, with its window's others.
    module = Counts((3,), in_pass, torch.nan, optimizer=make_optimizer("sync"), nonfinite="skip")
    module.accumulate_grad_batches = window
    trainer = fit(module, epochs=1)
    assert module.skipped_steps == 1
    assert module.examples == {"accuracy": 22 - 4 * window, "loss": 22 - 4 * window}
    assert trainer.callback_metrics["train/loss"].isfinite()


def test_one_bad_batch_skips_its_complete_window_of_accumulation() -> None:
    module = Damaged((1,), 1, optimizer=make_optimizer("sync"), nonfinite="skip", accumulate_grad_batches=2)
    fit(module)
    assert_equal_states(state_of(module), Loop("sync", window=2, damaged={0}).train())


def test_the_values_of_a_sparse_gradient_are_checked_too() -> None:
    class Sparse(SmallTask):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.network = nn.Embedding(3, 2, sparse=True)

        def compute_loss(self, batch: Any, metrics: Any) -> torch.Tensor:
            vectors: torch.Tensor = self.network(batch[1])
            if self.global_step == 2:
                # The loss is finite, the derivative of the root at zero is not.
                return vectors.sum() + (vectors * 0.0).abs().sum().sqrt()
            return vectors.square().sum()

    module = Sparse(optimizer=lambda params: torch.optim.SGD(params, lr=1e-2))
    with pytest.raises(FloatingPointError, match=r"^step 3 in epoch 1, first pass: .*weight"):
        fit(module)
    assert all(param.isfinite().all() for param in module.network.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_entry_is_checked(dtype: torch.dtype) -> None:
    loss, gradients = torch.tensor(2.0), [torch.full((3, 5), 60000.0, dtype=dtype), torch.zeros(7, dtype=dtype)]
    assert all_finite([loss], gradients)
    for value in (torch.nan, torch.inf, -torch.inf):
        assert not all_finite([loss, torch.tensor(value)], gradients)
        for gradient in gradients:
            for index in (0, -1):
                spoiled = [g.clone() for g in gradients]
                spoiled[0 if gradient is gradients[0] else 1].view(-1)[index] = value
                assert not all_finite([loss], spoiled)
    assert all_finite([loss], []) and all_finite([], gradients)


def test_the_device_is_read_once_a_step() -> None:
    """Count where a GPU would wait.

    Every read of a tensor's value goes through this operator.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Readings(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += "_local_scalar_dense" in str(func)
            return func(*args, **(kwargs or {}))

    gradients = [torch.randn(4, 4) for _ in range(20)]
    with Readings() as readings:
        assert all_finite([torch.tensor(1.0)] * 3, gradients)
    assert readings.count == 1


def test_an_option_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nonfinite .*got 'ignore'"):
        SmallTask(optimizer=make_optimizer("base"), nonfinite="ignore")


def test_only_the_first_of_many_parameters_is_named() -> None:
    module = Damaged((0,), 1, torch.nan, optimizer=make_optimizer("base"))
    with pytest.raises(FloatingPointError, match="5 more parameters"):
        fit(module)
    assert len(list(nn.Module.parameters(module.network))) == 6
