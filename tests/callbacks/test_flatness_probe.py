import functools
import math
import random
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from callbacks import cost_counters
from callbacks.cost_counters import CostCounters
from callbacks.flatness_probe import FlatnessProbe, scaled
from callbacks.last_checkpoint import LastCheckpoint
from modules.modular_addition import ModularAddition
from tests.callbacks.fits import adamw, ars2, data, fit, module, rows
from tests.modules import small_task
from tests.modules.small_task import OPTIMIZERS, SmallTask, assert_equal_states, make_optimizer, state_of

PROBED = "flatness/hessian_top"


def tiny(optimizer: Any = adamw) -> ModularAddition:
    """Return a network of 1,115 parameters in double precision."""
    torch.manual_seed(0)
    return ModularAddition(p=7, width=8, heads=2, mlp_width=16, optimizer=optimizer).double()


class Exact(L.Callback):
    """Measure around the parameters at the end of training.

    It uses full matrices and plain formulas.
    """

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_index: int) -> None:
        if trainer.global_step == 0:
            self.batch = batch

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        network = pl_module.network
        self.params = {name: param.detach().clone() for name, param in network.named_parameters()}
        states = trainer.optimizers[0].state
        self.moments = {name: states[param].get("exp_avg_sq") for name, param in network.named_parameters()}
        self.moments = {name: v if v is None else v.clone() for name, v in self.moments.items()}
        self.network, self.steps = network, trainer.global_step

    def loss(self, flat: Tensor) -> Tensor:
        parts = flat.split([param.numel() for param in self.params.values()])
        tensors = {name: part.view_as(self.params[name]) for name, part in zip(self.params, parts, strict=True)}
        logits = torch.func.functional_call(self.network, tensors, (self.batch[0],))
        return torch.nn.functional.cross_entropy(logits, self.batch[1])

    @property
    def flat(self) -> Tensor:
        return torch.cat([param.flatten() for param in self.params.values()])

    def rise(self, directions: list[Tensor], rho: float) -> float:
        """Return the rise after moving each tensor by ``rho`` along its direction."""
        moves = [rho * n.flatten() / (n.norm() + 1e-12) for n in directions]
        with torch.no_grad():
            return (self.loss(self.flat + torch.cat(moves)) - self.loss(self.flat)).item()

    def gradients(self) -> list[Tensor]:
        gradient: Tensor = torch.func.grad(self.loss)(self.flat)
        parts = gradient.split([param.numel() for param in self.params.values()])
        return [part.view_as(param) for part, param in zip(parts, self.params.values(), strict=True)]


def probed(optimizer: Any, folder: Path, **options: Any) -> tuple[dict[str, float], Exact]:
    """Fit three epochs; return the row of the end, and the truth."""
    exact = Exact()
    settings = {"epochs": 100, "max_products": 300, "trace_samples": 100, "rho": 0.3, "random_directions": 20}
    fit(tiny(optimizer), data(), [exact, FlatnessProbe(**{**settings, **options})], folder, epochs=3)
    (row,) = rows(folder, having=PROBED)
    return row, exact


@pytest.mark.parametrize("size", [1e-20, 1e-8, 1.0, 1e8])
def test_a_tensor_of_any_size_is_scaled_to_its_length(size: float) -> None:
    tensor = torch.tensor([3.0, 4.0])
    assert torch.allclose(scaled(tensor * size, 0.5), tensor / 10)
    assert not scaled(torch.zeros(2), 0.5).any()


def test_the_hessian_is_the_exact_one(tmp_path: Path) -> None:
    row, exact = probed(adamw, tmp_path)
    hessian: Tensor = torch.func.hessian(exact.loss)(exact.flat)
    top = torch.linalg.eigvalsh(hessian)[-1].item()
    assert row["flatness/probe_loss"] == pytest.approx(exact.loss(exact.flat).item(), rel=1e-10)
    assert row[PROBED] == pytest.approx(top, rel=1e-3)
    assert 0 < row["flatness/hessian_top_error"] <= 1e-3 * row[PROBED]
    error = row["flatness/hessian_trace_error"]
    assert abs(row["flatness/hessian_trace"] - hessian.trace().item()) < 4 * error
    deviation = (2 * (hessian.square().sum() - hessian.diagonal().square().sum()) / 100).sqrt().item()
    assert error == pytest.approx(deviation, rel=0.4)


