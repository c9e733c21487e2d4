"""Run ``python train.py`` in a separate process that starts with everything imported."""

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
    """What came of a run: its exit code, its folder (``None`` if it made none) and its summary (empty if none)."""

    code: int
    folder: str | None
    summary: dict[str, Any]


def server(*modules: str) -> Any:
    """Return the multiprocessing context whose processes are forked from one that has imported the command line.

    Args:
        modules: imported too, such as those of a task that take seconds. None of them may touch a GPU.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["launch.cli", *modules])
    ensure_running()  # it imports while the caller goes on
    return context


class Trial:
    """Start a run of ``python train.py`` in a separate process.

    Args:
        context: see :func:`server`.
        arguments: of the command line.
        log: file for what it prints.
        environment: variables that are set for it.
    """

    def __init__(
        self, context: Any, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self._receiver, sender = context.Pipe(duplex=False)
        options = (list(arguments), str(log), dict(environment or {}), sender)
        self._process = context.Process(target=_train, args=options)
        self._process.start()
        sender.close()

    @property
    def running(self) -> bool:
        """Return whether the process is alive."""
        return bool(self._process.is_alive())

    def stop(self) -> None:
        """Let it finish its step, save and leave; before training has begun it leaves at once."""
        self._process.terminate()

    def kill(self) -> None:
        """End it at once; it can resume from its last checkpoint."""
        self._process.kill()

    def outcome(self) -> Outcome:
        """Wait for its end and return what came of it."""
        try:
            code, folder = self._receiver.recv()
        except EOFError:  # killed
            code, folder = -1, None
        self._process.join()
        return Outcome(code, folder, summary(folder))


def run(context: Any, arguments: Sequence[str], log: Path) -> Outcome:
    """Run ``python train.py`` with ``arguments`` to its end; what it prints goes to ``log``."""
    return Trial(context, arguments, log).outcome()


def summary(folder: str | None) -> dict[str, Any]:
    """Return what a run says of itself at its end; nothing for one that did not get there."""
    path = Path(folder) / "summary.json" if folder else None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
    return found


def _train(arguments: list[str], log: str, environment: dict[str, str], sender: Connection) -> None:
    """Run the command line in the process of a run."""
    os.setsid()  # a Ctrl-C is for the program that started it, which then asks it to stop
    os.environ.update(environment)
    threading.Thread(target=_end_with_the_starter, daemon=True).start()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    from experiment.folders import RunFolder, leave_current
    from launch.cli import main

    leave_current()
    sys.argv = ["train.py", *arguments]
    try:
        code = main(arguments)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    sys.stdout.flush()
    folder = RunFolder.current()
    sender.send((code, None if folder is None else str(folder)))


def _end_with_the_starter() -> None:
    """End this process with the one that started it, so that no run is left behind that nobody waits for."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
