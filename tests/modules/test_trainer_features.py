"""Compare Lightning's options around two passes with hand-written loops."""

from datetime import timedelta
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from tests.modules.by_hand import Loop
from tests.modules.small_task import SmallTask, assert_equal_states, fit, make_optimizer, state_of


@pytest.mark.parametrize(
    ("name", "algorithm", "clip_first_pass"),
    [("muon", "norm", False), ("sync", "norm", True), ("sync", "value", False), ("aga", "value", True)],
)
def test_clipping(name: str, algorithm: Any, clip_first_pass: bool) -> None:
    limit = 0.05 if algorithm == "norm" else 0.005
    options: dict[str, Any] = {"clip_first_pass": clip_first_pass}
    module = SmallTask(
        optimizer=make_optimizer(name), gradient_clip_val=limit, gradient_clip_algorithm=algorithm, **options
    )
    fit(module)
    clipped = Loop(name, clip=limit, clip_algorithm=algorithm, **options).train()
    assert_equal_states(state_of(module), clipped)
    assert not torch.equal(clipped["head.weight"], Loop(name).train()["head.weight"])


def test_clipping_the_first_pass_by_value_moves_elsewhere() -> None:
    without, also = (Loop("sync", clip=0.005, clip_algorithm="value", clip_first_pass=f).train() for f in (False, True))
    assert not torch.equal(without["head.weight"], also["head.weight"])


@pytest.mark.parametrize(("name", "window"), [("muon", 4), ("sync", 7), ("aga", 5)])
def test_accumulation_with_a_shorter_last_window(name: str, window: int) -> None:
    module = SmallTask(optimizer=make_optimizer(name), accumulate_grad_batches=window)
    trainer = fit(module)
    loop = Loop(name, window=window)
    assert_equal_states(state_of(module), loop.train())
    assert trainer.global_step == loop.made == (4 if window < 6 else 2)


@pytest.mark.parametrize(("name", "interval"), [("muon", "step"), ("sync", "epoch"), ("aga", "step")])
def test_schedulers(name: str, interval: Any) -> None:
    def scheduler(optimizer: Any) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3 if interval == "epoch" else 10)

    module = SmallTask(optimizer=make_optimizer(name), scheduler=scheduler, scheduler_interval=interval)
    fit(module)
    assert_equal_states(state_of(module), Loop(name, scheduler=scheduler, interval=interval).train())


@pytest.mark.parametrize("name", ["muon", "aga"])
def test_a_scheduler_counts_updates_where_batches_accumulate(name: str) -> None:
    def scheduler(optimizer: Any) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=5)

    options: dict[str, Any] = {"scheduler": scheduler}
    module = SmallTask(optimizer=make_optimizer(name), accumulate_grad_batches=4, scheduler_interval="step", **options)
    fit(module)
    assert_equal_states(state_of(module), Loop(name, window=4, interval="step", **options).train())


class Logs(SmallTask):
    """Log a value that gets worse after the second epoch."""

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.log("worse", float(max(0, self.current_epoch - 1)))


def test_early_stopping() -> None:
    name = "aga"
    module = Logs(optimizer=make_optimizer(name))
    trainer = fit(module, epochs=9, callbacks=[EarlyStopping("worse", patience=2, check_on_train_epoch_end=True)])
    assert trainer.current_epoch == 3
    assert_equal_states(state_of(module), Loop(name, epochs=3).train())


@pytest.mark.parametrize(("name", "steps"), [("muon", 1), ("sync", 6), ("aga", 8)])
def test_max_steps(name: str, steps: int) -> None:
    module = SmallTask(optimizer=make_optimizer(name))
    trainer = fit(module, epochs=9, max_steps=steps)
    assert trainer.global_step == steps
    assert_equal_states(state_of(module), Loop(name, epochs=9, max_steps=steps).train())


@pytest.mark.parametrize("name", ["muon", "aga"])
def test_max_steps_counts_updates_where_batches_accumulate(name: str) -> None:
    module = SmallTask(optimizer=make_optimizer(name), accumulate_grad_batches=4)
    fit(module, epochs=9, max_steps=3)
    assert_equal_states(state_of(module), Loop(name, epochs=9, window=4, max_steps=3).train())


def test_max_time_stops_between_two_steps() -> None:
    class Waits(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                (timer,) = (c for c in vars(trainer)["callbacks"] if type(c).__name__ == "Timer")
                timer._offset = 3600.0  # an hour later

    module = SmallTask(optimizer=make_optimizer("aga"))
    trainer = fit(module, epochs=9, max_time=timedelta(minutes=30), callbacks=[Waits()])
    # Lightning's timer runs before this callback, so one more step is made.
    assert trainer.global_step in (4, 5)
    assert_equal_states(state_of(module), Loop("aga", limit=trainer.global_step, epochs=1).train())


def test_limit_train_batches() -> None:
    name = "aga"
    module = SmallTask(optimizer=make_optimizer(name), accumulate_grad_batches=3)
    fit(module, epochs=3, limit_train_batches=4)
    assert_equal_states(state_of(module), Loop(name, epochs=3, limit=4, window=3).train())


def test_overfit_batches_sees_the_same_batches_again() -> None:
    name = "aga"
    module = SmallTask(optimizer=make_optimizer(name))
    fit(module, epochs=3, overfit_batches=2)
    assert_equal_states(state_of(module), Loop(name, epochs=3, limit=2, same_batches=True).train())


def test_anomaly_detection_changes_nothing() -> None:
    name = "aga"
    module = SmallTask(optimizer=make_optimizer(name))
    fit(module, detect_anomaly=True)
    assert_equal_states(state_of(module), Loop(name).train())


@pytest.mark.filterwarnings("ignore:Error detected in")
def test_an_anomaly_in_the_second_pass_leaves_the_parameters_where_they_were() -> None:
    class Anomalous(SmallTask):
        def compute_loss(self, batch: Any, metrics: Any) -> torch.Tensor:
            loss = super().compute_loss(batch, metrics)
            # The derivative of the root at zero is infinite, and zero times infinity is not a number.
            return loss + ((loss * 0.0).sqrt() * 0.0 if metrics is None else 0.0)

    module = Anomalous(optimizer=make_optimizer("sync"))
    before = [param.detach().clone() for param in module.network.parameters()]
    with pytest.raises(RuntimeError, match="returned nan values"):
        fit(module, detect_anomaly=True)
    assert all(torch.equal(a, b) for a, b in zip(before, module.network.parameters(), strict=True))
