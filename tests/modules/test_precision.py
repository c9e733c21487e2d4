"""Compare the two-pass step in every precision with hand-written loops.

The effect of a gradient scaler on it is compared too.
"""

import functools
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from modules.nonfinite import SMALLEST_SCALE
from tests.modules.by_hand import Loop
from tests.modules.small_task import CORE, SmallTask, assert_equal_states, fit, make_optimizer, state_of

# By name 16-mixed becomes bf16-mixed on a CPU, which the command line refuses; the plugin and torch's scaler work.
scaler = functools.partial(torch.amp.GradScaler, "cpu", growth_interval=3)


def half(scaler: torch.amp.GradScaler) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)


@pytest.mark.parametrize("name", CORE)
def test_bf16_mixed_is_autocast_around_both_passes(name: str) -> None:
    module = SmallTask(optimizer=make_optimizer(name))
    fit(module, precision="bf16-mixed")
    assert_equal_states(state_of(module), Loop(name, autocast=torch.bfloat16).train())
    assert all(param.dtype == torch.float32 for param in module.network.parameters())


@pytest.mark.parametrize("name", CORE)
def test_bf16_true_trains_bf16_parameters(name: str) -> None:
    module = SmallTask(optimizer=make_optimizer(name))
    fit(module, precision="bf16-true")
    assert_equal_states(state_of(module), Loop(name, dtype=torch.bfloat16).train())
    assert all(param.dtype == torch.bfloat16 for param in module.network.parameters())


@pytest.mark.parametrize("name", CORE)
def test_16_mixed_unscales_once_whatever_the_passes(name: str) -> None:
    module = SmallTask(optimizer=make_optimizer(name))
    lightning_scaler, expected_scaler = scaler(init_scale=2.0**10), scaler(init_scale=2.0**10)
    fit(module, plugins=[half(lightning_scaler)])
    assert_equal_states(state_of(module), Loop(name, autocast=torch.float16, scaler=expected_scaler).train())
    # Twelve good steps, and the scale doubles after every third.
    assert lightning_scaler.get_scale() == expected_scaler.get_scale() == 2.0**14
    assert module.skipped_steps == 0


@pytest.mark.parametrize(
    ("name", "clip_first_pass", "algorithm"), [("sync", True, "norm"), ("sync", False, "value"), ("aga", True, "value")]
)
def test_16_mixed_clips_unscaled_gradients(name: str, clip_first_pass: bool, algorithm: Any) -> None:
    options = {"clip_first_pass": clip_first_pass}
    module = SmallTask(
        optimizer=make_optimizer(name), gradient_clip_val=0.02, gradient_clip_algorithm=algorithm, **options
    )
    fit(module, plugins=[half(scaler())])
    loop = Loop(name, autocast=torch.float16, scaler=scaler(), clip=0.02, clip_algorithm=algorithm, **options)
    assert_equal_states(state_of(module), loop.train())


@pytest.mark.parametrize("name", CORE)
def test_16_mixed_skips_steps_until_the_scale_is_low_enough(name: str) -> None:
    """At this scale the backward pass in half precision overflows by itself."""
    module = SmallTask(optimizer=make_optimizer(name))
    lightning_scaler, expected_scaler = scaler(init_scale=2.0**22), scaler(init_scale=2.0**22)
    trainer = fit(module, plugins=[half(lightning_scaler)])
    loop = Loop(name, autocast=torch.float16, scaler=expected_scaler)
    assert_equal_states(state_of(module), loop.train())
    assert module.skipped_steps == loop.steps - loop.made > 1
    assert trainer.global_step == loop.made > 1
    assert lightning_scaler.get_scale() == expected_scaler.get_scale() < 2.0**22
    assert trainer.callback_metrics["train/skipped_steps"] == module.skipped_steps