@pytest.mark.parametrize("mode", ["base", "sync", "aga"])
def test_the_adversarial_rise_of_ars2_is_along_its_perturbation(mode: Any, tmp_path: Path) -> None:
    # The probe's radius is absolute.
    options = {"relative_rho": True, "rho_per_step": True} if mode == "aga" else {}
    row, exact = probed(ars2(mode, rho=0.05, **options), tmp_path)
    gradients = exact.gradients()
    directions = []
    for gradient, (name, param) in zip(gradients, exact.params.items(), strict=True):
        v_hat = exact.moments[name] / (1 - 0.999**exact.steps)
        directions.append(gradient / (v_hat.sqrt() + 1e-8) * param.abs())
    assert row["flatness/rise_adversarial"] == pytest.approx(exact.rise(directions, 0.3), rel=1e-6)
    assert row["flatness/rise_gradient"] == pytest.approx(exact.rise(gradients, 0.3), rel=1e-6)
    assert row["flatness/rise_adversarial"] != row["flatness/rise_gradient"]


def test_an_optimizer_without_a_direction_gets_the_gradients(tmp_path: Path) -> None:
    row, exact = probed(adamw, tmp_path)
    truth = pytest.approx(exact.rise(exact.gradients(), 0.3), rel=1e-6)
    assert row["flatness/rise_adversarial"] == row["flatness/rise_gradient"] == truth
    assert row["flatness/rise_random"] < row["flatness/rise_gradient"]


def test_random_rises_are_those_of_directions_of_the_same_lengths(tmp_path: Path) -> None:
    row, exact = probed(adamw, tmp_path, random_directions=200)
    generator = torch.Generator().manual_seed(5)
    draws = [
        [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in exact.params.values()] for _ in range(200)
    ]
    rises = torch.tensor([exact.rise(draw, 0.3) for draw in draws])
    error = row["flatness/rise_random_error"]
    assert error == pytest.approx(rises.std().item() / math.sqrt(200), rel=0.25)
    assert abs(row["flatness/rise_random"] - rises.mean().item()) < 5 * error


class WithHostRandomness(SmallTask):
    """Use every source of random numbers in the loss, as a task may."""

    def compute_loss(self, batch: Any, metrics: Any) -> Tensor:
        return super().compute_loss(batch, metrics) * (1 + 0.1 * random.random() + 0.1 * np.random.rand())


