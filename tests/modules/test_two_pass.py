"""Compare the two-pass step under Lightning with hand-written loops."""

import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from ars2 import ARS2Neo, Muon
from modules.two_pass import build_optimizer
from tests.modules.by_hand import Loop
from tests.modules.small_task import (
    CORE,
    OPTIMIZERS,
    TWO_PASS,
    SmallNetwork,
    SmallTask,
    assert_equal_states,
    batches,
    fit,
    make_optimizer,
    state_of,
)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_equals_a_hand_written_loop_to_the_bit(name: str) -> None:
    module = SmallTask(optimizer=make_optimizer(name))
    trainer = fit(module)
    assert_equal_states(state_of(module), Loop(name).train())
    assert trainer.global_step == 12


@pytest.mark.parametrize("name", ["adamw", "aga", "momentum"])
def test_both_passes_accumulate_and_the_short_last_window_makes_a_step(name: str) -> None:
    module = SmallTask(optimizer=make_optimizer(name), accumulate_grad_batches=4)
    trainer = fit(module, epochs=3)
    assert_equal_states(state_of(module), Loop(name, epochs=3, window=4).train())
    assert trainer.global_step == 6


@pytest.mark.parametrize("name", ["muon", "aga"])
def test_batches_of_a_window_are_kept_only_for_a_second_pass(name: str) -> None:
    class Weak(SmallTask):
        def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
            there.append(sum(reference() is not None for reference in references))
            references.append(weakref.ref(batch[0]))

    references: list[weakref.ref[torch.Tensor]] = []
    there: list[int] = []
    fit(Weak(optimizer=make_optimizer(name), accumulate_grad_batches=3), epochs=1)
    # Six batches in two windows of three: before the last of a window its other two are alive, or none.
    assert max(there) == (2 if name in TWO_PASS else 0)


def test_clipping_by_value_limits_every_entry_of_the_gradient() -> None:
    module = SmallTask(optimizer=make_optimizer("sync"), gradient_clip_val=1e-3, gradient_clip_algorithm="value")
    fit(module, epochs=1)
    largest = max(param.grad.abs().max().item() for param in module.network.parameters() if param.grad is not None)
    assert largest == pytest.approx(1e-3)


@pytest.mark.parametrize("name", ["sync", "aga"])
def test_the_second_pass_sees_the_same_batch_and_random_numbers(name: str) -> None:
    """With rho = 0 the second gradient equals the first, dropout included.

    Training then equals that of Base to the bit.
    """
    module = SmallTask(dropout=0.5, optimizer=make_optimizer(name, rho=0.0, alpha=0.0))
    base = SmallTask(dropout=0.5, optimizer=make_optimizer("base"))
    fit(module)
    fit(base)
    without_shear = {key: value for key, value in state_of(module).items() if not key.endswith("shear")}
    assert_equal_states(without_shear, state_of(base))
    assert module.gradient_evaluations > base.gradient_evaluations == 12


@pytest.mark.parametrize("name", CORE)
def test_batchnorm_statistics_after_a_step_are_those_of_one_pass(name: str) -> None:
    module = SmallTask(optimizer=make_optimizer(name))
    torch.manual_seed(0)
    once = SmallNetwork()
    once.train()
    once(next(iter(batches()))[0])
    fit(module, epochs=1, limit_train_batches=1)
    for name_, buffer in once.named_buffers():
        assert torch.equal(buffer, module.network.get_buffer(name_)), name_


def test_running_statistics_of_any_kind_are_those_of_the_first_pass() -> None:
    def task(mode: str) -> SmallTask:
        module = SmallTask(optimizer=make_optimizer(mode, rho=0.0))
        module.network.norm = nn.InstanceNorm2d(4, track_running_stats=True)  # type: ignore[assignment]
        return module

    sync, base = task("sync"), task("base")
    fit(sync)
    fit(base)
    assert_equal_states(sync.network.state_dict(), base.network.state_dict())


def test_the_reported_loss_is_that_of_the_first_pass() -> None:
    module = SmallTask(optimizer=make_optimizer("sync", rho=1.0))
    trainer = fit(module, epochs=1)
    first, second = module.losses[0::2], module.losses[1::2]
    weights = [len(batch[0]) for batch in batches()]
    mean = sum(loss * weight for loss, weight in zip(first, weights, strict=True)) / sum(weights)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(mean, rel=1e-6)
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) > 1e-2


@pytest.mark.parametrize("name", ["adamw", "aga"])
def test_values_logged_by_a_loss_are_those_of_the_first_pass(name: str) -> None:
    firsts: list[float] = []

    class Logs(SmallTask):
        def compute_loss(self, batch: Any, metrics: Any) -> torch.Tensor:
            loss = super().compute_loss(batch, metrics)
            firsts.extend([] if metrics is None else [loss.item()])
            self.log("own", loss, on_step=False, on_epoch=True, batch_size=1)
            self.log_dict({"own_too": loss}, on_step=False, on_epoch=True, batch_size=1)
            return loss

    module = Logs(optimizer=make_optimizer(name, **({"rho": 1.0} if name != "adamw" else {})))
    logged = fit(module, epochs=1).callback_metrics
    assert len(firsts) == 6
    for key in ("own", "own_too"):
        assert logged[key].item() == pytest.approx(sum(firsts) / 6, rel=1e-6)


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_an_exception_in_the_second_pass_restores_the_parameters(error: type[BaseException]) -> None:
    class Failing(SmallTask):
        def compute_loss(self, batch: Any, metrics: Any) -> torch.Tensor:
            if metrics is None:
                raise error
            return super().compute_loss(batch, metrics)

    module = Failing(optimizer=make_optimizer("sync"))
    before = [param.detach().clone() for param in module.network.parameters()]
    with pytest.raises((Stop, SystemExit)):
        fit(module)
    assert all(torch.equal(a, b) for a, b in zip(before, module.network.parameters(), strict=True))


