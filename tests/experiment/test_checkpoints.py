"""A disk error while saving harms no earlier checkpoint.

The disk is full, cannot be written to, or has lost something.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experiment import checkpoints
from experiment.checkpoints import AtomicCheckpointIO, check_checkpoint
from experiment.folders import RunFolder
from tests.helpers.commands import AGA, TINY, call, folders
from tests.helpers.processes import life
from tests.helpers.resuming import assert_same_run, checkpoint, fit, only_folder

OPTIONS = (*AGA, *TINY, "--data.train_fraction", "0.6", "--trainer.max_epochs", "5")
LAST, PREVIOUS = "checkpoints/last.ckpt", "checkpoints/last-previous.ckpt"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Make a separate file system with room for a few tiny checkpoints."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "none", place], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("a file system can be mounted by root alone")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def complete_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "checkpoints").iterdir()}


def error_in(output: Path) -> str:
    """Return the one error line of a command that failed."""
    text = output.read_text()
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_completely_leaves_the_one_before(tmp_path: Path) -> None:
    runs, output = tmp_path / "runs", tmp_path / "output"
    stopped = fit(runs, *OPTIONS, "--ckpt_path", "last", stop="SIGTERM:8")
    assert stopped.code == 143
    folder = only_folder(runs)
    before = complete_files(folder)
    size = len(before["last.ckpt"])
    command = ["fit", *OPTIONS, "--runs", str(runs), "--ckpt_path", "last"]
    command += ["--trainer.callbacks+=tests.helpers.resuming.Interrupt"]
    assert life(command, output, largest_file=size // 2) == 1
    line = error_in(output)
    assert "the checkpoint could not be written (File too large); earlier ones are unchanged" in line
    after = complete_files(folder)
    # The best is smaller, and may have been written again.
    assert after.keys() == before.keys()
    assert after["last.ckpt"] == before["last.ckpt"]
    check_checkpoint(folder / LAST, resume=True)
    # With room again the run resumes exactly.
    assert fit(runs, *OPTIONS, "--ckpt_path", "last").code == 0
    assert fit(tmp_path / "uninterrupted", *OPTIONS).code == 0
    assert_same_run(folder, only_folder(tmp_path / "uninterrupted"))


def test_a_full_disk_is_one_sentence(small_disk: Path, tmp_path: Path) -> None:
    runs = small_disk / "runs"
    assert fit(runs, *OPTIONS, "--ckpt_path", "last", stop="SIGTERM:8").code == 143
    folder = only_folder(runs)
    before = complete_files(folder)
    with open(small_disk / "filler", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(b"0" * 4096)
    failed = fit(runs, *OPTIONS, "--ckpt_path", "last")
    assert failed.code == 1
    lines = [line for line in failed.err.splitlines() if "Stopping" not in line]
    assert len(lines) == 1 and "No space left on device" in lines[0] and str(folder) in lines[0]
    assert complete_files(folder) == before
    (small_disk / "filler").unlink()
    assert fit(runs, *OPTIONS, "--ckpt_path", "last").code == 0


def test_a_folder_that_became_read_only_is_one_sentence(small_disk: Path) -> None:
    runs = small_disk / "runs"
    assert fit(runs, *OPTIONS, "--ckpt_path", "last", stop="SIGTERM:8").code == 143
    before = complete_files(only_folder(runs))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    failed = fit(runs, *OPTIONS, "--ckpt_path", "last")
    assert failed.code == 1
    assert failed.error.endswith("Read-only file system")
    assert "Read-only file system" in call("fit", *OPTIONS, "--runs", small_disk / "others").error
    assert complete_files(only_folder(runs)) == before


def test_a_folder_without_permission_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Any, *arguments: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoints, "open", refuse, raising=False)
    result = call("fit", *OPTIONS, "--runs", tmp_path)
    assert "the checkpoint could not be written (Permission denied); earlier ones are unchanged" in result.error


class Unpicklable:
    def __reduce__(self) -> Any:
        raise RuntimeError("not to be saved")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "deep/run.ckpt"
    io.save_checkpoint({"number": 1}, path)
    with pytest.raises(RuntimeError, match="not to be saved"):
        io.save_checkpoint({"number": 2, "object": Unpicklable()}, path)
    assert [file.name for file in path.parent.iterdir()] == ["run.ckpt"]
    assert torch.load(path, weights_only=True) == {"number": 1}


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    AtomicCheckpointIO().save_checkpoint({"number": 1}, tmp_path / "run.ckpt")
    assert done == ["fsync", "replace", "fsync"]


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an unfinished run's folder with its last two checkpoints."""
    runs = tmp_path_factory.mktemp("runs")
    assert fit(runs, *OPTIONS, "--last_checkpoint.every_n_epochs", 1, stop="SIGTERM:10").code == 143
    return only_folder(runs)


