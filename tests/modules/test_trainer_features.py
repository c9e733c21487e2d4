"""Compare Lightning's options around two passes with hand-written loops."""

import copy
import os
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    RichModelSummary,
    ThroughputMonitor,
    Timer,
)
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.optim import lr_scheduler

from tests.modules.by_hand import Loop
from tests.modules.small_task import CORE, SmallTask, assert_equal_states, batches, fit, make_optimizer, state_of


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


@pytest.mark.parametrize(
    ("name", "interval"),
    [
        ("muon", "step"),
        ("sync", "epoch"),
        ("aga", "step"),
        ("muon", "gradient_evaluation"),
        ("sync", "gradient_evaluation"),
        ("aga", "gradient_evaluation"),
    ],
)
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


def trainer_of_a_user(folder: Path, **options: Any) -> L.Trainer:
    """Return a Trainer with as few options as possible, which a test may add to."""
    quiet = {} if options.get("barebones") else {"enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(max_epochs=2, accelerator="cpu", default_root_dir=folder, **{**quiet, **options})


@pytest.mark.parametrize("name", CORE)
def test_callbacks_and_loggers_that_only_watch_change_nothing(name: str, tmp_path: Path) -> None:
    seen: list[int] = []
    passive: list[L.Callback] = [
        LearningRateMonitor(log_momentum=True, log_weight_decay=True),
        DeviceStatsMonitor(cpu_stats=True),
        ModelSummary(),
        RichModelSummary(),
        Timer("00:01:00:00"),
        ThroughputMonitor(lambda batch: len(batch[0]), window_size=2),
        OnExceptionCheckpoint(tmp_path),
        LambdaCallback(on_train_batch_end=lambda trainer, *_: seen.append(trainer.global_step)),
        EarlyStopping("val/loss", patience=9),
        ModelCheckpoint(tmp_path, "best", monitor="val/loss"),
        ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1),
    ]
    logger = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    module = SmallTask(optimizer=make_optimizer(name))
    module.flops_per_batch = 1
    trainer_of_a_user(tmp_path, callbacks=passive, logger=logger, log_every_n_steps=1).fit(module, batches(), batches())
    assert_equal_states(state_of(module), Loop(name).train())
    assert seen == list(range(1, 13))
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"best.ckpt", "step=5.ckpt", "step=10.ckpt"}
    (rows,) = tmp_path.glob("lightning_logs/*/metrics.csv")
    assert f"lr-{type(trainer_optimizer(module)).__name__}/pg1" in rows.read_text().splitlines()[0]


def trainer_optimizer(module: SmallTask) -> Any:
    return module.optimizers().optimizer  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("callback", "instead"),
    [
        (GradientAccumulationScheduler({0: 2}), "set accumulate_grad_batches of the module"),
        (ModelPruning("l1_unstructured"), "prune the trained network"),
        (BackboneFinetuning(1), r"requires_grad_\(False\) before training"),
        (LearningRateFinder(), "update_attr=False"),
    ],
)
def test_a_callback_that_cannot_work_says_what_to_do_instead(callback: L.Callback, instead: str) -> None:
    with pytest.raises(ValueError, match=f"^{type(callback).__name__} .*{instead}"):
        fit(SmallTask(optimizer=make_optimizer("sync")), callbacks=[callback])  # type: ignore[arg-type]


def test_clipping_and_accumulation_of_the_trainer_name_the_modules_options() -> None:
    module = SmallTask(optimizer=make_optimizer("sync"))
    with pytest.raises(ValueError, match=r"give gradient_clip_val=0.5, accumulate_grad_batches=2 to SmallTask instead"):
        fit(module, gradient_clip_val=0.5, accumulate_grad_batches=2)
    with pytest.raises(ValueError, match="give gradient_clip_algorithm='value' to SmallTask"):
        fit(module, gradient_clip_algorithm="value")
    fit(module, gradient_clip_val=0)


