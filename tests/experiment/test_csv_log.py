import csv
import os
from pathlib import Path

import pytest

from experiment.csv_log import RunCSVLogger


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def log(folder: Path, *values: dict[str, float], resumes: bool = False) -> RunCSVLogger:
    logger = RunCSVLogger(folder, resumes)
    for step, row in enumerate(values):
        logger.log_metrics(row, step)
        logger.save()
    return logger


def test_rows_and_new_columns_are_written_as_they_come(tmp_path: Path) -> None:
    folder = tmp_path / "runs/mine/one"
    logger = log(folder, {"b": 1.5}, {"b": 2.5}, {"a": 0.1}, {"b": 1e-9, "a": 3})
    assert rows(folder) == [
        {"b": "1.5", "step": "0"},
        {"b": "2.5", "step": "1"},
        {"a": "0.1", "step": "2"},
        {"a": "3", "b": "1e-09", "step": "3"},
    ]
    assert (folder / "metrics.csv").read_text().splitlines()[0] == "a,b,step"
    assert (logger.count, logger.log_dir) == (4, str(folder))


def test_a_new_run_begins_an_empty_file_and_a_resumed_one_keeps_its_rows(tmp_path: Path) -> None:
    folder = tmp_path / "runs/mine/one"
    log(folder, {"a": 1}, {"a": 2})
    assert log(folder, {"a": 3}, resumes=True).count == 3
    assert [row["a"] for row in rows(folder)] == ["1", "2", "3"]
    log(folder, {"a": 4})
    assert [row["a"] for row in rows(folder)] == ["4"]


def test_resuming_from_an_earlier_step_drops_later_rows_and_columns(tmp_path: Path) -> None:
    folder = tmp_path / "runs/mine/one"
    logger = log(folder, {"a": 1}, {"a": 2}, {"a": 3, "late": 4})
    logger.truncate(2)
    assert (folder / "metrics.csv").read_text().splitlines() == ["a,step", "1,0", "2,1"]
    logger.log_metrics({"a": 5}, 2)
    logger.save()
    assert [row["a"] for row in rows(folder)] == ["1", "2", "5"]
    logger.truncate(0)
    assert not (folder / "metrics.csv").exists()


@pytest.mark.parametrize("torn", ["7,", "7,2\n8", '"', "\0\0\0"])
def test_a_row_that_was_torn_by_a_kill_is_dropped(torn: str, tmp_path: Path) -> None:
    folder = tmp_path / "runs/mine/one"
    log(folder, {"a": 1}, {"a": 2})
    with open(folder / "metrics.csv", "a") as file:
        file.write(torn)
    logger = RunCSVLogger(folder, resumes=True)
    logger.truncate(2)
    logger.log_metrics({"a": 3}, 2)
    logger.save()
    assert rows(folder) == [{"a": str(n), "step": str(n - 1)} for n in (1, 2, 3)]


def test_new_columns_never_leave_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runs/mine/one"
    logger = log(folder, {"a": 1}, {"a": 2})
    before = (folder / "metrics.csv").read_text()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    logger.log_metrics({"new": 1}, 2)
    with pytest.raises(OSError, match=r"No space left on device.*metrics.csv"):
        logger.save()
    assert (folder / "metrics.csv").read_text() == before
