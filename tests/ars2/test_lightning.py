"""An ordinary LightningModule with TwoPass makes the suite's steps."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from ars2.lightning import TwoPass
from tests.ars2 import ordinary
from tests.ars2.ordinary import Ordinary, both, fit, fit_sharded
from tests.ars2.training import copies, same
from tests.helpers.launching import launch
from tests.modules.small_task import CORE, OPTIMIZERS, assert_equal_states, batches, state_of
from tests.modules.small_task import fit as fit_without


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "momentum"])
def test_it_trains_like_the_suite_to_the_bit(name: str) -> None:
    assert_equal_states(*both(name, dropout=0.3))


@pytest.mark.parametrize("name", CORE)
def test_it_accumulates_both_passes_and_steps_after_a_short_last_window(name: str) -> None:
    suite = {"accumulate_grad_batches": 4}
    assert_equal_states(*both(name, dropout=0.3, suite=suite, accumulate_grad_batches=4))


@pytest.mark.parametrize("name", CORE)
def test_it_knows_whether_a_window_is_open(name: str) -> None:
    seen = []

    class Records(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            (two_pass,) = (each for each in vars(trainer)["callbacks"] if isinstance(each, TwoPass))
            seen.append(two_pass.between_steps)

    fit(Ordinary(name), epochs=1, callbacks=[Records()], accumulate_grad_batches=4)
    assert seen == [False, False, False, True, False, True]


@pytest.mark.parametrize(("name", "algorithm"), [("sync", "norm"), ("aga", "value"), ("base", "norm")])
def test_it_clips_the_gradient_of_the_update(name: str, algorithm: str) -> None:
    options = {"gradient_clip_val": 0.02, "gradient_clip_algorithm": algorithm}
    assert_equal_states(*both(name, suite=options, **options))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("name", ["sync", "aga"])
def test_it_trains_in_every_precision(name: str, precision: str) -> None:
    assert_equal_states(*both(name, dropout=0.3, trainer=lambda: {"precision": precision}))


def without_statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(("norm.running", "norm.num_batches"))}


@pytest.mark.parametrize("scale", [2.0**10, 2.0**22])
@pytest.mark.parametrize("name", CORE)
def test_it_trains_with_a_gradient_scaler(name: str, scale: float) -> None:
    """At the larger scale the backward pass in half precision overflows by itself."""

    def trainer() -> dict[str, Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}

    actual, expected = both(name, suite={"gradient_clip_val": 0.1}, trainer=trainer, gradient_clip_val=0.1)
    # Only the suite takes back the statistics of a skipped step.
    assert_equal_states(without_statistics(actual), without_statistics(expected))


@pytest.mark.parametrize("name", ["base", "sync", "aga"])
def test_two_processes_train_like_the_suite(name: str, two: list[Any]) -> None:
    # Lightning broadcasts BatchNorm's statistics less often than the suite while it accumulates.
    states = [without_statistics(state) for results in two for state in results[name]]
    for state in states[1:]:
        assert_equal_states(state, states[0])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch(ordinary.together, 2, tmp_path_factory.mktemp("two"), ["base", "sync", "aga"])


@pytest.mark.parametrize("name", ["base", "sync", "aga"])
def test_a_sharded_network_trains_like_one_in_one_process(name: str, two: list[Any]) -> None:
    alone = fit_sharded(name, 1)
    for results in two:
        for key, value in results["sharded"][name].items():
            # Sums in another order: up to 5.0e-6 under sync, depending on the processor.
            assert torch.allclose(value, alone[key], rtol=0, atol=1e-5), key


def test_processes_agree_on_a_second_pass_that_only_one_wants(two: list[Any]) -> None:
    assert [results["disagreeing"] for results in two] == [24, 24]


class Values(L.Callback):
    """Record the logged values of every step and epoch."""

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.values.append({key: value.item() for key, value in trainer.callback_metrics.items()})

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.on_train_batch_end(trainer)


class Collected(Ordinary):
    """Log metrics that share a state, and a metric that stores every value."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.collection = MetricCollection([MulticlassAccuracy(3), MulticlassF1Score(3)])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.network(batch[0])
        self.log_dict(self.collection(logits, batch[1]), on_step=True, on_epoch=False)
        return {"loss": super().training_step(batch, batch_idx)}

    def on_train_epoch_end(self) -> None:
        self.log_dict({f"epoch/{key}": value for key, value in self.collection.compute().items()})
        self.collection.reset()


