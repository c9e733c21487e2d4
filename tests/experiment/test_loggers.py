"""A CSV log is always written; Weights & Biases never stops a run.

It logs when asked or configured. No test has a network.
"""

import json
import os
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiment.loggers import make_loggers
from tests.helpers.commands import AGA, TINY, Result, folders, metrics, python, train_py
from tests.helpers.processes import server
from tests.helpers.wandb_server import KEY, WandbServer

NO_SERVER = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "1"}
# A trial, because a trial is not drawn at its end.
TRIAL = ("--sweep.name", "search", "--sweep.optimizer", "aga", "--sweep.trial", "0")
WITHOUT_CHOICE = (*TINY[: TINY.index("--wandb")], *TRIAL)


@pytest.fixture(autouse=True)
def nothing_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server()  # with the home of before
    for name in [name for name in os.environ if name.startswith("WANDB") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def records(file: Path) -> Iterator[bytes]:
    """Return the records of an offline file.

    It has blocks of 32 KiB with chunks of a record, each after a header of 7 bytes.
    """
    content, position = file.read_bytes(), 7  # the header of the file
    record = b""
    while position < len(content):
        if 32768 - position % 32768 < 7:  # too little for a header: padding
            position += 32768 - position % 32768
        _, length, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # complete, or the last chunk
            yield record
            record = b""


READ = """
import json, pathlib, sys
from wandb.proto.wandb_internal_pb2 import Record
from tests.experiment.test_loggers import records
for content in records(pathlib.Path(sys.argv[1])):
    record = Record.FromString(content)
    if record.HasField("history"):
        items = record.history.item
        print(json.dumps({".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}))
"""


def history(folder: Path) -> list[dict[str, float]]:
    """Return the rows of numbers in a run's offline file.

    Another process reads them, so that this one imports no wandb.
    """
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    read = python("-c", READ, file, home=folder)
    assert read.code == 0, read.err
    rows = [json.loads(line) for line in read.out.splitlines()]
    return [row for row in rows if "epoch" in row]  # one more has the pictures


def processes_in(folder: Path) -> list[str]:
    """Return the command lines of processes that use ``folder``.

    They have a file of it open or were started from it.
    """
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            environment = (process / "environ").read_bytes()
        except OSError:
            continue
        if f"HOME={folder}\0".encode() in environment and process.name != str(os.getpid()):
            found.append(command)
    return found


def run(home: Path, *arguments: str, **environment: str) -> tuple[Result, Path]:
    """Run a tiny run with a separate home to a good end.

    No process of it stays.
    """
    result = train_py("fit", *AGA, *WITHOUT_CHOICE, "--runs", home / "runs", *arguments, home=home, **environment)
    assert result.code == 0, result.err
    assert "Run finished" in result.out
    deadline = time.monotonic() + 10
    while processes_in(home) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_in(home) == []
    (folder,) = folders(home / "runs")
    return result, folder


def test_without_a_key_there_is_only_the_csv_file(tmp_path: Path) -> None:
    (logger,) = make_loggers(tmp_path / "runs/mine/one", {}, wandb=None)
    assert logger.log_dir == str(tmp_path / "runs/mine/one")


@pytest.mark.parametrize("choice", [False, None])
def test_wandb_that_is_turned_off_is_not_used(
    choice: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if choice is False:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert len(make_loggers(tmp_path / "runs/mine/one", {}, wandb=choice)) == 1


def test_asked_without_a_key_records_offline_and_explains_how_to_upload(tmp_path: Path) -> None:
    result, folder = run(tmp_path, "--wandb", "true")
    assert result.err == ""
    (line,) = [line for line in result.out.splitlines() if "W&B" in line]
    message = re.fullmatch(r"W&B records offline; upload the run with: wandb sync (.+)", line)
    assert message is not None
    (recorded,) = folder.glob("wandb/offline-run-*")
    assert message[1] == str(recorded)
    # Every number of the CSV file is in it.
    rows = history(folder)
    logged = [{key: float(value) for key, value in row.items() if key != "step"} for row in metrics(folder)]
    assert len(logged) == len(rows) == 4
    for logged_row, row in zip(logged, rows, strict=True):
        assert {key: pytest.approx(value) for key, value in logged_row.items()}.items() <= row.items()


@pytest.mark.slow
def test_a_key_in_a_netrc_file_is_used_and_a_silent_server_delays_nothing(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text(f"machine 127.0.0.1:9\n  login user\n  password {KEY}\n")
    (tmp_path / ".netrc").chmod(0o600)
    start = time.monotonic()
    result, folder = run(tmp_path, **NO_SERVER)
    assert time.monotonic() - start < 90
    assert "W&B cannot be reached" in result.out
    assert result.err == ""
    assert "wandb sync" in result.out
    assert len(history(folder)) == len(metrics(folder)) == 4
    # The failed attempt leaves no files that could be taken for a run.
    assert [path.name for path in (folder / "wandb").glob("*run-2*")] == [
        path.name for path in (folder / "wandb").glob("offline-run-*")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", [401, 500, "hangs"], ids=["wrong key", "server error", "hangs"])
def test_a_server_that_refuses_a_run_delays_nothing(behaviour: str | int, tmp_path: Path) -> None:
    begin = time.monotonic()
    with WandbServer(behaviour) as server:
        environment = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.address, "WANDB_INIT_TIMEOUT": "1"}
        result, folder = run(tmp_path, **environment, WANDB_FINISH_TIMEOUT="1")
    assert server.asked, "the server was never asked"
    assert time.monotonic() - begin < 90
    assert "W&B cannot be reached" in result.out
    assert "wandb sync" in result.out
    assert "Traceback" not in result.out + result.err
    assert len(history(folder)) == len(metrics(folder)) == 4


@pytest.mark.slow
def test_an_offline_mode_does_not_try_the_server(tmp_path: Path) -> None:
    result, folder = run(tmp_path, WANDB_API_KEY=KEY, WANDB_MODE="offline", **NO_SERVER)
    assert "wandb sync" in result.out
    assert "cannot be reached" not in result.out + result.err
    assert len(history(folder)) == 4


def test_a_netrc_file_for_other_machines_is_no_key(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine elsewhere.invalid\n  login user\n  password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    result, folder = run(tmp_path, **NO_SERVER)
    assert "W&B" not in result.out + result.err
    assert not (folder / "wandb").exists()


def test_a_disabled_mode_records_nothing(tmp_path: Path) -> None:
    result, folder = run(tmp_path, "--wandb", "true", WANDB_MODE="disabled")
    assert "W&B" not in result.out
    assert not (folder / "wandb").exists()
    assert len(metrics(folder)) == 4
