import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import StepLR

from callbacks.cost_counters import CostCounters
from callbacks.last_checkpoint import LastCheckpoint
from callbacks.milestones import GrokkingMilestones
from callbacks.optimizer_internals import OptimizerInternals
from callbacks.run_summary import RunSummary
from tests.callbacks.fits import MemorisedSums, ars2, data, fit, module
from tests.helpers.resuming import differences


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def test_it_is_of_the_end_of_training_between_two_periods(tmp_path: Path) -> None:
    model = module()
    fit(model, data(), [LastCheckpoint(2, str(tmp_path))], None, epochs=5, enable_checkpointing=True)
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "last-previous.ckpt"}
    assert load(tmp_path / "last-previous.ckpt")["global_step"] == 16
    saved = load(tmp_path / "last.ckpt")
    assert saved["global_step"] == 20
    for name, tensor in model.state_dict().items():
        assert torch.equal(saved["state_dict"][name], tensor)


def test_it_is_of_the_end_of_training_when_stopped_early(tmp_path: Path) -> None:
    callbacks = [LastCheckpoint(1000, str(tmp_path)), GrokkingMilestones("val_50")]
    trainer = fit(module(), data(MemorisedSums), callbacks, None, epochs=100, enable_checkpointing=True)
    assert load(tmp_path / "last.ckpt")["global_step"] == trainer.global_step < 400


@pytest.mark.parametrize("begins_at", [0, 5])
def test_training_ended_by_max_steps_within_an_epoch_resumes_exactly(begins_at: int, tmp_path: Path) -> None:
    # Four steps an epoch: the sixth is the second of the second one, and fits of three epochs make twelve. Where the
    # fit that ends there begins at the fifth, its first step is its last.
    def trained(folder: str, max_steps: int, path: str | None) -> dict[str, Any]:
        model = module(ars2("aga", phi_lambda=0.1), scheduler=functools.partial(StepLR, step_size=1))
        saving = LastCheckpoint(1, str(tmp_path / folder))
        fit(model, data(), [saving], None, 3, path, enable_checkpointing=True, max_steps=max_steps)
        return load(tmp_path / folder / "last.ckpt")

    path = None
    for limit in (begins_at, 6):
        if limit:
            saved = trained(f"{limit}", limit, path)
            path = str(tmp_path / f"{limit}" / "last.ckpt")
            assert saved["global_step"] == limit
    uninterrupted, resumed = trained("uninterrupted", -1, None), trained("resumed", -1, path)
    assert resumed["global_step"] == 12
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "epoch"):
        assert list(differences(resumed[key], uninterrupted[key])) == [], key


def test_a_second_fit_with_the_same_callback_is_saved_too(tmp_path: Path) -> None:
    saving = LastCheckpoint(1000, str(tmp_path))
    for _ in range(2):
        fit(module(), data(), [saving], None, 9, enable_checkpointing=True, max_steps=3)
        (tmp_path / "last.ckpt").unlink()


def test_an_interrupted_run_leaves_the_last_period(tmp_path: Path) -> None:
    class Fails(CostCounters):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 3:
                raise RuntimeError("the power is gone")

    with pytest.raises(RuntimeError, match="power"):
        fit(module(), data(), [LastCheckpoint(2, str(tmp_path)), Fails()], None, epochs=5, enable_checkpointing=True)
    assert load(tmp_path / "last.ckpt")["global_step"] == 8


def test_every_callback_is_in_it_and_read_by_the_safe_loader(tmp_path: Path) -> None:
    callbacks = [GrokkingMilestones(), CostCounters(), OptimizerInternals(1), RunSummary()]
    saving = LastCheckpoint(dirpath=str(tmp_path / "saved"))
    fit(module(ars2("aga")), data(), [*callbacks, saving], tmp_path / "run", 2, enable_checkpointing=True)
    states = load(tmp_path / "saved" / "last.ckpt")["callbacks"]
    assert {type(callback).__name__ for callback in callbacks} < states.keys()


def test_a_period_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="every_n_epochs must be at least 1, got 0"):
        LastCheckpoint(every_n_epochs=0)


def test_steps_in_between_are_saved_where_their_windows_end(tmp_path: Path) -> None:
    saved = []

    class SavedSteps(CostCounters):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if (tmp_path / "last.ckpt").exists():
                saved.append(load(tmp_path / "last.ckpt")["global_step"])

    # Four batches an epoch; windows of three and one, two updates an epoch.
    model = module(ars2("sync"), accumulate_grad_batches=3)
    callbacks = [LastCheckpoint(1000, str(tmp_path), every_n_steps=1), SavedSteps()]
    fit(model, data(), callbacks, None, epochs=2, enable_checkpointing=True)
    assert saved == [1, 2, 2, 2, 3]
    assert load(tmp_path / "last.ckpt")["global_step"] == 4
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, or null, got 0"):
        LastCheckpoint(every_n_steps=0)


def test_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / "best.ckpt.partial").write_bytes(b"half of it")
    fit(module(), data(), [LastCheckpoint(1, str(tmp_path))], None, epochs=1, enable_checkpointing=True)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
