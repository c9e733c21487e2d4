"""make sets up an environment, or uses an existing one unchanged."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
# What make runs as Python, in place of one that would install: it writes down its arguments, and makes environments.
PYTHON = """#!/bin/sh
echo "$@" >> {calls}
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *) exit 0 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "train.py").write_text("print('trained')")
    (tmp_path / "python").write_text(PYTHON.format(calls=tmp_path / "calls"))
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def make(checkout: Path, target: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "PYTHON"))}
    command = ["make", target, f"PYTHON={checkout / 'python'}"]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=60)


def calls(checkout: Path) -> str:
    return (checkout / "calls").read_text() if (checkout / "calls").exists() else ""


def found(checkout: Path, packages: bool) -> Path:
    """Make an environment as uv does, without pip.

    It has a file by which it is recognised.
    """
    venv.create(checkout / ".venv", symlinks=True)
    if packages:
        interpreter = checkout / ".venv/bin/python"
        interpreter.unlink()
        interpreter.write_text(f'#!/bin/sh\n[ "$2" = pip ] && exit 1\nexec {sys.executable} "$@"\n')
        interpreter.chmod(0o755)
    (checkout / ".venv/mine").touch()
    return checkout / ".venv"


def test_an_environment_is_made_once(checkout: Path) -> None:
    first = make(checkout, "demo")
    assert first.returncode == 0, first.stderr
    assert "setting up .venv" in first.stdout and "-m venv .venv" in calls(checkout)
    assert "-m pip install" in calls(checkout)
    (checkout / "calls").unlink()
    assert make(checkout, "demo").returncode == 0
    assert calls(checkout) == "train.py fit --config configs/grok_aga.yaml\n"
    assert make(checkout, "clean").returncode == 0
    assert not (checkout / ".venv").exists()


def test_an_install_that_was_cut_short_is_made_anew(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv/.unfinished").touch()
    assert make(checkout, "demo").returncode == 0
    assert (checkout / ".venv/.installed").exists() and not (checkout / ".venv/.unfinished").exists()


def test_an_environment_that_was_found_is_used_as_it_is(checkout: Path) -> None:
    environment = found(checkout, packages=True)
    for output in ("using .venv as it was found\ntrained\n", "trained\n"):
        result = make(checkout, "demo")
        assert (result.returncode, result.stdout) == (0, output), result.stderr
    assert (environment / "mine").exists() and calls(checkout) == ""
    assert ".venv stays" in make(checkout, "clean").stdout
    assert (environment / "mine").exists()


def test_one_that_uv_has_taken_over_is_kept(checkout: Path) -> None:
    environment = found(checkout, packages=True)
    (environment / ".installed").touch()
    os.utime(environment / ".installed", (0, 0))
    assert "using .venv as it was found" in make(checkout, "demo").stdout
    assert (environment / "mine").exists() and calls(checkout) == ""


def test_one_that_lacks_a_package_is_named_and_kept(checkout: Path) -> None:
    environment = found(checkout, packages=False)
    result = make(checkout, "demo")
    assert result.returncode != 0
    line = result.stderr.splitlines()[0]
    assert line.startswith("error: make has not made .venv and cannot use it (") and "uv sync" in line
    assert (environment / "mine").exists() and calls(checkout) == ""
