"""The commands of the example train, test, search and compare its task."""

import shlex
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

import compare
import sweep
from examples import your_task
from tests.helpers.commands import Result, call, captured
from tests.helpers.processes import server

COMMANDS = (your_task.__doc__ or "").split("\n\n")[1].splitlines()


def run(command: str, folder: Path) -> Result:
    """Run a command of the docstring in this process, with its runs in ``folder``."""
    python, script, *options = shlex.split(command.replace("runs/", f"{folder}/"))
    assert python == "python"
    if script == "train.py":
        return call(*options, "--runs", folder, "--wandb", "false")
    program = {"sweep.py": sweep, "compare.py": compare}[script]
    more = ["--output", str(folder / "report")] if script == "compare.py" else []
    with patch("sys.argv", [script, *options, *more]):
        return captured(program.main)


def test_it_is_trained_tested_and_asked(tmp_path: Path) -> None:
    results = [run(command, tmp_path) for command in COMMANDS if "train.py" in command and "--seed" not in command]
    assert [result.code for result in results] == [0] * 3, [result.err for result in results]
    assert "good: val/accuracy >= 0.95 │ epoch" in results[0].out
    answers = results[-1].out.splitlines()
    assert len(answers) == 3 and all(": right" in line or ": wrong" in line for line in answers)


@pytest.mark.slow
def test_its_settings_are_searched_and_compared(tmp_path: Path) -> None:
    server()  # the trials are forked from it
    for command in COMMANDS:
        if "train.py" not in command or "--seed" in command:
            result = run(command, tmp_path)
            assert result.code == 0, result.err
    report = (tmp_path / "report/report.md").read_text()
    assert "Cost of reaching val/accuracy >= 0.95" in report
    for row in ("adamw", "base", "sync"):
        assert f"\n| {row} | 2 of 2 |" in report


def test_scikit_learn_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "Digits needs the package scikit-learn: install it" in run(COMMANDS[0], tmp_path).error