def test_if_the_last_one_is_damaged_the_one_before_is_offered(two_checkpoints: Path, tmp_path: Path) -> None:
    options = (*OPTIONS, "--last_checkpoint.every_n_epochs", 1)
    runs = two_checkpoints.parent.parent
    good = (two_checkpoints / LAST).read_bytes()
    (two_checkpoints / LAST).write_bytes(good[:2000])
    for path in ("last", two_checkpoints / LAST):
        line = fit(runs, *options, "--ckpt_path", path).error
        assert f"{two_checkpoints / LAST} cannot be read as a checkpoint" in line
        assert f"the previous one is intact: give {two_checkpoints / PREVIOUS}" in line
    (two_checkpoints / LAST).unlink()
    assert RunFolder(two_checkpoints).last_checkpoint() == two_checkpoints / PREVIOUS
    assert f"give {two_checkpoints / PREVIOUS}" in fit(runs, *options, "--ckpt_path", two_checkpoints / LAST).error
    # As in the message: without the last one, the same command takes the one before.
    assert checkpoint_step(two_checkpoints / PREVIOUS) == 8
    assert fit(runs, *options, "--ckpt_path", "last").code == 0
    assert fit(tmp_path, *options).code == 0
    assert_same_run(two_checkpoints, only_folder(tmp_path))
    assert len(folders(runs)) == 1


def checkpoint_step(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def test_a_damaged_checkpoint_is_not_offered(tmp_path: Path) -> None:
    for name in ("last.ckpt", "last-previous.ckpt"):
        (tmp_path / name).write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint") as error:
        check_checkpoint(tmp_path / "last.ckpt", resume=True)
    assert "the one before" not in str(error.value)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_it(tmp_path: Path) -> None:
    # The first step overflows the weights' squares; its loss was finite, the second one's is not.
    options = (*OPTIONS, "--model.optimizer.lr", 1e30)
    result = call("fit", *options, "--runs", tmp_path)
    assert "step 2 in epoch 1, first pass: the loss is nan" in result.error
    folder = only_folder(tmp_path)
    assert f"details in {folder / 'error.txt'}" in result.error
    assert "Traceback" in (folder / "error.txt").read_text()
    assert "interrupted" in (folder / "summary.json").read_text()
    saved = checkpoint(folder)
    assert (saved["global_step"], saved["skipped_steps"]) == (1, 1)
    for name, tensor in saved["state_dict"].items():
        assert tensor.isfinite().all(), name


@pytest.mark.slow
def test_by_option_training_continues_after_a_step_that_is_not_finite(tmp_path: Path) -> None:
    options = (
        *OPTIONS,
        "--model",
        "tests.helpers.resuming.BrokenStep",
        "--model.p=7",
        "--model.width=8",
        "--model.heads=2",
    )
    assert "step 3 in epoch 1, first pass: the loss is nan" in call("fit", *options, "--runs", tmp_path / "stop").error
    result = call("fit", *options, "--model.nonfinite", "skip", "--runs", tmp_path / "skip")
    assert result.code == 0, result.err
    assert checkpoint(only_folder(tmp_path / "skip"))["skipped_steps"] == 1
    # The checkpoint of the stopped run leaves the batch out, too, when it is resumed.
    again = call("fit", *options, "--runs", tmp_path / "stop", "--ckpt_path", "last")
    assert again.code == 0, again.err
