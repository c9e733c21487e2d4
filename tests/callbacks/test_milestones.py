import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar

from callbacks.last_checkpoint import LastCheckpoint
from callbacks.milestones import THRESHOLDS, GrokkingMilestones, Milestones, passed
from experiment.target import Target
from tests.callbacks.fits import MemorisedSums, ars2, data, fit, module, rows

LIMITS = {
    **{"train_loss_0.5": ("train/loss", 0.5), "train_loss_0.1": ("train/loss", 0.1), "fit": ("train/accuracy", 0.99)},
    **{"val_10": ("val/accuracy", 0.1), "val_50": ("val/accuracy", 0.5), "val_80": ("val/accuracy", 0.8)},
    **{"grok": ("val/accuracy", 0.9), "val_95": ("val/accuracy", 0.95), "converge": ("val/accuracy", 0.98)},
    "full": ("val/accuracy", 0.99),
}


def first_epochs(folder: Path) -> dict[str, int]:
    """Find in the log when each threshold was first passed.

    It reads the epoch column of the log; 1 is the first epoch.
    """
    found = {}
    for name, (key, limit) in LIMITS.items():
        for row in rows(folder, having=key):
            if row[key] < limit if key == "train/loss" else row[key] >= limit:
                found[name] = int(row["epoch"]) + 1
                break
    return found


def test_the_epochs_are_those_of_the_log_and_training_stops_at_full(tmp_path: Path) -> None:
    milestones = GrokkingMilestones()
    trainer = fit(module(ars2("sync")), data(MemorisedSums), [milestones], tmp_path, epochs=150)
    expected = first_epochs(tmp_path)
    assert {name: at["epoch"] for name, at in milestones.reached.items()} == expected
    assert {"val_10", "val_50", "val_80", "grok", "val_95", "converge", "full"} <= expected.keys()
    assert len(set(expected.values())) >= 4
    for at in milestones.reached.values():
        # 29 sums at 8 a batch are 4 steps an epoch, each of two gradients.
        assert (at["optimizer_steps"], at["gradient_evaluations"]) == (4 * at["epoch"], 8 * at["epoch"])
    assert trainer.current_epoch == expected["full"] < 150
    for name, epoch in expected.items():
        logged = rows(tmp_path, having=f"milestone/{name}")
        assert [(row["epoch"] + 1, row[f"milestone/{name}"]) for row in logged] == [(epoch, epoch)]


def test_resumed_between_two_milestones_none_is_lost_or_repeated(tmp_path: Path) -> None:
    # One batch an epoch, so that the order of the examples does not matter.
    model, sums = module(), data(MemorisedSums, batch_size=29)
    uninterrupted = GrokkingMilestones()
    fit(model, sums, [uninterrupted], tmp_path / "uninterrupted", epochs=200)
    half_way = uninterrupted.reached["val_80"]["epoch"]
    assert uninterrupted.reached["val_10"]["epoch"] < half_way < uninterrupted.reached["full"]["epoch"]

    saved = LastCheckpoint(every_n_epochs=1000, dirpath=str(tmp_path))
    fit(module(), sums, [GrokkingMilestones(), saved], tmp_path / "a", epochs=half_way, enable_checkpointing=True)
    resumed = GrokkingMilestones()
    fit(module(), sums, [resumed], tmp_path / "b", epochs=200, ckpt_path=str(tmp_path / "last.ckpt"))
    assert resumed.reached == uninterrupted.reached
    assert rows(tmp_path / "b", having="train/loss")[0]["epoch"] == half_way
    assert not any("milestone/val_10" in row for row in rows(tmp_path / "b"))


def test_a_run_that_has_stopped_trains_no_further_when_resumed(tmp_path: Path) -> None:
    saved = LastCheckpoint(dirpath=str(tmp_path))
    first = fit(
        module(),
        data(MemorisedSums),
        [GrokkingMilestones("val_50"), saved],
        tmp_path / "a",
        epochs=100,
        enable_checkpointing=True,
    )
    again = fit(
        *(module(), data(MemorisedSums), [GrokkingMilestones("val_50")], tmp_path / "b"),
        epochs=100,
        ckpt_path=str(tmp_path / "last.ckpt"),
    )
    assert 0 < first.global_step == again.global_step < 400