def test_callbacks_find_unmoved_parameters_in_mode_momentum_whatever_a_batch_raises() -> None:
    """The third window is skipped, and the backward pass of its second batch raises."""
    seen: list[dict[str, torch.Tensor]] = []

    class Failing(SmallTask):
        def compute_loss(self, batch: Any, metrics: Any) -> torch.Tensor:
            moved.append(not same_as_seen(self))
            loss = super().compute_loss(batch, metrics)
            return loss * torch.inf if len(moved) == 5 else loss

        def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
            seen.append({key: value.clone() for key, value in self.network.named_parameters()})

        def on_after_backward(self) -> None:
            if len(moved) == 6:
                raise Stop

    def same_as_seen(module: SmallTask) -> bool:
        return all(torch.equal(value, seen[-1][key]) for key, value in module.network.named_parameters())

    moved: list[bool] = []
    module = Failing(optimizer=make_optimizer("momentum"), accumulate_grad_batches=2, nonfinite="skip")
    with pytest.raises(Stop):
        fit(module)
    assert moved == [False, False, True, True, True, True]
    assert same_as_seen(module)
    assert_equal_states(seen[0], seen[1])
    assert_equal_states(seen[4], seen[5])


@pytest.mark.parametrize(("interval", "expected"), [("epoch", 0.5**2), ("step", 0.5**12)])
def test_the_scheduler_is_stepped_at_its_interval(interval: Any, expected: float) -> None:
    module = SmallTask(
        optimizer=make_optimizer("sync"),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5),
        scheduler_interval=interval,
    )
    trainer = fit(module)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == pytest.approx([1e-2 * expected] * 2)


@pytest.mark.parametrize("name", CORE)
def test_gradient_evaluations_are_counted_and_saved(name: str, tmp_path: Any) -> None:
    module = SmallTask(optimizer=make_optimizer(name))
    trainer = fit(module)
    optimizer: Any = trainer.optimizers[0]
    second_passes = optimizer.diagnostics()["sync_steps"] if isinstance(optimizer, ARS2Neo) else 0
    assert module.gradient_evaluations == 12 + second_passes
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = SmallTask(optimizer=make_optimizer(name))
    fit(again, ckpt_path=tmp_path / "run.ckpt")
    assert again.gradient_evaluations == 12 + second_passes


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches must be at least 1, got 0"),
        ({"scheduler_interval": "steps"}, "scheduler_interval must be 'epoch', 'step' or 'gradient_evaluation'"),
        ({"nonfinite": "ignore"}, "nonfinite must be 'stop' or 'skip', got 'ignore'"),
        ({"gather": "float16"}, "gather must be 'exact' or 'bfloat16', got 'float16'"),
        ({"gradient_clip_val": 0.0}, "gradient_clip_val must be above 0"),
        (
            {"vector": {"weight_dacay": 1.0}},
            r"\(vector group\) has no option 'weight_dacay': did you mean 'weight_decay'",
        ),
        ({"policy": "most"}, "policy must be 'all' or 'hidden', got 'most'"),
        ({"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau}, "ReduceLROnPlateau needs a metric"),
    ],
)
def test_invalid_options_are_errors_that_name_them(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        fit(SmallTask(optimizer=make_optimizer("base"), **options))


@pytest.mark.parametrize(
    ("track", "name", "nearest"), [("matrix", "learning_rate", "lr"), ("vector", "wieght_decay", "weight_decay")]
)
def test_an_option_of_one_track_that_any_optimizer_lacks_is_an_error(track: str, name: str, nearest: str) -> None:
    for make in (partial(torch.optim.AdamW, lr=0.1), partial(Muon, lr=0.1), partial(ARS2Neo, lr=0.1)):
        message = rf"{make.func.__name__} \({track} group\) has no option '{name}': did you mean '{nearest}'"
        with pytest.raises(ValueError, match=message):
            build_optimizer(nn.Linear(2, 2), make, "all", **{"matrix": None, "vector": None, track: {name: 1.0}})
    build_optimizer(nn.Linear(2, 2), Muon, "all", None, {"betas": (0.8, 0.9)})


def test_fused_weights_are_split_for_any_optimizer() -> None:
    network = nn.MultiheadAttention(4, 2)
    optimizer = build_optimizer(network, torch.optim.AdamW, "all", None, None, splits={"in_proj_weight": 3})
    assert [len(g["params"]) for g in optimizer.param_groups if g.get("splits") == 3] == [1]
    module = SmallTask(optimizer=make_optimizer("adamw"), splits={"*.qkv.weight": 3})
    with pytest.raises(ValueError, match=r"splits: no parameter matches \['\*\.qkv\.weight'\]"):
        fit(module)
