"""Whenever the trainer is killed, the same command resumes exactly."""

import random
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from experiment.folders import RunFolder
from tests.helpers.commands import AGA, TINY, call, folders, start
from tests.helpers.processes import life
from tests.helpers.resuming import assert_same_run

OPTIONS = (*AGA, *TINY, "--data.train_fraction", "0.6", "--internals.every_n_steps", "3", "--trainer.callbacks", "null")
KILLED = -signal.SIGKILL


def the_finished(runs: Path) -> Path:
    """Return the one folder with a finished run.

    Any other was left before it had even its config.
    """
    (finished,) = [folder for folder in folders(runs) if RunFolder(folder).is_finished()]
    assert not [folder for folder in folders(runs) if folder != finished and (folder / "checkpoints").exists()]
    return finished


def uninterrupted_run(runs: Path, *options: object) -> Path:
    result = call("fit", *options, "--runs", runs)
    assert result.code == 0, result.err
    return the_finished(runs)


@pytest.mark.parametrize(
    "numbers",
    [
        # Before the first file has its name, within a checkpoint's write, and after the last checkpoint.
        pytest.param((1, 3, 6, 10**6), id="some"),
        pytest.param(range(1, 10**6), id="all", marks=pytest.mark.slow),
    ],
)
def test_a_run_may_die_at_every_point_of_every_write(numbers: Iterable[int], tmp_path: Path) -> None:
    options = (*OPTIONS, "--trainer.max_epochs", "2", "--last_checkpoint.every_n_steps", "2")
    command = ["fit", *options, "--runs", str(tmp_path / "killed"), "--ckpt_path", "last"]
    for number in numbers:
        code = life(command, tmp_path / "output", kill_at_call=number)
        if code == 0:
            break
        assert code == KILLED, (tmp_path / "output").read_text()
    # The last lives had less and less left to write; the first ones died in everything that a save does.
    assert number > 10 and code == 0
    assert_same_run(the_finished(tmp_path / "killed"), uninterrupted_run(tmp_path / "uninterrupted", *options))
    assert "Traceback" not in (tmp_path / "output").read_text()


@pytest.mark.slow
def test_a_run_may_be_killed_at_any_moment(tmp_path: Path) -> None:
    options = (*OPTIONS, "--trainer.max_epochs", "30", "--last_checkpoint.every_n_steps", "1")
    command = ["fit", *options, "--runs", str(tmp_path / "killed"), "--ckpt_path", "last"]
    moments = random.Random(0)
    assert life(command, tmp_path / "output", kill_after=0.4 + moments.random()) in (KILLED, 0)
    assert life(command, tmp_path / "output") == 0, (tmp_path / "output").read_text()
    assert_same_run(the_finished(tmp_path / "killed"), uninterrupted_run(tmp_path / "uninterrupted", *options))


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    # More epochs than a fast machine trains between twenty kills.
    options = (*OPTIONS, "--trainer.max_epochs", "1500", "--last_checkpoint.every_n_steps", "1")
    runs, moments = tmp_path / "killed", random.Random(1)
    for _ in range(20):
        written = {folder: (folder / "metrics.csv").stat().st_mtime_ns for folder in with_rows(runs)}
        with start("fit", *options, "--runs", runs, "--ckpt_path", "last", home=tmp_path) as process:
            # Half of the moments are in training, checkpoint writes included; half from the start on.
            if moments.random() < 0.5:
                while process.poll() is None and written == {
                    folder: (folder / "metrics.csv").stat().st_mtime_ns for folder in with_rows(runs)
                }:
                    time.sleep(0.01)
                time.sleep(0.3 * moments.random())
            else:
                time.sleep(1.5 * moments.random())
            process.kill()
            _, err = process.communicate()
            assert "Traceback" not in err
    with start("fit", *options, "--runs", runs, "--ckpt_path", "last", home=tmp_path) as process:
        out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "resuming" in out
    assert_same_run(the_finished(runs), uninterrupted_run(tmp_path / "uninterrupted", *options))


def with_rows(runs: Path) -> list[Path]:
    return [folder for folder in folders(runs) if (folder / "metrics.csv").exists()]
