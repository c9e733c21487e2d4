"""Runs within a time limit are scheduled, stopped, saved and resumed.

A run that fails costs no other run.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import trial, within_time
from launch.trial import Outcome
from launch.within_time import Part, Schedule, validated
from tests.helpers import processes
from tests.helpers.commands import ADAMW, TINY

EPOCHS = 150  # no run of these tests is to end before it is stopped, unless it is to end


@pytest.fixture(scope="module")
def context() -> Any:
    processes.server()  # its processes begin at once
    return trial.server()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(within_time, "POLLING", 0.05)


def part(runs: Path, epochs: int, total: int = EPOCHS, seed: int = 42, row: str = "grok_adamw", **more: Any) -> Part:
    """Make a part of a tiny run; ``more`` are its options."""
    options = [str(option) for option in (*ADAMW, *TINY)]
    options += ["--runs", str(runs), "--experiment", row, f"--seed_everything={seed}", f"--trainer.max_epochs={total}"]
    options += ["--ckpt_path=last", *(f"--{key}={value}" for key, value in more.items())]
    return Part(row, seed, epochs, total, ("fit", *options), "val/loss", True, 1.0, "grok")


def schedule(
    folder: Path, parts: list[Part], context: Any, seconds: float = 100.0, places: int = 1, **options: Any
) -> Schedule:
    return Schedule(parts, folder / "runs", folder / "logs", context, [{} for _ in range(places)], seconds, **options)


def run_folders(folder: Path) -> list[Path]:
    return sorted((folder / "runs").glob("*/*"))


def status(folder: Path) -> str:
    return str(json.loads((folder / "summary.json").read_text())["status"])


def epochs_logged(folder: Path) -> list[int]:
    with open(folder / "metrics.csv", newline="") as file:
        return [int(row["epoch"]) for row in csv.DictReader(file) if row["val/loss"]]


@pytest.mark.slow
def test_a_part_is_stopped_for_the_next_and_resumed_in_its_folder(tmp_path: Path, context: Any) -> None:
    runs = tmp_path / "runs"
    parts = [part(runs, 5), part(runs, 3, total=3, seed=7), part(runs, EPOCHS)]
    plan = schedule(tmp_path, parts, context)
    plan.run()
    assert all(map(plan.is_done, parts)) and not plan.failed
    first, second = run_folders(tmp_path)
    assert {status(first), status(second)} == {"finished"}
    assert epochs_logged(first) == list(range(EPOCHS))
    # The second run began after the first had been stopped, and before it had gone on.
    logs = [path.name for path in sorted((tmp_path / "logs").iterdir(), key=lambda path: path.stat().st_mtime_ns)]
    assert logs == ["grok_adamw-seed42-0.log", "grok_adamw-seed7-0.log", "grok_adamw-seed42-1.log"]
    assert "stopped by SIGTERM" in (tmp_path / "logs" / logs[0]).read_text()


class FakeTrial:
    """Stand for a run that ends an epoch at each poll.

    It resumes in its folder.
    """

    def __init__(self, context: Any, arguments: Any, log: Path, environment: Any) -> None:
        options = dict(zip(arguments, [*arguments[1:], ""], strict=True))
        self.csv = Path(options["--runs"]) / options["--experiment"] / "2026-01-01_00-00-00-seed42" / "metrics.csv"
        self.log, self.ends = log, False
        if not self.csv.exists():
            self.csv.parent.mkdir(parents=True)
            self.csv.write_text("epoch,val/loss\n")

    @property
    def running(self) -> bool:
        if not self.ends:
            epoch = len(self.csv.read_text().splitlines()) - 1
            with self.csv.open("a") as file:
                file.write(f"{epoch},0.5\n")
        return not self.ends

    def stop(self) -> None:
        assert not self.ends, "a second request would make it leave without saving"
        self.ends = True

    def outcome(self) -> Outcome:
        return Outcome(128 + 15, None, {})


def test_when_the_time_is_up_runs_are_stopped_once_and_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(within_time, "REST", 0.3)
    parts = [part(tmp_path / "runs", 10**6, total=10**6)]
    counts = []
    for _ in range(2):
        plan = schedule(tmp_path, parts, None, seconds=2.0, start_trial=FakeTrial)
        plan.run()
        assert plan.elapsed < 2.0 and not plan.failed and not plan.running
        (folder,) = run_folders(tmp_path)
        assert epochs_logged(folder) == list(range(len(epochs_logged(folder))))
        counts.append(len(epochs_logged(folder)))
    assert 0 < counts[0] < counts[1]


@pytest.mark.slow
def test_when_the_time_is_up_everything_is_saved_and_can_be_resumed(
    tmp_path: Path, context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(within_time, "SAVING", 3.0)
    monkeypatch.setattr(within_time, "REST", 0.5)
    parts = [part(tmp_path / "runs", 10**6, total=10**6)]
    counts = []
    for _ in range(2):
        plan = schedule(tmp_path, parts, context, seconds=12.0)
        plan.run()
        assert plan.elapsed < 12.0 and not plan.failed and not plan.running
        (folder,) = run_folders(tmp_path)
        assert status(folder) == "interrupted"
        saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        logged = epochs_logged(folder)
        assert logged == list(range(len(logged)))
        assert saved["epoch"] + 1 >= len(logged)
        counts.append(len(logged))
    assert 0 < counts[0] < counts[1]


@pytest.mark.slow
def test_a_row_that_fails_is_reported_and_costs_no_other(
    tmp_path: Path, context: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    bad = [part(runs, 2, total=2, seed=seed, row="bad", **{"data.train_fraction": 2}) for seed in (0, 1)]
    good = [part(runs, 2, total=2, seed=seed) for seed in (0, 1)]
    plan = schedule(tmp_path, [bad[0], *good, bad[1]], context)
    plan.run()
    assert list(plan.failed) == ["bad"]
    assert all(map(plan.is_done, good))
    assert len(list((tmp_path / "logs").glob("bad-*"))) == 1  # another seed would fail as well
    assert "bad seed 0: FAILED: error: " in capsys.readouterr().out


def test_a_run_that_ends_early_by_itself_is_not_begun_again(
    tmp_path: Path, context: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    stops = part(tmp_path / "runs", 50, total=50, **{"trainer.max_steps": 20})
    plan = schedule(tmp_path, [stops], context)
    plan.run()
    assert len(list((tmp_path / "logs").iterdir())) == 1
    assert not plan.failed and not plan.is_done(stops)
    assert "grok_adamw seed 42: ended by itself after epoch" in capsys.readouterr().out


def test_an_error_while_a_run_saves_is_reported(tmp_path: Path) -> None:
    class FullDisk(Deaf):
        def stop(self) -> None:
            self.running = False
            self.log.parent.mkdir(parents=True)
            self.log.write_text("error: the disk is full")

        def outcome(self) -> Outcome:
            return Outcome(1, None, {})

    ends: list[int] = []
    plan = schedule(
        tmp_path, [part(tmp_path, 1)], None, seconds=1.0, ended=lambda: ends.append(1), start_trial=FullDisk
    )
    plan.run()
    assert list(plan.failed) == ["grok_adamw"]
    assert ends == [1]


class Deaf:
    """Stand for a process that ignores requests to stop."""

    def __init__(self, context: Any, arguments: Any, log: Path, environment: Any) -> None:
        self.running, self.log = True, log

    def stop(self) -> None:
        pass

    def kill(self) -> None:
        self.running = False

    def outcome(self) -> Outcome:
        return Outcome(-1, None, {})


@pytest.mark.slow
def test_a_run_that_does_not_save_in_time_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(within_time, "REST", 0.3)
    plan = schedule(tmp_path, [part(tmp_path, 1)], None, seconds=2.0, start_trial=Deaf)
    plan.run()
    assert 1.6 < plan.elapsed < 2.0
    assert not plan.running
    assert "did not save in time" in capsys.readouterr().out


def test_the_time_left_is_that_of_all_parts_at_the_pace_of_their_task(tmp_path: Path) -> None:
    def of(row: str, epochs: int, cost: float, task: str = "grok") -> Part:
        return Part(row, 1, epochs, 10, (), "val/loss", True, cost, task)

    parts = [of("base", 3, 1.0), of("sync", 4, 2.0), of("base", 10, 1.0), of("other", 5, 1.0, "else")]
    plan = schedule(tmp_path, parts, None, places=2)
    plan.values["base", 1] = [1.0] * 2
    plan.seconds_an_epoch["base"] = 6.0
    assert plan.remaining_seconds() is None  # no time of the other kind is known
    plan.failed["other"] = tmp_path
    # 8 epochs of base are left, not one as well for its first part; sync's are guessed at twice the seconds.
    assert plan.remaining_seconds() == (8 * 6.0 + 4 * 12.0) / 2
    plan.seconds_an_epoch["sync"] = 10.0
    assert plan.remaining_seconds() == (8 * 6.0 + 4 * 10.0) / 2


def test_epochs_are_read_from_the_newest_run_and_while_it_is_written(tmp_path: Path) -> None:
    planned = part(tmp_path, 5)
    assert validated(tmp_path, planned) == []

    def write(name: str, lines: Iterator[str] | list[str]) -> None:
        folder = tmp_path / planned.row / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.csv").write_text("\n".join(["epoch,train/loss,val/loss", *lines]))

    write("2026-01-01_00-00-00-seed42", ["0,1,", "0,,3.5", "1,,2.5"])
    assert validated(tmp_path, planned) == [3.5, 2.5]
    write("2026-01-02_00-00-00-seed42", ["0,1,", "0,,4.5", "1,"])
    assert validated(tmp_path, planned) == [4.5]
    assert validated(tmp_path, part(tmp_path, 5, seed=4)) == []