def test_a_validation_counts_in_its_epoch_only() -> None:
    model = module()
    fit(model, data(MemorisedSums), [GrokkingMilestones()], None, epochs=200)
    earlier = model.gradient_evaluations
    # Parameters no longer change: training passes at once, validation where it runs; a sanity check does not count.
    model.make_optimizer = functools.partial(torch.optim.SGD, lr=0.0)
    milestones = GrokkingMilestones()
    fit(model, data(MemorisedSums), [milestones], None, 4, check_val_every_n_epoch=3, num_sanity_val_steps=2)
    assert milestones.reached["fit"] == {"epoch": 1, "optimizer_steps": 4, "gradient_evaluations": earlier + 4}
    assert milestones.reached["full"]["epoch"] == 3


def test_without_a_stop_all_epochs_are_trained() -> None:
    milestones = GrokkingMilestones(stop_at=None)
    trainer = fit(module(), data(MemorisedSums), [milestones], None, epochs=60)
    assert "full" in milestones.reached
    assert trainer.current_epoch == 60


def test_one_not_reached_is_reported_with_the_steps_made() -> None:
    milestones = GrokkingMilestones()
    trainer = fit(module(), data(), [milestones], None, epochs=2)
    report = milestones.report(trainer.global_step)
    assert list(report) == list(LIMITS)
    assert report["full"]["text"] == "not within 8 steps"
    assert report["full"]["epoch"] is None


def test_the_progress_bar_names_the_last_milestone() -> None:
    bar, milestones = RichProgressBar(), GrokkingMilestones(stop_at="val_50")
    model = module()
    trainer = fit(model, data(MemorisedSums), [bar, milestones], None, epochs=100, enable_progress_bar=True)
    assert bar.get_metrics(trainer, model)["milestone"] == f"val_50@{trainer.current_epoch}"


@pytest.mark.parametrize("threshold", THRESHOLDS, ids=lambda threshold: threshold.name)
def test_a_threshold_is_exact_in_single_precision(threshold: Target) -> None:
    key, limit = LIMITS[threshold.name]
    at = torch.tensor(limit, dtype=torch.float32)
    below, above = torch.nextafter(at, torch.tensor(0.0)), torch.nextafter(at, torch.tensor(1.0))
    assert [passed(threshold, value) for value in (below, at, above)] == (
        [True, False, False] if key == "train/loss" else [False, True, True]
    )


def test_an_unknown_milestone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stop_at must be null or one of .*converge, full, got 'half'"):
        GrokkingMilestones(stop_at="half")


def test_a_task_sets_its_own_milestones() -> None:
    limits = {"half": "val/accuracy >= 0.5", "fit": "train/loss < 0.5", "never": "val/accuracy < -1"}
    milestones = Milestones(limits, stop_at="half")
    trainer = fit(module(), data(MemorisedSums), [milestones], None, epochs=100)
    report = milestones.report(trainer.global_step)
    assert {name: row["threshold"] for name, row in report.items()} == limits
    assert report["half"]["epoch"] == trainer.current_epoch < 100
    assert milestones.stopped and milestones.reached.keys() <= {"half", "fit"}


@pytest.mark.parametrize("text", ["val/accuracy > 0.9", "0.9", "val/loss < 1e", 0.9])
def test_a_threshold_that_cannot_be_read_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=r"a metric, >= or <, and a number, such as 'val/loss < 0.2'; got"):
        Milestones({"good": text})


def test_a_metric_that_is_not_logged_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="good reads val/acuracy, which is not logged; did you mean val/accuracy"):
        fit(module(), data(), [Milestones({"good": "val/acuracy >= 0.9"})], None, epochs=2)


def test_an_epoch_that_is_cut_short_lacks_no_metric() -> None:
    trainer = fit(module(), data(), [GrokkingMilestones()], None, epochs=2, max_steps=3, val_check_interval=0.5)
    assert trainer.global_step == 3 and "val/accuracy" in trainer.callback_metrics