@pytest.mark.parametrize(
    "options",
    [
        {"val_check_interval": 2},
        {"check_val_every_n_epoch": 2},
        {"check_val_every_n_epoch": None, "val_check_interval": 4},
        {"limit_val_batches": 0},
        {"min_epochs": 2, "max_time": "00:01:00:00"},
        {"profiler": "simple"},
        {"deterministic": True},
        {"inference_mode": False},
        {"barebones": True},
        {"num_sanity_val_steps": -1},
        {"reload_dataloaders_every_n_epochs": 1},
    ],
    ids=str,
)
def test_options_that_only_concern_evaluation_or_speed_change_nothing(options: Any, tmp_path: Path) -> None:
    module = SmallTask(optimizer=make_optimizer("aga"))
    try:
        trainer_of_a_user(tmp_path, **options).fit(module, batches(), batches())
    finally:
        torch.use_deterministic_algorithms(False)
    assert_equal_states(state_of(module), Loop("aga").train())


def test_fast_dev_run_makes_its_steps_and_saves_nothing(tmp_path: Path) -> None:
    module = SmallTask(optimizer=make_optimizer("sync"))
    trainer_of_a_user(tmp_path, fast_dev_run=3).fit(module, batches(), batches())
    assert_equal_states(state_of(module), Loop("sync", epochs=1, limit=3).train())
    assert not [*tmp_path.iterdir()]


def test_an_exception_in_the_second_pass_saves_the_unperturbed_weights(tmp_path: Path) -> None:
    class Fails(SmallTask):
        def compute_loss(self, batch: Any, metrics: Any) -> Tensor:
            if metrics is None and self.global_step == 5:
                raise RuntimeError("as the test wants it")
            return super().compute_loss(batch, metrics)

    callback = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(RuntimeError, match="as the test wants it"):
        trainer_of_a_user(tmp_path, callbacks=[callback]).fit(Fails(optimizer=make_optimizer("sync")), batches())
    saved = torch.load(callback.ckpt_path, weights_only=True)["state_dict"]
    expected = Loop("sync", epochs=1, limit=5).train()
    assert torch.equal(saved["network.head.weight"], expected["head.weight"])


class ValuesAfterSteps(L.Callback):
    """Record the weights of the head after every step, and those that are validated."""

    def __init__(self) -> None:
        self.trained: list[Tensor] = []
        self.validated: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.trained.append(pl_module.network.head.weight.detach().clone())

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.validated.append(pl_module.network.head.weight.detach().clone())


def test_a_moving_average_of_a_sharded_network_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"callbacks": [EMAWeightAveraging()], "strategy": ModelParallelStrategy()}
    # Lightning's launcher leaves its address and rank in the environment.
    with patch.dict(os.environ), pytest.raises(ValueError, match="does not support a sharded network"):
        trainer_of_a_user(tmp_path, **options).fit(SmallTask(optimizer=make_optimizer("sync")), batches())


@pytest.mark.parametrize("name", ["adamw", "sync", "aga"])
def test_a_moving_average_is_of_the_weights_after_each_step(name: str, tmp_path: Path) -> None:
    seen, best = ValuesAfterSteps(), ModelCheckpoint(tmp_path, "best", monitor="val/loss")
    module = SmallTask(optimizer=make_optimizer(name))
    callbacks = [seen, EMAWeightAveraging(decay=0.8), best]
    trainer_of_a_user(tmp_path, callbacks=callbacks, num_sanity_val_steps=0).fit(module, batches(), batches())
    assert torch.equal(seen.trained[-1], Loop(name).train()["head.weight"])
    averages = [seen.trained[0]]
    for weight in seen.trained[1:]:
        averages.append(0.8 * averages[-1] + 0.2 * weight)
    for epoch, average in enumerate((averages[5], averages[11])):
        assert torch.allclose(seen.validated[6 * epoch], average, rtol=1e-5, atol=1e-7)
    assert torch.allclose(module.network.head.weight, averages[11], rtol=1e-5, atol=1e-7)
    loaded = SmallTask.load_from_checkpoint(tmp_path / "best.ckpt").network.head.weight
    assert any(torch.equal(loaded, validated) for validated in seen.validated)


