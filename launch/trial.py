"""Run train.py in separate processes that start with everything imported."""

import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """The exit code of a run, its folder and its summary.

    Without a folder, ``folder`` is ``None`` and ``summary`` empty.
    """

    code: int
    folder: str | None
    summary: dict[str, Any]


def server(*modules: str) -> Any:
    """Return a context whose processes are forked after all imports.

    Args:
        modules: further modules to import, such as slow ones of a task; none may initialise a GPU.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["launch.cli", *modules])
    ensure_running()  # it imports while the caller continues
    return context


class Trial:
    """A run of ``python train.py`` in a separate process.

    Args:
        context: see :func:`server`.
        arguments: of the command line.
        log: file for its output.
        environment: additional environment variables.
    """

    def __init__(
        self, context: Any, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self._receiver, sender = context.Pipe(duplex=False)
        # The server keeps the environment that it was started with.
        variables = {**os.environ, **(environment or {})}
        options = (list(arguments), str(log), variables, sender)
        self._process = context.Process(target=_train, args=options)
        self._process.start()
        sender.close()

    @property
    def running(self) -> bool:
        """Return whether the process is alive."""
        return bool(self._process.is_alive())

    def stop(self) -> None:
        """Ask the run to finish its step, save and exit; before training it exits at once."""
        self._process.terminate()

    def kill(self) -> None:
        """Kill the run; it can resume from its last checkpoint."""
        self._process.kill()

    def outcome(self) -> Outcome:
        """Wait for the end of the run and return its outcome."""
        try:
            code, folder = self._receiver.recv()
        except EOFError:  # killed
            code, folder = -1, None
        self._process.join()
        return Outcome(code, folder, summary(folder))


def run(context: Any, arguments: Sequence[str], log: Path) -> Outcome:
    """Run ``python train.py`` to its end, with its output in ``log``."""
    return Trial(context, arguments, log).outcome()


def summary(folder: str | None) -> dict[str, Any]:
    """Return the summary of a finished run; empty for one that did not finish."""
    path = Path(folder) / "summary.json" if folder else None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
    return found


def _train(arguments: list[str], log: str, environment: dict[str, str], sender: Connection) -> None:
    """Run the command line in the process of the run."""
    os.setsid()  # Ctrl-C goes to the program that started this run, which then stops it
    os.environ.update(environment)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    from experiment.folders import RunFolder, leave_current
    from launch.cli import main

    leave_current()
    sys.argv = ["train.py", *arguments]
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    sys.stdout.flush()
    folder = RunFolder.current()
    sender.send((code, None if folder is None else str(folder)))


def _exit_with_parent() -> None:
    """Exit when the parent process ends, so that no orphaned run remains."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
