import functools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.cost_counters import CostCounters
from callbacks.last_checkpoint import LastCheckpoint
from datamodules.batches import TensorBatches
from datamodules.modular_addition import ModularAdditionData
from modules.modular_addition import ModularAddition
from tests.callbacks.fits import adamw, ars2, data, fit, module, rows
from tests.helpers.marks import slow

COSTS = {"cost/optimizer_steps", "cost/gradient_evaluations", "cost/examples", "cost/training_seconds", "cost/flops"}
# Of a network of fits.module(): products of one example forward, query, keys, values and output, MLP, unembedding;
# backward makes two such for each.
FLOPS = 3 * (2 * 16 * 16 * (1 + 3 + 3 + 1) + 2 * 16 * 32 * 2 + 2 * 16 * 8)


def test_every_row_has_the_costs(tmp_path: Path) -> None:
    fit(module(ars2("sync")), data(), [CostCounters()], tmp_path, epochs=3, num_sanity_val_steps=2)
    logged = rows(tmp_path)
    assert len(logged) == 6
    for row in logged:
        epochs = row["epoch"] + 1
        counts = row["cost/optimizer_steps"], row["cost/gradient_evaluations"], row["cost/examples"]
        assert counts == (4 * epochs, 8 * epochs, 29 * epochs)
    seconds = [row["cost/training_seconds"] for row in logged]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_accumulation_counts_updates_and_all_examples(tmp_path: Path) -> None:
    fit(module(adamw, accumulate_grad_batches=3), data(), [CostCounters()], tmp_path, epochs=2)
    last = rows(tmp_path)[-1]
    counts = last["cost/optimizer_steps"], last["cost/gradient_evaluations"], last["cost/examples"]
    assert counts == (4, 4, 58)


