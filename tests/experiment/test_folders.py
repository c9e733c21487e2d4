"""Find the run to resume.

It has the same options, is the newest that is not finished, and is locked by no other process.
"""

import json
import time
from pathlib import Path

import pytest

from experiment.folders import RunFolder, find_runs, find_unfinished, lock, unlock_all
from tests.helpers.commands import AGA, TINY, folders
from tests.helpers.processes import begin, server
from tests.helpers.resuming import fit, only_folder

CONFIG = {"seed_everything": 1, "model": {"lr": 0.1}}


def run(
    parent: Path, name: str, status: str | None = None, config: str = "seed_everything: 1\nmodel: {lr: 0.1}"
) -> Path:
    folder = parent / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    if status is not None:
        (folder / "summary.json").write_text(json.dumps({"status": status}))
    return folder


@pytest.fixture(autouse=True)
def released() -> None:
    unlock_all()


def test_the_newest_unfinished_run_is_resumed(tmp_path: Path) -> None:
    run(tmp_path, "2026-01-01_00-00-00-seed1")
    run(tmp_path, "2026-01-02_00-00-00-seed1", "interrupted")
    newest = run(tmp_path, "2026-01-02_00-00-00-seed1-1", "interrupted")
    run(tmp_path, "2026-01-03_00-00-00-seed1", "finished")
    run(tmp_path, "2026-01-04_00-00-00-seed1", "stopped early (milestone)")
    run(tmp_path, "2026-01-05_00-00-00-seed10", config="seed_everything: 10\nmodel: {lr: 0.1}")
    assert find_unfinished(tmp_path, CONFIG) == RunFolder(newest)


@pytest.mark.parametrize(
    "config",
    [
        "seed_everything: 1\nmodel: {lr: 0.2}",
        "seed_everything: 2\nmodel: {lr: 0.1}",
        "seed_everything: 1\nmodel: {lr: 0.1}\ntrainer: {}",
        "seed_everything: 1\nmodel: {lr",
        "",
        "- 1",
    ],
)
def test_a_run_of_other_options_is_not_resumed(config: str, tmp_path: Path) -> None:
    run(tmp_path, "2026-01-01_00-00-00-seed1", config=config)
    (tmp_path / "2026-01-02_00-00-00-seed1").mkdir()
    (tmp_path / "2026-01-03_00-00-00-seed1").write_text("a file")
    assert find_unfinished(tmp_path, CONFIG) is None
    assert find_unfinished(tmp_path / "nowhere", CONFIG) is None


def test_options_of_resuming_make_no_other_run(tmp_path: Path) -> None:
    written = "seed_everything: 1\nmodel: {lr: 0.1}\nckpt_path: x.ckpt\nweights_only: true"
    folder = run(tmp_path, "2026-01-01_00-00-00-seed1", config=written)
    assert find_unfinished(tmp_path, {**CONFIG, "ckpt_path": "last"}) == RunFolder(folder)


def test_many_runs_of_one_second_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    made = [RunFolder(run(tmp_path, f"2026-01-01_00-00-00-seed{seed}")) for seed in ("1", "1-2", "1-10")]
    assert find_runs(tmp_path, CONFIG) == made[::-1]


def locked_elsewhere(folder: str, answers: object) -> None:
    answers.put(lock(Path(folder)))  # type: ignore[attr-defined]
    answers.get()  # type: ignore[attr-defined]


def test_a_run_locked_by_another_process_is_not_resumed(tmp_path: Path) -> None:
    older, newer = (run(tmp_path, f"2026-01-0{day}_00-00-00-seed1") for day in (1, 2))
    context = server()
    answers = context.Queue()
    process = context.Process(target=locked_elsewhere, args=(str(newer), answers))
    process.start()
    assert answers.get() is True
    assert not lock(newer)
    assert find_unfinished(tmp_path, CONFIG) == RunFolder(older)
    unlock_all()
    process.kill()
    process.join()
    # The lock of a killed process is released.
    assert find_unfinished(tmp_path, CONFIG) == RunFolder(newer)


def test_the_same_command_twice_at_once_makes_two_runs(tmp_path: Path) -> None:
    options = (*AGA, *TINY, "--trainer.max_epochs", "2000", "--trainer.callbacks", "null")
    command = ["fit", *options, "--runs", str(tmp_path / "runs"), "--ckpt_path", "last"]
    processes = []
    for number in (1, 2):
        processes.append(begin(command, tmp_path / f"output{number}"))
        while len(list((tmp_path / "runs").glob("*/*/metrics.csv"))) < number:
            assert processes[-1].poll() is None, (tmp_path / f"output{number}").read_text()
            time.sleep(0.01)
    for process in processes:
        process.kill()
        process.wait(60)
    assert len(folders(tmp_path / "runs")) == 2


@pytest.mark.slow
def test_a_run_without_a_checkpoint_begins_again_in_its_folder(tmp_path: Path) -> None:
    options = (*AGA, *TINY)
    fit(tmp_path, *options, "--ckpt_path", "last", stop="SIGTERM:2")
    folder = only_folder(tmp_path)
    for name in ("last.ckpt", "last-previous.ckpt"):
        (folder / "checkpoints" / name).unlink(missing_ok=True)
    again = fit(tmp_path, *options, "--ckpt_path", "last")
    assert f"resuming {folder} from the beginning" in again.out
    assert only_folder(tmp_path) == folder
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 4


def test_the_runs_of_a_config_are_of_its_model_and_seed(tmp_path: Path) -> None:
    first = run(tmp_path, "2026-01-01_00-00-00-seed1", "finished")
    # One run is of a version with another option, one of other data.
    second = run(tmp_path, "2026-01-02_00-00-00-seed1", config="seed_everything: 1\nmodel: {lr: 0.1, old: 1}\ndata: {}")
    run(tmp_path, "2026-01-03_00-00-00-seed1", config="seed_everything: 1\nmodel: {lr: 0.2}")
    run(tmp_path, "2026-01-04_00-00-00-seed10", config="seed_everything: 10\nmodel: {lr: 0.1}")
    run(tmp_path, "2026-01-05_00-00-00-seed1", config="- 1")
    (tmp_path / "2026-01-06_00-00-00-seed1").write_text("a file")
    assert find_runs(tmp_path, CONFIG) == [RunFolder(second), RunFolder(first)]
    assert find_runs(tmp_path / "nowhere", CONFIG) == []