@pytest.mark.parametrize("kind", [Ordinary, Collected])
def test_logged_values_and_metrics_are_those_of_the_first_pass(kind: type[Ordinary]) -> None:
    """At learning rate 0 they are the values of a run with one pass, at any rho."""
    recorded = []
    for name in ("base", "sync"):
        values = Values()
        fit(kind(name, lr=0.0, weight_decay=0.0), callbacks=[values])
        recorded.append(values.values)
    assert recorded[0] == recorded[1] and len(recorded[0]) == 2 * 7
    assert "train/accuracy_step" in recorded[0][0] and "train/loss_epoch" in recorded[0][-1]


def test_a_resumed_run_is_no_interruption(tmp_path: Path) -> None:
    whole, resumed = Ordinary("aga"), Ordinary("aga")
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    _, first = fit(whole, epochs=4, callbacks=[checkpoint], enable_checkpointing=True)
    _, second = fit(resumed, epochs=4, ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert_equal_states(state_of(resumed), state_of(whole))  # type: ignore[arg-type]
    assert 24 < second.gradient_evaluations == first.gradient_evaluations < 48


def test_other_methods_of_the_module_act_once_on_each_gradient() -> None:
    class Scaled(Ordinary):
        def on_after_backward(self) -> None:
            for param in self.parameters():
                param.grad.mul_(0.5)

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    class Halved(Ordinary):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return 0.5 * super().training_step(batch, batch_idx)

    states = []
    for kind in (Scaled, Halved):
        module = kind("sync")
        fit(module)
        states.append(state_of(module))  # type: ignore[arg-type]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_the_number_of_accumulated_batches_may_change_between_epochs() -> None:
    module = Ordinary("sync")
    trainer, two_pass = fit(module, epochs=2, callbacks=[GradientAccumulationScheduler({0: 1, 1: 3})])
    assert trainer.global_step == 6 + 2 and two_pass.gradient_evaluations == 16


class Fails(Ordinary):
    """Fail in the second pass of the third step, and keep the parameters of its first."""

    error: type[BaseException] = ValueError

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if len(self.losses) == 5:
            assert not same(self.before, self.network.parameters())
            raise self.error
        self.before = copies(self.network.parameters())
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_the_second_pass_restores_the_parameters(error: type[BaseException]) -> None:
    module = Fails("sync")
    module.error = error
    with pytest.raises((ValueError, SystemExit)):
        fit(module)
    assert same(module.before, module.network.parameters())
    assert not {"training_step", "optimizer_step", "log"} & {*vars(module), *vars(module.trainer.strategy)}
    module.error, module.losses = ValueError, [0.0] * 6
    fit(module)  # again, with the same module


class Named(Ordinary):
    """Take the items out of a batch that is a dictionary."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"images": batch[0], "more": {"classes": batch[1]}}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.network(batch.pop("images")), batch["more"].pop("classes"))


def test_a_training_step_may_take_items_out_of_its_batch() -> None:
    module, other = Named("sync"), Ordinary("sync")
    for each in (module, other):
        fit(each)
    assert_equal_states(state_of(module), state_of(other))  # type: ignore[arg-type]


class Pair(NamedTuple):
    images: Tensor
    classes: Tensor


@dataclass
class Example:
    images: Tensor
    classes: Tensor


@pytest.mark.parametrize("kind", [Pair, Example])
def test_batches_of_any_kind_are_repeated_or_refused(kind: Any) -> None:
    class Typed(Ordinary):
        in_place = False

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return kind(*batch)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.in_place:
                batch.images.mul_(2)
            elif kind is Example:
                batch.images = batch.images * 2  # of this copy of the batch only
            return super().training_step((batch.images, batch.classes), batch_idx)

    class Doubled(Ordinary):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            factor = 2 if kind is Example else 1
            return super().training_step((batch[0] * factor, batch[1]), batch_idx)

    module, other, in_place = Typed("sync"), Doubled("sync"), Typed("sync")
    for each in (module, other):
        fit(each)
    assert_equal_states(state_of(module), state_of(other))  # type: ignore[arg-type]
    in_place.in_place = True
    with pytest.raises(RuntimeError, match="changed a tensor of its batch in place"):
        fit(in_place)


def test_calls_from_elsewhere_are_not_repeated() -> None:
    class Validates(Ordinary):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.training_step(batch, batch_idx=batch_idx)

        def val_dataloader(self) -> Any:
            return batches()

    module, other = Validates("aga"), Ordinary("aga")
    _, two_pass = fit(other)
    _, again = fit(module, val_check_interval=2, num_sanity_val_steps=0)
    assert again.gradient_evaluations == two_pass.gradient_evaluations
    states = [without_statistics(state_of(each)) for each in (module, other)]  # type: ignore[arg-type]
    assert_equal_states(*states)


def test_a_window_whose_last_batch_has_no_loss_is_repeated_without_it() -> None:
    class Skips(Ordinary):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    module = Skips("sync")
    trainer, two_pass = fit(module, accumulate_grad_batches=2)
    assert trainer.global_step == 6 and two_pass.gradient_evaluations == 12


def test_training_that_ends_within_a_window_leaves_nothing_for_the_next() -> None:
    class Stops(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.fit_loop.total_batch_idx == 3

    states = []
    for kept in (True, False):
        module, callback = Ordinary("sync"), TwoPass()
        for two_pass in (callback, callback if kept else TwoPass()):
            fit_without(module, 1, accumulate_grad_batches=3, callbacks=[two_pass, Stops()])  # type: ignore[arg-type]
        states.append(state_of(module))  # type: ignore[arg-type]
    assert_equal_states(*states)


class InPlace(Ordinary):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batch[0].div_(2)
        return super().training_step(batch, batch_idx)


class Manual(Ordinary):
    automatic_optimization = False  # type: ignore[assignment]


class Draws(Ordinary):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        batch, index, _ = next(dataloader_iter)
        return super().training_step(batch, index)


class Forgets(Ordinary):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss if len(self.losses) % 2 else None


class OwnSteps(SingleDeviceStrategy):
    handles_gradient_accumulation = True  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (InPlace, r"InPlace.training_step\(\) changed a tensor of its batch in place.*x = x.div\(255\)"),
        (Manual, r"Manual, because it sets automatic_optimization to False.*loop over optimizer.passes\(self\)"),
        (Draws, r"batches of Draws, whose training_step\(dataloader_iter\) draws them itself"),
        (Forgets, r"Forgets.training_step\(\) returned no loss when its batch was evaluated again"),
    ],
)
def test_what_cannot_be_is_an_error(kind: type[Ordinary], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        fit(kind("sync"))


def test_a_strategy_that_makes_its_own_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"TwoPass does not support OwnSteps.*use ddp"):
        fit(Ordinary("sync"), strategy=OwnSteps("cpu"))


def test_mode_momentum_is_refused_with_and_without_the_callback() -> None:
    with pytest.raises(ValueError, match=r'before Ordinary.training_step\(\), which mode "momentum" needs'):
        fit(Ordinary("momentum"))
    with pytest.raises(RuntimeError, match='mode "momentum" needs the gradient at moved parameters'):
        fit_without(Ordinary("momentum"), 1)


def test_a_trainer_without_the_callback_is_warned_once() -> None:
    with pytest.warns(UserWarning, match=r"callbacks=\[ars2.lightning.TwoPass\(\)\]") as caught:
        fit_without(Ordinary("sync"), 1)
    assert len([warning for warning in caught if "twice" in str(warning.message)]) == 1
    with pytest.raises(RuntimeError, match=r"for Lightning's accumulate_grad_batches, give the Trainer callbacks"):
        fit_without(Ordinary("sync"), 1, accumulate_grad_batches=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*twice")
        fit(Ordinary("sync"), 1)
        fit_without(Ordinary("base"), 1)


def test_averages_that_would_be_trained_on_are_refused() -> None:
    average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    with pytest.raises(RuntimeError, match=r"called without a backward pass.*use WeightAveraging"):
        fit(Ordinary("sync"), callbacks=[average])


def test_an_average_is_taken_once_a_step() -> None:
    average, module, plain = EMAWeightAveraging(decay=0.5), Ordinary("sync"), Ordinary("sync")
    expected: dict[str, Tensor] = {}

    class Average(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            for name, param in pl_module.named_parameters():
                now = param.detach().clone()
                expected[name] = 0.5 * expected[name] + 0.5 * now if name in expected else now

    fit(module, callbacks=[average])
    fit(plain, callbacks=[Average()])
    for name, param in module.named_parameters():  # at the end the module has the averages
        assert torch.allclose(param, expected[name], rtol=0, atol=1e-7), name


@pytest.mark.slow
def test_a_compiled_module_trains_the_same_and_keeps_its_methods() -> None:
    class Plain(Ordinary):
        def training_step(self, batch: Any, batch_idx: int) -> Any:  # torch cannot compile every metric
            return F.cross_entropy(self.network(batch[0]), batch[1])

    module, other = Plain("sync", 0.3), Plain("sync", 0.3)
    module.training_step = other_step = torch.compile(module.training_step, backend="eager")  # type: ignore[method-assign]
    for each in (module, other):
        fit(each)
    assert_equal_states(state_of(module), state_of(other))  # type: ignore[arg-type]
    assert vars(module)["training_step"] is other_step and "optimizer_step" not in vars(module)


def test_a_batch_without_a_loss_is_skipped() -> None:
    class Skips(Ordinary):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    module = Skips("sync")
    fit(module)
    assert module.optimizers().optimizer.diagnostics()["steps"] == 6  # type: ignore[union-attr]