@pytest.mark.parametrize(("optimizer", "passes"), [(adamw, 1), (ars2("base"), 1), (ars2("sync"), 2)])
@pytest.mark.parametrize("window", [1, 3])
def test_flops_are_those_of_every_pass_and_of_the_optimizer(
    optimizer: Any, passes: int, window: int, tmp_path: Path
) -> None:
    counters = CostCounters()
    fit(module(optimizer, accumulate_grad_batches=window), data(), [counters], tmp_path, epochs=2)
    assert counters.flops_per_example == FLOPS
    assert (counters.flops_per_update > 0) == (optimizer is not adamw)
    updates = 2 * -(-4 // window)
    expected = FLOPS * passes * 58 + counters.flops_per_update * updates
    assert rows(tmp_path)[-1]["cost/flops"] == pytest.approx(expected, rel=1e-12)


class CompiledDescent(torch.optim.SGD):
    """Stand for a user's optimizer whose update is compiled in one graph."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        closure()
        matrices = [param for group in self.param_groups for param in group["params"] if param.ndim == 2]
        with torch.no_grad():
            torch.compile(descend, fullgraph=True)(matrices, [matrix.grad for matrix in matrices])


def descend(matrices: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
    for matrix, gradient in zip(matrices, gradients, strict=True):
        matrix -= 0.01 * gradient @ gradient.T @ gradient


@pytest.mark.parametrize(
    ("compiled", "plain"),
    [
        slow(ars2("sync", compile=True), ars2("sync")),
        (functools.partial(CompiledDescent, lr=0.1), None),
    ],
)
def test_a_compiled_optimizer_is_counted_as_one_that_is_not(
    compiled: Any, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    counters = CostCounters()
    fit(module(compiled), data(), [counters], None, epochs=1)
    assert counters.flops_per_example == FLOPS
    assert counters.flops_per_update > 0
    # From the second update on it is compiled.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    if plain is not None:
        uncompiled = CostCounters()
        fit(module(plain), data(), [uncompiled], None, epochs=1)
        assert counters.flops_per_update == uncompiled.flops_per_update


@pytest.mark.parametrize("optimizer", [adamw, ars2("aga", k=3)])
def test_counting_changes_no_weight(optimizer: Any) -> None:
    weights = []
    for callbacks in ([], [CostCounters()]):
        trainer = fit(module(optimizer), data(), callbacks, None, epochs=2)
        weights.append(torch.cat([p.detach().flatten() for p in trainer.lightning_module.parameters()]))
    assert weights[0].equal(weights[1])


def test_an_error_in_the_watched_step_leaves_no_watch_behind(tmp_path: Path) -> None:
    class Fails(ModularAddition):
        def compute_loss(self, batch: Any, metrics: Any) -> torch.Tensor:
            raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        fit(module(kind=Fails), data(), [CostCounters()], tmp_path, epochs=1)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_large_counts_are_logged_to_the_unit(tmp_path: Path) -> None:
    counters = CostCounters()
    counters.examples = 2**24
    fit(module(), data(), [counters], tmp_path, epochs=1)
    # Odd above 2**24: single precision would round it.
    assert {row["cost/examples"] for row in rows(tmp_path)} == {2**24 + 29}


class SlowOutsideTraining(ModularAddition):
    """Take time to validate and to save."""

    def validation_step(self, batch: Any, batch_index: int) -> None:
        time.sleep(0.2)
        super().validation_step(batch, batch_index)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        time.sleep(0.2)
        super().on_save_checkpoint(checkpoint)


class SlowToCome(ModularAdditionData):
    """Deliver training batches after a delay."""

    def train_dataloader(self) -> TensorBatches:
        class Batches(TensorBatches):
            def __iter__(self) -> Any:
                for batch in super().__iter__():
                    time.sleep(0.02)
                    yield batch

        dataloader = super().train_dataloader()
        return Batches(dataloader.tensors, dataloader.batch_size, dataloader.seed)


# Lightning's advice on saving within an epoch does not apply to this training step.
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_seconds_include_waiting_for_data_but_not_evaluation_and_saving(tmp_path: Path) -> None:
    counters, folder = CostCounters(), str(tmp_path / "saved")
    saving = [LastCheckpoint(1, folder), ModelCheckpoint(folder, every_n_train_steps=5, filename="step")]
    model = module(kind=SlowOutsideTraining)
    begin = time.perf_counter()
    trainer = fit(
        *(model, data(SlowToCome), [counters, *saving], tmp_path, 2),
        enable_checkpointing=True,
        num_sanity_val_steps=1,
    )
    wall = time.perf_counter() - begin
    # Eight batches to wait for, one of them while a save stopped the clock; three validations and three saves.
    assert 7 * 0.02 <= counters.training_seconds <= wall - 6 * 0.2
    logged = rows(tmp_path)[-1]["cost/training_seconds"]
    assert logged == counters.training_seconds == counters.costs(trainer, model)["cost/training_seconds"]


def test_the_clock_stops_at_an_epochs_end_without_validation(tmp_path: Path) -> None:
    counters, saving = CostCounters(), LastCheckpoint(1, str(tmp_path / "saved"))
    model = module(kind=SlowOutsideTraining)
    trainer = fit(model, data(), [counters, saving], tmp_path, 2, enable_checkpointing=True, limit_val_batches=0)
    logged = rows(tmp_path)[-1]["cost/training_seconds"]
    assert logged == counters.costs(trainer, model)["cost/training_seconds"] > 0


def test_resumed_costs_continue(tmp_path: Path) -> None:
    saving = LastCheckpoint(every_n_epochs=1, dirpath=str(tmp_path / "saved"))
    fit(module(ars2("sync")), data(), [CostCounters(), saving], tmp_path / "a", 2, enable_checkpointing=True)
    path = str(tmp_path / "saved" / "last.ckpt")
    before = torch.load(path, weights_only=True)["callbacks"]["CostCounters"]
    assert before["training_seconds"] == rows(tmp_path / "a")[-1]["cost/training_seconds"]
    fit(module(ars2("sync")), data(), [CostCounters()], tmp_path / "b", 3, ckpt_path=path)
    first = rows(tmp_path / "b")[0]
    assert first.keys() >= COSTS
    assert first["cost/examples"] == 3 * 29
    assert first["cost/gradient_evaluations"] == 3 * 8
    assert first["cost/training_seconds"] > before["training_seconds"]
    assert first["cost/flops"] == pytest.approx(1.5 * before["flops"], rel=1e-12)
