import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from callbacks.robustness_probe import RobustnessProbe, rounded
from modules.modular_addition import ModularAddition
from tests.callbacks.fits import adamw, data, restored, values_of_a_test
from tests.helpers.commands import AGA, TINY, fit
from tests.modules import small_task
from tests.modules.small_task import SmallTask

QUICK: dict[str, Any] = {"max_products": 2, "noise_draws": 2}


def tiny(kind: type[ModularAddition] = ModularAddition) -> ModularAddition:
    """Return a network of 1,115 parameters in double precision."""
    torch.manual_seed(0)
    return kind(p=7, width=8, heads=2, mlp_width=16, optimizer=adamw).double()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("shape", "flatten"), [((5, 7), False), ((2, 3, 7), False), ((4, 2, 3), True), ((4, 2, 3, 3), False)]
)
def test_every_row_is_rounded_to_the_nearest_symmetric_level(shape: Any, flatten: bool, bits: int) -> None:
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(bits))
    rows = shape[0] if flatten or len(shape) == 4 else math.prod(shape[:-1])
    weights.view(rows, -1)[1] = 0.0
    found = rounded(weights, bits, flatten).view(rows, -1).tolist()
    for row, numbers in zip(found, weights.view(rows, -1).tolist(), strict=True):
        top = 2 ** (bits - 1) - 1
        step = max(abs(x) for x in numbers) / top
        levels = [step * level for level in range(-top, top + 1)]
        for x, y in zip(numbers, row, strict=True):
            assert y == pytest.approx(min(levels, key=lambda level: abs(level - x)), rel=1e-5, abs=1e-12)
            assert abs(y - x) <= step / 2 * (1 + 1e-5)
    assert found[1] == [0.0] * len(found[1])


