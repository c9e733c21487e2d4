import functools
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor

from ars2 import Muon
from callbacks.cost_counters import CostCounters
from callbacks.last_checkpoint import LastCheckpoint
from callbacks.optimizer_internals import OptimizerInternals
from modules.modular_addition import ModularAddition
from tests.callbacks.fits import adamw, ars2, data, fit, module, rows

MEASURED = "optimizer/gradient_norm"


class Witness(L.Callback):
    """Measure every batch separately, in double precision.

    It compares the values before and after the complete training step.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_index: int) -> None:
        self.before = [parameter.detach().double() for parameter in pl_module.network.parameters()]
        loss = pl_module.compute_loss(batch, None)
        self.first = flat(torch.autograd.grad(loss, list(pl_module.network.parameters())))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        second = flat([parameter.grad for parameter in pl_module.network.parameters()])
        cosine = self.first @ second / (self.first.norm() * second.norm())
        self.seen = {MEASURED: second.norm().item(), "flatness/gradient_cosine": cosine.item()}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        now = [parameter.detach().double() for parameter in pl_module.network.parameters()]
        for track, is_matrix in (("matrix", True), ("vector", False)):
            # The network's vectors are its biases.
            chosen = [(a, b) for a, b in zip(now, self.before, strict=True) if (a.ndim > 1) == is_matrix]
            update, weights = flat([a - b for a, b in chosen]), flat([b for _, b in chosen])
            self.seen[f"optimizer/update_rms_{track}"] = update.square().mean().sqrt().item()
            ratio = update.norm() / weights.norm()
            self.seen[f"optimizer/update_ratio_{track}"] = ratio.item()
        optimizer: Any = trainer.optimizers[0]
        self.diagnostics = optimizer.diagnostics() if hasattr(optimizer, "diagnostics") else {}
        self.rows.append(self.seen | {f"diagnostics/{name}": value for name, value in self.diagnostics.items()})


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.1),
    "adamw": functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.5),
    "muon": functools.partial(Muon, lr=0.01),
    **{mode: ars2(mode) for mode in ("base", "sync")},
    "aga": ars2("aga", k=3, phi_lambda=0.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_values_are_those_of_an_independent_measurement(name: str, tmp_path: Path) -> None:
    witness = Witness()
    fit(module(OPTIMIZERS[name]), data(), [witness, OptimizerInternals(1)], tmp_path, epochs=3)
    logged = rows(tmp_path, having=MEASURED)
    assert len(logged) == len(witness.rows) == 12
    for index, (row, truth) in enumerate(zip(logged, witness.rows, strict=True)):
        assert (row["step"], row["epoch"]) == (index, index // 4)
        gradients_evaluated = truth.get("diagnostics/gradient_evaluations", 0) - (
            witness.rows[index - 1].get("diagnostics/gradient_evaluations", 0) if index else 0
        )
        assert ("flatness/gradient_cosine" in row) == (gradients_evaluated == 2)
        for key in set(truth) & set(row):
            # Biases begin at zero: the ratio to nothing is infinite.
            assert row[key] == pytest.approx(truth[key], rel=1e-4, nan_ok=True), key
        assert row.keys() >= set(truth) - {"flatness/gradient_cosine"} - {k for k in truth if k.startswith("diagnos")}
        for key in ("phi", "phi_deviation", "threshold", "alpha", "effective_k"):
            value = truth.get(f"diagnostics/{key}", math.inf)
            assert row.get(f"flatness/{key}", math.inf) == value
            # Loggers see no infinity.
            assert row.get(f"flatness/{key}") != math.inf
    second_passes = {"sgd": 0, "adamw": 0, "muon": 0, "base": 0, "sync": 12}
    count = sum("flatness/gradient_cosine" in row for row in logged)
    assert count == second_passes[name] if name in second_passes else 0 < count < 12


def test_an_sgd_update_is_the_learning_rate_times_the_gradient(tmp_path: Path) -> None:
    model = module(functools.partial(torch.optim.SGD, lr=0.25))
    fit(model, data(), [OptimizerInternals(1)], tmp_path, epochs=1)
    matrix = sum(p.numel() for p in model.network.parameters() if p.ndim > 1)
    vector = sum(p.numel() for p in model.network.parameters() if p.ndim == 1)
    for row in rows(tmp_path, having=MEASURED):
        rms_matrix, rms_vector = row["optimizer/update_rms_matrix"], row["optimizer/update_rms_vector"]
        update = math.sqrt(matrix * rms_matrix**2 + vector * rms_vector**2)
        assert update == pytest.approx(0.25 * row[MEASURED], rel=1e-4)


def test_the_gradient_norm_is_that_before_clipping(tmp_path: Path) -> None:
    norms = []
    for limit in (None, 1e-3):
        model = module(functools.partial(torch.optim.SGD, lr=1.0), gradient_clip_val=limit)
        fit(model, data(), [OptimizerInternals(1)], tmp_path / str(limit), epochs=1)
        norms.append(rows(tmp_path / str(limit), having=MEASURED)[0])
    assert norms[0][MEASURED] == norms[1][MEASURED] > 0.1
    assert norms[1]["optimizer/update_rms_matrix"] < 1e-3 < norms[0]["optimizer/update_rms_matrix"]


def test_rows_come_every_n_updates_and_share_lightnings_steps(tmp_path: Path) -> None:
    model = module(adamw, accumulate_grad_batches=2)
    fit(model, data(), [OptimizerInternals(4), CostCounters()], tmp_path, epochs=4)
    # Two updates an epoch: the fourth and eighth end the second and fourth epoch, whose last batches are 7 and 15.
    measured = rows(tmp_path, having=MEASURED)
    assert [row["step"] for row in measured] == [7, 15]
    assert [row["step"] for row in rows(tmp_path, having="val/loss")] == [3, 7, 11, 15]
    assert [row["cost/optimizer_steps"] for row in measured] == [4, 8]
    assert [row["cost/examples"] for row in measured] == [58, 116]


def test_the_trigger_rate_is_over_the_steps_since_the_last_row_also_when_resumed(tmp_path: Path) -> None:
    saving, optimizer = LastCheckpoint(dirpath=str(tmp_path)), ars2("periodic", k=4)
    fit(module(optimizer), data(), [OptimizerInternals(2), saving], tmp_path / "a", 1, enable_checkpointing=True)
    path = str(tmp_path / "last.ckpt")
    fit(module(optimizer), data(), [OptimizerInternals(2)], tmp_path / "b", 3, ckpt_path=path)
    # Second passes in steps 1, 5, 9; rows after every other step.
    assert [row["flatness/trigger_rate"] for row in rows(tmp_path / "a", having=MEASURED)] == [0.5, 0]
    assert [row["flatness/trigger_rate"] for row in rows(tmp_path / "b", having=MEASURED)] == [0.5, 0, 0.5, 0]
    assert [row["step"] for row in rows(tmp_path / "b", having=MEASURED)] == [5, 7, 9, 11]


def test_measuring_does_not_change_the_weights(tmp_path: Path) -> None:
    results = []
    for callbacks in ([], [OptimizerInternals(1)]):
        model = module(ars2("sync"))
        fit(model, data(), callbacks, tmp_path / str(len(callbacks)), epochs=2)
        results.append(flat(model.network.parameters()))
    assert torch.equal(*results)


def test_without_a_vector_track_its_columns_are_missing(tmp_path: Path) -> None:
    class NoBiases(ModularAddition):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            for name in ("mlp_in", "mlp_out"):
                self.network.get_submodule(name).register_parameter("bias", None)

    fit(module(adamw, kind=NoBiases), data(), [OptimizerInternals(2)], tmp_path, epochs=1)
    for row in rows(tmp_path, having=MEASURED):
        assert "optimizer/update_rms_matrix" in row
        assert "optimizer/update_rms_vector" not in row


def test_a_period_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        OptimizerInternals(every_n_steps=0)
