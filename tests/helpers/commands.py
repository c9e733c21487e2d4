"""Call the command line in this process, or in a separate one.

A separate one is used where that is the subject of the test.
"""

import contextlib
import csv
import io
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from launch.cli import main
from tests.helpers.processes import ROOT, Running

AGA = ("--config", "configs/grok_aga.yaml")
ADAMW = ("--config", "configs/grok_adamw.yaml")
NETWORK = {"p": 7, "width": 8, "heads": 2, "mlp_width": 16}
SMALL = ("--data.p", "7", *(part for key, value in NETWORK.items() for part in (f"--model.{key}", str(value))))
# Nobody's W&B key is used by a test.
TINY = (*SMALL, "--data.batch_size", "8", "--trainer.max_epochs", "2", "--wandb", "false")


@dataclass
class Result:
    """Describe what a user sees of a command.

    It has the exit code and what was printed.
    """

    code: int | str | None
    out: str
    err: str

    @property
    def error(self) -> str:
        """Return the one line of an error.

        It fails if there is anything else on standard error.
        """
        assert self.code not in (0, None), f"it went well: {self.out}"
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), lines[0]
        return lines[0]


def call(*arguments: object, pictures: bool = False) -> Result:
    """Run the command line in this process, and put the environment back.

    Args:
        arguments: of the command line.
        pictures: whether the run is drawn at its end, which takes as long as a tiny run.
    """
    with contextlib.nullcontext() if pictures else patch("launch.cli.draw"):
        return captured(lambda: main([str(argument) for argument in arguments]))


def captured(command: Callable[[], int]) -> Result:
    """Run a command's main function in this process, from the checkout's root.

    The environment is restored.
    """
    out, err, environment, folder = io.StringIO(), io.StringIO(), dict(os.environ), Path.cwd()
    code: int | str | None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        os.chdir(ROOT)
        try:
            code = command()
        except SystemExit as leaving:
            code = leaving.code
        finally:
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
    return Result(code, out.getvalue(), err.getvalue())


def changed_by(overlays: Sequence[object], *arguments: object) -> set[str]:
    """Return the lines of a config that ``overlays`` change.

    The config is that of ``fit`` with ``arguments``.
    """
    plain, laid_over = (call("fit", *arguments, *more, "--print_config") for more in ((), overlays))
    assert (plain.code, laid_over.code) == (0, 0), plain.err + laid_over.err
    return {line.strip() for line in set(laid_over.out.splitlines()) - set(plain.out.splitlines())}


def clean_environment(home: Path, **more: str) -> dict[str, str]:
    """Return the environment of a user who has set up nothing.

    It has one thread, because tests share the machine.
    """
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "PL_", "ARS2", "NETRC"))
    }
    return {**inherited, "HOME": str(home), "OMP_NUM_THREADS": "1", **more}


def start(*arguments: object, home: Path, **environment: str) -> Running:
    """Start ``python train.py <arguments>`` in a forked process.

    It runs from the root of the checkout.
    """
    return Running(["train.py", *map(str, arguments)], clean_environment(home, **environment))


def train_py(*arguments: object, home: Path, **environment: str) -> Result:
    """Run ``python train.py <arguments>`` to its end, in a forked process."""
    return python("train.py", *arguments, home=home, **environment)


def python(*arguments: object, home: Path, timeout: float = 300.0, **environment: str) -> Result:
    """Run ``python <arguments>`` to its end, in a forked process.

    It runs from the root of the checkout.
    """
    with Running([str(argument) for argument in arguments], clean_environment(home, **environment)) as running:
        out, err = running.communicate(timeout)
    return Result(running.returncode, out, err)


def fresh_python(*arguments: object, home: Path, timeout: float = 200.0, **environment: str) -> Result:
    """Run ``python <arguments>`` to its end, in a new interpreter.

    It runs from the root of the checkout, for tests of its imports.
    """
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=clean_environment(home, **environment),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Result(process.returncode, process.stdout, process.stderr)


def folders(runs: Path) -> list[Path]:
    """Return the run folders below ``--runs``, the oldest first."""
    return sorted(runs.glob("*/*"), key=lambda folder: folder.stat().st_ctime_ns)


def fit(runs: Path, *arguments: object, pictures: bool = False) -> Path:
    """Run ``fit`` to a good end in this process; return its run folder."""
    before = folders(runs)
    result = call("fit", *arguments, "--runs", runs, pictures=pictures)
    assert result.code == 0, result.err
    (folder,) = set(folders(runs)) - set(before)
    return folder


def metrics(folder: Path) -> list[dict[str, str]]:
    """Return the logged rows as they are written, digit for digit.

    Empty fields and the one column that is a time are left out.
    """
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    for row in rows:
        row.pop("cost/training_seconds", None)
    return rows
