"""``--debug`` prints the traceback of an error before its line."""

from pathlib import Path

import pytest
import yaml

import compare
import sweep
from tests.helpers.commands import AGA, TINY, call, captured, fit

WRONG = ("--model.heads", "3")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--debug", "fit", *AGA, *TINY, *WRONG),
        ("fit", "--debug", *AGA, *TINY, *WRONG),
        ("fit", *AGA, *TINY, *WRONG, "--debug"),
        pytest.param(("validate", *AGA, *TINY, "--debug"), marks=pytest.mark.slow),
    ],
    ids=["before the subcommand", "after it", "at the end", "another subcommand"],
)
def test_the_traceback_comes_before_the_line_and_only_then(arguments: tuple[str, ...], tmp_path: Path) -> None:
    result = call(*arguments, "--runs", tmp_path)
    assert result.err.startswith("Traceback (most recent call last):\n  File ")
    without = call(*(argument for argument in arguments if argument != "--debug"), "--runs", tmp_path)
    assert result.err.splitlines()[-1] == without.error
    assert (result.code, without.code) == (1, 1)


def test_a_refused_option_has_a_traceback_too() -> None:
    result = call("fit", *AGA, "--debug", "--trainer.max_epochs", "many")
    assert result.code == 2
    assert "error: trainer.max_epochs: expected int; got many\nTraceback" in result.err


def test_the_help_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("--help",), ("test", "--help")):
        assert "--debug anywhere in the command prints the traceback" in " ".join(call(*arguments).out.split())


def test_it_is_no_part_of_the_run(tmp_path: Path) -> None:
    folder = fit(tmp_path, "--debug", *AGA, *TINY, "--trainer.max_epochs", "1")
    assert "debug" not in yaml.safe_load((folder / "config.yaml").read_text())


@pytest.mark.parametrize("command", [sweep, compare])
def test_sweep_and_compare_have_it(command: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    for more in ([], ["--debug"]):
        monkeypatch.setattr("sys.argv", ["command", str(tmp_path / "nothing"), *more])
        written = captured(command.main).err  # type: ignore[attr-defined]
        assert ("Traceback (most recent call last):" in written) == bool(more)
        lines.append(written.splitlines()[-1])
    assert lines[0] == lines[1] and lines[0].startswith("error: ")
