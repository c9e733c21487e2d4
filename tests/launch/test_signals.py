"""``python train.py`` prints, stops and leaves files as documented.

Each test runs it in a separate process.
"""

import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from callbacks.last_checkpoint import Stopped
from experiment.folders import RunFolder, leave_current
from launch import cli
from tests.helpers.commands import AGA, ROOT, TINY, clean_environment, fit, folders, metrics, start, train_py
from tests.helpers.marks import slow
from tests.helpers.processes import Running, wait_until

LONG = (
    *AGA,
    *TINY,
    "--trainer.max_epochs",
    "100000",
    "--trainer.callbacks",
    "null",
    "--last_checkpoint.every_n_epochs",
)


def test_a_run_without_a_terminal_is_quiet_and_plain(tmp_path: Path) -> None:
    result = train_py("fit", *AGA, *TINY, "--runs", tmp_path / "runs", home=tmp_path)
    assert (result.code, result.err) == (0, "")
    assert "Run finished after 2 epochs" in result.out
    # No bar is drawn over itself and nothing is coloured.
    assert not set("\r\x1b━") & set(result.out.replace("━┓", "").replace("━┩", ""))
    assert "it/s" not in result.out
    (folder,) = folders(tmp_path / "runs")
    assert str(folder) in result.out
    assert len(metrics(folder)) == 4


def test_an_error_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    result = train_py("fit", *AGA, *TINY, "--runs", tmp_path / "runs", "--model.widht", 3, home=tmp_path)
    assert result.code == 2
    assert result.error == "error: Option 'widht' is not accepted; did you mean width?"
    assert result.out == ""
    assert not (tmp_path / "runs").exists()


def test_help_names_the_subcommands_and_our_options(tmp_path: Path) -> None:
    result = train_py("--help", home=tmp_path)
    assert result.code == 0
    for subcommand in ("fit", "validate", "test", "predict"):
        assert re.search(rf"^ +{subcommand}\b", result.out, re.M)


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), slow(signal.SIGTERM, 143)])
def test_a_stopped_run_is_saved(stop: signal.Signals, code: int, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with start("fit", *LONG, "1", "--runs", runs, home=tmp_path) as process:
        wait_until(lambda: list(runs.glob("*/*/checkpoints/last.ckpt")), process)
        process.send_signal(stop)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Run interrupted after" in out
    assert "Traceback" not in out + err
    (folder,) = folders(runs)
    epochs = json.loads((folder / "summary.json").read_text())["epochs"]
    assert 0 < epochs < 100000
    trained = [row for row in metrics(folder) if "train/loss" in row]
    assert len(trained) in (epochs, epochs + 1)
    # The last line is the command that resumes it.
    command = re.search(r"^resume with: python train.py (.*)$", out, re.M)
    assert command is not None and out.rstrip().endswith(command[0])
    with start(*shlex.split(command[1]), home=tmp_path) as process:
        wait_until(lambda: process.out.startswith(f"resuming {folder}\n"), process)
        process.kill()
    # It resumes from there.
    more = ("--trainer.max_epochs", epochs + 3, "--ckpt_path", folder / "checkpoints/last.ckpt")
    again = metrics(fit(runs, *AGA, *TINY, "--trainer.callbacks", "null", *more))
    assert int(again[-1]["epoch"]) == epochs + 2


def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    # An epoch has 479 batches, and its validation 8939.
    long = ("--data.p", "113", "--data.val_batch_size", "1", "--model.p", "113", "--trainer.callbacks", "null")
    more = ("--trainer.num_sanity_val_steps", "0", "--last_checkpoint.every_n_steps", "1")
    with start("fit", *AGA, *TINY, *long, *more, "--runs", runs, home=tmp_path) as process:
        wait_until(lambda: list(runs.glob("*/*/checkpoints/last.ckpt")), process)
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "resume with: python train.py fit" in out, err
    assert "Traceback" not in out + err


def test_a_signal_while_a_stop_is_reported_still_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(**_: object) -> None:
        RunFolder(tmp_path).make_current()
        raise Stopped(signal.SIGINT, "last.ckpt")

    def interrupted(text: str) -> None:
        monkeypatch.delattr(cli, "print")
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "CommandLine", stopped)
    monkeypatch.setattr(cli, "print", interrupted, raising=False)
    try:
        assert cli.main(["fit", *AGA]) == 130
    finally:
        leave_current()
    assert "resume with: python train.py fit" in capsys.readouterr().out


def test_a_signal_during_the_start_is_no_crash(tmp_path: Path) -> None:
    """The signal comes at the first of the imports, which take seconds."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/__init__.py").touch()
    (tmp_path / "launch/cli.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    (tmp_path / "train.py").write_text((ROOT / "train.py").read_text())
    command = [sys.executable, str(tmp_path / "train.py"), "fit"]
    # In a background job a child would ignore Ctrl-C.
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, preexec_fn=heeds)
    assert result.returncode == 130
    assert result.stderr == "interrupted before training began\n"


def test_a_terminal_shows_rate_and_time_left(tmp_path: Path) -> None:
    terminal, inside = pty.openpty()
    environment = clean_environment(tmp_path, COLUMNS="200", TERM="xterm")
    arguments = ["train.py", "fit", *AGA, *TINY, "--trainer.max_epochs", "5", "--runs", str(tmp_path)]
    with Running(arguments, environment, (os.ttyname(inside),) * 3) as process:
        wait_until(lambda: select.select([terminal], [], [], 0)[0], process)
        os.close(inside)
        shown = b""
        while select.select([terminal], [], [], 60)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
        process.wait(60)
    os.close(terminal)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert process.returncode == 0, text
    bars = [line for line in text.splitlines() if line.lstrip().startswith("Epoch")]
    assert any(re.search(r"\d+\.\d\dit/s", line) for line in bars), text
    assert re.search(r"train/loss \d.*at most [\d.]+ s left", text), text
    assert any("Epoch 5/5" in line for line in bars)