def test_the_values_are_those_of_plain_formulas() -> None:
    model, probe = tiny(), RobustnessProbe(max_products=300, noise=0.2, noise_draws=3, rho=0.3, seed=4)
    params = {name: param.detach().clone() for name, param in model.network.named_parameters()}
    row = values_of_a_test(model, probe)
    ((sums, answers),) = data().test_dataloader()
    batch = next(iter(data().train_dataloader()))

    def loss(tensors: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(torch.func.functional_call(model.network, tensors, (inputs,)), targets)

    assert row["robustness/loss"] == pytest.approx(loss(params, sums, answers).item(), rel=1e-6)
    assert row["robustness/loss"] == pytest.approx(row["test/loss"], rel=1e-6)
    for bits in (8, 4):
        whole = {name: rounded(p, bits) if p.ndim > 1 else p for name, p in params.items()}
        assert row[f"robustness/loss_{bits}_bit"] == pytest.approx(loss(whole, sums, answers).item(), rel=1e-6)
    generator = torch.Generator().manual_seed(4)
    draws = []
    for _ in range(3):
        noise = {name: torch.randn(p.shape, generator=generator).double() for name, p in params.items()}
        noisy = {
            name: p + 0.2 * noise[name] * p.square().mean().sqrt() if p.ndim > 1 else p for name, p in params.items()
        }
        draws.append(loss(noisy, sums, answers).item())
    spread = torch.tensor(draws, dtype=torch.float64)
    assert row["robustness/loss_noise"] == pytest.approx(spread.mean().item(), rel=1e-6)
    assert row["robustness/loss_noise_error"] == pytest.approx(spread.std().item() / math.sqrt(3), rel=1e-5)

    parts = [param.numel() for param in params.values()]

    def flat(vector: Tensor) -> Tensor:
        tensors = zip(params.items(), vector.split(parts), strict=True)
        return loss({name: part.view_as(p) for (name, p), part in tensors}, *batch)

    here = torch.cat([param.flatten() for param in params.values()])
    top = torch.linalg.eigvalsh(torch.func.hessian(flat)(here))[-1].item()
    assert row["robustness/train_loss"] == pytest.approx(flat(here).item(), rel=1e-6)
    assert row["robustness/hessian_top"] == pytest.approx(top, rel=1e-3)
    moves = [0.3 * part / (part.norm() + 1e-12) for part in torch.func.grad(flat)(here).split(parts)]
    rise = flat(here + torch.cat(moves)) - flat(here)
    assert row["robustness/rise_gradient"] == pytest.approx(rise.item(), rel=1e-5)


def test_the_same_seed_draws_the_same_noise() -> None:
    first, second, other = (values_of_a_test(tiny(), RobustnessProbe(**QUICK, seed=seed)) for seed in (1, 1, 2))
    for row in (first, second, other):
        del row["robustness/probe_seconds"]
    assert first == second
    assert first["robustness/loss_noise"] != other["robustness/loss_noise"]
    assert first["robustness/loss_4_bit"] == other["robustness/loss_4_bit"]


class Images(L.LightningDataModule):
    """Provide the small task's images for training and for the test."""

    def train_dataloader(self) -> Any:
        return small_task.batches()

    test_dataloader = train_dataloader


class Failing(SmallTask):
    """Fail in the evaluation of the given number, as for lack of memory."""

    calls = 0

    def compute_loss(self, batch: Any, metrics: Any) -> Tensor:
        self.calls += metrics is None
        if self.calls == 9:
            raise RuntimeError("out of memory")
        return super().compute_loss(batch, metrics)


@pytest.mark.parametrize("kind", [SmallTask, Failing])
def test_the_network_is_restored_bit_for_bit(kind: type[SmallTask]) -> None:
    """Compare parameters, BatchNorm's statistics, gradients and random states.

    In evaluation mode the loss is the test's, with dropout off and BatchNorm's stored statistics.
    """
    model = kind(0.3, optimizer=adamw)
    L.seed_everything(3)
    states = torch.get_rng_state().tolist()
    with restored(model):
        if kind is Failing:
            with pytest.raises(RuntimeError, match=r"^out of memory$"):
                values_of_a_test(model, RobustnessProbe(**QUICK), Images())
        else:
            row = values_of_a_test(model, RobustnessProbe(**QUICK), Images())
            assert row["robustness/loss"] == pytest.approx(row["test/loss"], rel=1e-5)
            assert row["robustness/loss_noise"] != row["robustness/loss"]
            assert torch.get_rng_state().tolist() == states


def test_fewer_batches_and_no_hessian_are_enough() -> None:
    row = values_of_a_test(
        SmallTask(optimizer=adamw), RobustnessProbe(batches=1, bits=(3,), max_products=0), small_task.batches()
    )
    assert set(row) == {
        "test/loss",
        *(f"robustness/{name}" for name in ("loss", "loss_3_bit", "loss_noise", "loss_noise_error", "probe_seconds")),
    }
    assert row["robustness/loss"] != row["test/loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": 0}, "batches must be at least 1, got 0"),
        ({"noise_draws": 0}, "noise_draws must be at least 1"),
        ({"train_batches": 0}, "train_batches must be at least 1"),
        ({"max_products": -1}, "max_products must be at least 0, got -1"),
        ({"bits": (8, 1)}, "bits must be numbers of at least 2, got 8, 1"),
        ({"noise": 0.0}, r"noise must be above 0, got 0\.0"),
        ({"rho": math.inf}, "rho must be above 0, got inf"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RobustnessProbe(**options)


def test_several_devices_and_absent_training_data_are_refused() -> None:
    several = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"works on one device, not with DDPStrategy: set trainer\.devices to 1"):
        RobustnessProbe().setup(several, tiny(), "fit")
    with pytest.raises(ValueError, match="needs a data module for training batches: give one, or max_products 0"):
        values_of_a_test(SmallTask(optimizer=adamw), RobustnessProbe(), small_task.batches())


def test_the_best_checkpoint_is_probed_by_the_command_and_summarised(tmp_path: Path) -> None:
    robustness = ("--trainer.callbacks+=callbacks.robustness_probe.RobustnessProbe", "--trainer.callbacks.bits", "[4]")
    other = ("--trainer.callbacks.other_data", "datamodules.modular_addition.ModularAdditionData")
    other = (*other, "--trainer.callbacks.other_data.p", "7", "--trainer.callbacks.steps", "3")
    forgetting = ("--trainer.callbacks+=callbacks.forgetting_probe.ForgettingProbe", *other)
    folder = fit(tmp_path, *AGA, *TINY, *robustness, *forgetting, "--test_best", "true")
    found = json.loads((folder / "summary.json").read_text())["test"]
    assert found["robustness/loss"] == found["forgetting/loss_before"] == pytest.approx(found["test/loss"], rel=1e-5)
    assert found["robustness/loss_4_bit"] != found["robustness/loss"]
    assert found["robustness/hessian_top"] > 0 and "robustness/loss_8_bit" not in found
    assert found["forgetting/loss_after"] != found["forgetting/loss_before"]
