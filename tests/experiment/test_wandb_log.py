"""A run survives failures of Weights & Biases, and resumes its record."""

import re
import shlex
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from experiment.wandb_log import RunWandbLogger
from tests.experiment.test_loggers import nothing_configured, run  # noqa: F401
from tests.helpers.commands import AGA, TINY, folders, metrics, python, train_py
from tests.helpers.marks import slow
from tests.helpers.resuming import STOP_AT
from tests.helpers.wandb_server import KEY, WandbServer

ONLINE = {"WANDB_API_KEY": KEY, "WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "1"}


def upload(output: str, home: Path) -> list[dict[str, Any]]:
    """Run the last upload command of a run's output with a server that works.

    Return the rows that the server has then. There is one run on it.
    """
    command = re.findall(r"upload the run with: wandb (sync .+)", output)[-1]
    with WandbServer() as server:
        arguments = ("-m", "wandb", *shlex.split(command))
        done = python(*arguments, home=home, WANDB_API_KEY=KEY, WANDB_BASE_URL=server.address)
        assert done.code == 0, done.err
        (name,) = server.history
        return server.rows(name)


def numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the log, without pictures, texts, and entries of W&B."""
    wanted = [row for row in rows if "epoch" in row]
    return [{key: value for key, value in row.items() if not key.startswith(("_", "cost/training"))} for row in wanted]


def assert_all_rows(rows: list[dict[str, Any]], folder: Path) -> None:
    """Check that the rows are those of the run's log, in their order."""
    logged = [{key: float(value) for key, value in row.items() if key != "step"} for row in metrics(folder)]
    assert len(logged) == len(rows) > 0
    for logged_row, row in zip(logged, numbers(rows), strict=True):
        assert {key: pytest.approx(value) for key, value in logged_row.items()}.items() <= row.items()


@pytest.mark.parametrize(
    "failure",
    [slow("hangs"), 401, slow("dies"), slow(500)],
    ids=["hangs", "wrong key", "dies", "server error"],
)
def test_a_server_that_fails_in_the_middle_of_a_run_costs_a_line(failure: str | int, tmp_path: Path) -> None:
    begin = time.monotonic()
    with WandbServer(afterwards=failure) as server:
        result, folder = run(tmp_path, **ONLINE, WANDB_BASE_URL=server.address)
        assert server.behaviour == failure
    assert time.monotonic() - begin < 90
    assert "W&B records at" in result.out
    assert "W&B did not receive all of the run; upload the run with: wandb sync --include-online" in result.out
    assert "Traceback" not in result.out + result.err
    assert_all_rows([row for row in upload(result.out, tmp_path) if "epoch" in row], folder)


def test_a_server_that_works_has_every_row_and_no_more_is_printed(tmp_path: Path) -> None:
    with WandbServer() as server:
        result, folder = run(tmp_path, **ONLINE, WANDB_BASE_URL=server.address)
        (rows,) = [server.rows(name) for name in server.history]
    assert_all_rows([row for row in rows if "epoch" in row], folder)
    assert result.err == ""
    assert "upload the run" not in result.out


@pytest.mark.slow
def test_if_the_process_of_wandb_dies_the_run_is_recorded_anew(tmp_path: Path) -> None:
    killing = ("--trainer.callbacks+=tests.helpers.wandb_server.KillService", "--internals.every_n_steps", "1")
    with WandbServer() as server:
        result, folder = run(tmp_path, *killing, **ONLINE, WANDB_BASE_URL=server.address)
    assert "W&B has failed" in result.out and "the run is recorded anew, offline" in result.out
    assert "Traceback" not in result.out
    (first,) = (folder / "wandb").glob("run-*")
    (rest,) = (folder / "wandb").glob("offline-run-*")
    assert first.name.rpartition("-")[2] == rest.name.rpartition("-")[2]
    assert_all_rows([row for row in upload(result.out, tmp_path) if "epoch" in row], folder)


@pytest.mark.slow
@pytest.mark.parametrize("online", [False, slow(True)], ids=["offline", "online"])
def test_a_resumed_run_keeps_its_id(online: bool, tmp_path: Path) -> None:
    options = (*AGA, *TINY[: TINY.index("--wandb")], "--wandb", "true", "--ckpt_path", "last")
    interrupting = ("--trainer.callbacks+=tests.helpers.resuming.Interrupt", "--data.train_fraction", "0.6")
    command = ("fit", *options, *interrupting, "--runs", tmp_path / "runs")
    with WandbServer() as server:
        environment = {**ONLINE, "WANDB_BASE_URL": server.address} if online else {}
        assert train_py(*command, home=tmp_path, **environment, **{STOP_AT: "SIGTERM:4"}).code == 143
        result = train_py(*command, home=tmp_path, **environment)
        assert result.code == 0, result.err
        (folder,) = folders(tmp_path / "runs")
        records = [path for path in (folder / "wandb").glob("*run-*-*") if not path.is_symlink()]
        assert len(records) == 2
        (name,) = {path.name.rpartition("-")[2] for path in records}
        rows = server.rows(name) if online else upload(result.out, tmp_path)
    assert_all_rows([row for row in rows if "epoch" in row], folder)


class FailsAfter:
    """Stand for a run of W&B that accepts so many rows and then fails."""

    id = "same"

    def __init__(self, rows: int) -> None:
        self.rows: list[float] = []
        self.limit = rows

    def log(self, row: dict[str, float]) -> None:
        if len(self.rows) == self.limit:
            raise BrokenPipeError("its process died")
        self.rows.append(row["epoch"])


def test_rows_for_another_record_are_kept_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = FailsAfter(1000), FailsAfter(2000)
    runs = iter([first, second])
    monkeypatch.setattr(RunWandbLogger, "_begin", lambda self: next(runs))
    logger = RunWandbLogger(tmp_path, {}, online=False, resumes=False)
    logger.log_metrics({"epoch": 0.0}, 0)  # which imports wandb
    tracemalloc.start()
    for epoch in range(1, 1000):
        logger.log_metrics({"epoch": float(epoch), **{f"train/{i}": i / 7 for i in range(20)}}, epoch)
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert memory < 200_000  # bytes, and the rows are 20,000 numbers
    logger.log_metrics({"epoch": 1000.0}, 1000)
    assert second.rows == list(range(1001))
    assert list(tmp_path.iterdir()) == []


FLOOD = """
import sys, time
from pathlib import Path
import yaml
from experiment.wandb_log import RunWandbLogger
logger = RunWandbLogger(Path(sys.argv[1]), yaml.safe_load(Path("configs/grok_aga.yaml").read_text()), True, False)
slowest = 0.0
for number in range(5000):
    begin = time.perf_counter()
    logger.log_metrics({"epoch": number, **{f"train/{i}": float(i) for i in range(20)}}, number)
    slowest = max(slowest, time.perf_counter() - begin)
print(f"slowest {slowest:.3f}")
logger.finalize("success")
"""


@pytest.mark.slow
def test_a_full_queue_delays_no_row(tmp_path: Path) -> None:
    with WandbServer(afterwards="hangs") as server:
        done = python("-c", FLOOD, tmp_path, home=tmp_path, **ONLINE, WANDB_BASE_URL=server.address)
    assert done.code == 0, done.err
    assert float(re.findall(r"slowest ([\d.]+)", done.out)[0]) < 2.0
    assert [row["epoch"] for row in upload(done.out, tmp_path)] == list(range(5000))