class Worse(SmallTask):
    """Log 0, 0, 1, 2, 3."""

    def on_train_epoch_end(self) -> None:
        self.log("worse", float(max(0, self.current_epoch - 1)))
        super().on_train_epoch_end()


@pytest.mark.parametrize("name", ["muon", "sync", "aga"])
def test_a_plateau_lowers_the_learning_rate_and_resumes(name: str, tmp_path: Path) -> None:
    def scheduler(optimizer: Any) -> Any:
        return ReduceLROnPlateau(optimizer, monitor="worse", patience=1, factor=0.5)

    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    module = Worse(optimizer=make_optimizer(name), scheduler=scheduler)
    trainer = fit(module, epochs=5, callbacks=[saving], enable_checkpointing=True)
    by_hand = lr_scheduler.ReduceLROnPlateau(copy.deepcopy(trainer.optimizers[0]), patience=1, factor=0.5)
    by_hand.optimizer.param_groups[0]["lr"] = 1e-2
    for value in (0.0, 0.0, 1.0, 2.0, 3.0):
        by_hand.step(value)
    assert by_hand.optimizer.param_groups[0]["lr"] == trainer.optimizers[0].param_groups[0]["lr"] == 0.25e-2
    again = Worse(optimizer=make_optimizer(name), scheduler=scheduler)
    fit(again, epochs=5, ckpt_path=str(tmp_path / "epoch=2.ckpt"))
    assert_equal_states(state_of(again), state_of(module))


def test_a_plateau_without_its_metric_says_which_there_are() -> None:
    def with_scheduler(scheduler: Any, **options: Any) -> L.Trainer:
        return fit(SmallTask(optimizer=make_optimizer("adamw"), scheduler=scheduler), **options)

    with pytest.raises(ValueError, match=r"scheduler.monitor is val_loss, .* epoch 1: give one of train/loss"):
        with_scheduler(lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val_loss"))
    # Training may end before the first validation.
    with_scheduler(lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val/loss"), max_steps=3)
    with pytest.raises(ValueError, match=r"lightning.pytorch.cli.ReduceLROnPlateau with monitor"):
        with_scheduler(lr_scheduler.ReduceLROnPlateau)
    options: Any = {"scheduler": lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val/loss")}
    with pytest.raises(ValueError, match="scheduler_interval epoch"):
        fit(SmallTask(optimizer=make_optimizer("adamw"), scheduler_interval="step", **options))


SCHEDULERS: dict[str, Any] = {
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=12),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 5),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4),
            lr_scheduler.CosineAnnealingLR(optimizer, 8),
        ],
        [4],
    ),
}


@pytest.mark.parametrize("name", CORE)
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_schedule_with_a_warm_up_is_stepped_with_the_updates(kind: str, name: str) -> None:
    module = SmallTask(optimizer=make_optimizer(name), scheduler=SCHEDULERS[kind], scheduler_interval="step")
    fit(module)
    assert_equal_states(state_of(module), Loop(name, scheduler=SCHEDULERS[kind], interval="step").train())


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_the_learning_rate_finder_tries_rates_and_leaves_the_run_as_it_was(interval: Any, tmp_path: Path) -> None:
    name = "aga"

    def scheduler(optimizer: Any) -> Any:
        return lr_scheduler.CosineAnnealingLR(optimizer, 12)

    module = SmallTask(optimizer=make_optimizer(name), scheduler=scheduler, scheduler_interval=interval)
    trainer = trainer_of_a_user(tmp_path, logger=False, enable_checkpointing=False)
    found: Any = Tuner(trainer).lr_find(module, batches(), min_lr=1e-4, max_lr=1.0, num_training=12, update_attr=False)
    # Lightning leaves out the second rate.
    assert found.results["lr"] == pytest.approx([1e-4 * 1e4 ** (step / 12) for step in (0, *range(2, 13))])
    trainer.fit(module, batches())
    assert_equal_states(state_of(module), Loop(name, scheduler=scheduler, interval=interval).train())