class OtherStrides(SmallTask):
    """Have no contiguous parameter of several dimensions.

    It has a kernel in channels_last and a transposed matrix.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.network.to(memory_format=torch.channels_last)
        self.network.head.weight = torch.nn.Parameter(self.network.head.weight.detach().T.contiguous().T)
        assert not any(p.is_contiguous() for p in self.network.parameters() if p.ndim > 1)


@pytest.mark.parametrize("name", CORE)
def test_16_mixed_skips_steps_whatever_the_strides_of_the_parameters(name: str) -> None:
    module, plain = OtherStrides(optimizer=make_optimizer(name)), SmallTask(optimizer=make_optimizer(name))
    lightning_scaler, expected_scaler = scaler(init_scale=2.0**22), scaler(init_scale=2.0**22)
    fit(module, plugins=[half(lightning_scaler)])
    fit(plain, plugins=[half(expected_scaler)])
    assert module.skipped_steps == plain.skipped_steps > 1
    assert lightning_scaler.get_scale() == expected_scaler.get_scale() < 2.0**22
    expected = dict(plain.network.named_parameters())
    for key, value in module.network.named_parameters():
        # Half precision rounds other sums. The bias before BatchNorm moves by this noise alone: up to 0.024.
        assert torch.allclose(value, expected[key], atol=0.05 if key == "convolution.bias" else 5e-3), key


class Damaged(SmallTask):
    """Multiply the loss of given steps, counted from 0, in one pass."""

    def __init__(self, steps: tuple[int, ...], in_pass: int, factor: float = torch.inf, **options: Any) -> None:
        super().__init__(**options)
        self.steps, self.in_pass, self.factor, self.begun = steps, in_pass, factor, 0

    def compute_loss(self, batch: Any, metrics: Any) -> torch.Tensor:
        this_pass = 1 if metrics is not None else 2
        self.begun += this_pass == 1
        loss = super().compute_loss(batch, metrics)
        return loss * (self.factor if self.begun - 1 in self.steps and this_pass == self.in_pass else 1.0)


@pytest.mark.parametrize(
    ("name", "factor", "in_pass"),
    [("sync", torch.inf, 1), ("sync", torch.nan, 2), ("aga", torch.nan, 1), ("aga", torch.inf, 2)],
)
def test_a_non_finite_value_in_either_pass_skips_the_step_and_lowers_the_scale(
    name: str, factor: float, in_pass: int
) -> None:
    # Every mode makes a second pass in step 0.
    module = Damaged((0,), in_pass, factor, optimizer=make_optimizer(name))
    lightning_scaler, expected_scaler = scaler(init_scale=2.0**10), scaler(init_scale=2.0**10)
    trainer = fit(module, plugins=[half(lightning_scaler)])
    loop = Loop(name, autocast=torch.float16, scaler=expected_scaler, damaged={0})
    assert_equal_states(state_of(module), loop.train())
    assert (module.skipped_steps, trainer.global_step) == (1, 11)
    assert lightning_scaler.get_scale() == expected_scaler.get_scale() == 2.0**12
    # The batch that had no loss is not part of the mean.
    assert trainer.callback_metrics["train/loss"].isfinite()


def test_an_overflow_of_the_first_pass_only_is_found() -> None:
    """Find an overflow in the first gradient where the second one is finite."""

    class Overflows(SmallTask):
        def _second_pass(self, optimizer: Any) -> None:
            if self.gradient_evaluations == 0:
                self.network.head.weight.grad[0, 0] = torch.inf  # type: ignore[index, union-attr]
                before = [param.detach().clone() for param in self.network.parameters()]
                super()._second_pass(_WithoutPerturbation(optimizer))
                assert all(torch.equal(a, b) for a, b in zip(before, self.network.parameters(), strict=True))
            else:
                super()._second_pass(optimizer)

    class _WithoutPerturbation:
        """Leave the parameters unperturbed in the second pass."""

        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

        def perturb(self) -> None:
            before = [param.detach().clone() for group in self.optimizer.param_groups for param in group["params"]]
            self.optimizer.perturb()
            with torch.no_grad():
                for param, value in zip(
                    (p for group in self.optimizer.param_groups for p in group["params"]), before, strict=True
                ):
                    param.copy_(value)

        def restore(self) -> None:
            self.optimizer.restore()

    module = Overflows(optimizer=make_optimizer("sync"))
    fit(module, plugins=[half(scaler(init_scale=2.0**10))])
    assert_equal_states(
        state_of(module), Loop("sync", autocast=torch.float16, scaler=scaler(init_scale=2.0**10), damaged={0}).train()
    )
    assert module.skipped_steps == 1


def test_a_scale_at_its_minimum_ends_the_run() -> None:
    module = Damaged(tuple(range(100)), 1, optimizer=make_optimizer("sync"))
    lightning_scaler = scaler(init_scale=SMALLEST_SCALE * 4)
    with pytest.raises(FloatingPointError, match=r"^step 1 in epoch 1, first pass: .* inf"):
        fit(module, plugins=[half(lightning_scaler)])
    assert module.skipped_steps == 3


def test_the_scale_is_resumed(tmp_path: Any) -> None:
    module = SmallTask(optimizer=make_optimizer("sync"))
    trainer = fit(module, epochs=2, plugins=[half(scaler(init_scale=2.0**10))])
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again, resumed_scaler = SmallTask(optimizer=make_optimizer("sync")), scaler()
    fit(again, epochs=3, plugins=[half(resumed_scaler)], ckpt_path=tmp_path / "run.ckpt")
    uninterrupted, expected_scaler = SmallTask(optimizer=make_optimizer("sync")), scaler(init_scale=2.0**10)
    fit(uninterrupted, epochs=3, plugins=[half(expected_scaler)])
    assert_equal_states(state_of(again), state_of(uninterrupted))
    assert resumed_scaler.get_scale() == expected_scaler.get_scale() == 2.0**16