def fit_small(optimizer: Any, callbacks: list[L.Callback], folder: Path) -> tuple[Any, list[Any]]:
    module = WithHostRandomness(0.3, optimizer=optimizer)
    trainer = L.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=CSVLogger(str(folder)),
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    L.seed_everything(3)
    trainer.fit(module, small_task.batches())
    return module, [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_the_same_to_the_bit_as_without_it(name: str, tmp_path: Path) -> None:
    """Compare parameters, BatchNorm, optimizer state and every random state.

    The network has dropout.
    """
    probe = FlatnessProbe(epochs=1, batches=2, rho=0.5, max_products=3, trace_samples=2, random_directions=2)
    states, made = [], []

    def make(params: Any) -> Any:
        made.append(make_optimizer(name)(params))
        return made[-1]

    for callbacks in ([], [probe]):
        model, numbers = fit_small(make, callbacks, tmp_path / str(len(callbacks)))
        states.append((state_of(model), numbers, {key: p.grad for key, p in model.named_parameters()}))
    assert len(rows(tmp_path / "1/lightning_logs/version_0", having=PROBED)) == 4
    assert_equal_states(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]
    assert made[0].state_dict()["param_groups"] == made[1].state_dict()["param_groups"]
    for key, gradient in states[0][2].items():
        assert torch.equal(gradient, states[1][2][key]), key


def test_dropout_has_one_mask_a_probe(tmp_path: Path) -> None:
    """With other masks a rise along no direction would not be zero.

    Every loss would be one of another function.
    """
    probe = FlatnessProbe(epochs=[2], rho=1e-9, max_products=1, trace_samples=1, random_directions=1)
    fit_small(make_optimizer("adamw"), [probe], tmp_path)
    for row in rows(tmp_path / "lightning_logs/version_0", having=PROBED):
        for name in ("adversarial", "gradient", "random"):
            assert abs(row[f"flatness/rise_{name}"]) < 1e-5


@pytest.mark.parametrize(
    ("epochs", "probed_epochs"), [(2, [1, 3, 4]), (5, [4]), ([1, 4], [0, 3, 4]), ([9], [4]), ([], [4])]
)
def test_it_probes_the_chosen_epochs_and_the_end(epochs: Any, probed_epochs: list[int], tmp_path: Path) -> None:
    probe = FlatnessProbe(epochs=epochs, max_products=1, trace_samples=1, random_directions=1)
    fit(module(), data(), [probe], tmp_path, epochs=5)
    found = rows(tmp_path, having=PROBED)
    assert [row["epoch"] for row in found] == probed_epochs
    assert [row["step"] for row in found] == [4 * epoch + 3 for epoch in probed_epochs]


def test_it_is_no_part_of_the_runs_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = 0.0
    monkeypatch.setattr(cost_counters, "perf_counter", lambda: perf_counter() + skipped)

    class Slow(FlatnessProbe):
        def probe(self, *arguments: Any) -> dict[str, float]:
            nonlocal skipped
            skipped += 1e6
            return super().probe(*arguments)

    settings: dict[str, Any] = {"epochs": 1, "max_products": 2, "trace_samples": 3, "random_directions": 4}
    for place, callbacks in {
        "first": [Slow(**settings), CostCounters()],
        "last": [CostCounters(), Slow(**settings)],
    }.items():
        fit(module(ars2("sync")), data(), callbacks, tmp_path / place, epochs=3)
        found = rows(tmp_path / place, having=PROBED)
        assert [row["cost/gradient_evaluations"] for row in found] == [8, 16, 24]
        assert 0 < found[-1]["cost/training_seconds"] < 1e6
        for row in found:
            assert row["flatness/probe_gradient_evaluations"] == pytest.approx(1 + 2 * (2 + 3) + (2 + 4) / 3)
            assert row["flatness/probe_seconds"] > 0


def test_a_resumed_run_probes_the_same_batch(tmp_path: Path) -> None:
    def probe() -> FlatnessProbe:
        return FlatnessProbe(epochs=1, batches=2)

    fit(module(), data(), [probe()], tmp_path / "uninterrupted", epochs=3)
    saving = LastCheckpoint(dirpath=str(tmp_path))
    fit(module(), data(), [probe(), saving], tmp_path / "start", epochs=1, enable_checkpointing=True)
    fit(module(), data(), [probe()], tmp_path / "rest", epochs=3, ckpt_path=str(tmp_path / "last.ckpt"))
    logged = [rows(tmp_path / name, having=PROBED) for name in ("uninterrupted", "start", "rest")]
    for row in (row for found in logged for row in found):
        del row["flatness/probe_seconds"]
    assert logged[0] == logged[1] + logged[2]
    assert len(logged[2]) == 2


def test_a_longer_batch_is_the_mean_of_its_parts(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 1, "trace_samples": 2, "random_directions": 2, "max_products": 200}
    still = functools.partial(torch.optim.SGD, lr=0.0)
    # Four batches, the last one of five sums, are the complete training set.
    for batches, size in ((4, 8), (1, 29)):
        probe = FlatnessProbe(batches=batches, **settings)
        fit(tiny(still), data(batch_size=size), [probe], tmp_path / str(batches), epochs=1)
    (one_batch,), (parts,) = (rows(tmp_path / name, having=PROBED) for name in ("1", "4"))
    for key in ("probe_loss", "hessian_top", "rise_gradient", "hessian_trace"):
        assert parts[f"flatness/{key}"] == pytest.approx(one_batch[f"flatness/{key}"], rel=1e-6), key
    assert parts["flatness/probe_gradient_evaluations"] > 3 * one_batch["flatness/probe_gradient_evaluations"]


class Once(torch.autograd.Function):
    """Square in a way that can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class OnceDifferentiable(ModularAddition):
    def compute_loss(self, batch: Any, metrics: Any) -> Tensor:
        return Once.apply(super().compute_loss(batch, metrics))


def test_a_loss_that_cannot_be_differentiated_twice_is_refused_before_training(tmp_path: Path) -> None:
    model = module(kind=OnceDifferentiable)
    before = [param.clone() for param in model.parameters()]
    with pytest.raises(ValueError, match="which this one cannot: a part of it has a derivative that was"):
        fit(model, data(), [FlatnessProbe(epochs=50)], tmp_path, epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_other_errors_of_the_first_probe_are_raised_unchanged(tmp_path: Path) -> None:
    class Broken(ModularAddition):
        def compute_loss(self, batch: Any, metrics: Any) -> Tensor:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        fit(module(kind=Broken), data(), [FlatnessProbe(epochs=50)], tmp_path, epochs=2)


def test_a_run_without_a_logger_is_not_probed() -> None:
    class Never(FlatnessProbe):
        def probe(self, *arguments: Any) -> dict[str, float]:
            raise AssertionError

    fit(module(), data(), [Never(epochs=1)], None, epochs=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be a period or a list of numbers, each at least 1, got 0"),
        ({"epochs": [3, 0]}, "epochs must be"),
        ({"batches": 0}, "batches must be at least 1, got 0"),
        ({"max_products": 0}, "max_products must be"),
        ({"trace_samples": 0}, "trace_samples must be"),
        ({"random_directions": 0}, "random_directions must be"),
        ({"rho": 0.0}, "rho must be above 0, got 0.0"),
        ({"rho": math.inf}, "rho must be above 0, got inf"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        FlatnessProbe(**options)
