"""One run of a sweep, in a process of its own that starts with everything imported."""

import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What came of a run: its exit code, its folder (``None`` if it made none) and its summary (empty if none)."""

    code: int
    folder: str | None
    summary: dict[str, Any]


def server() -> Any:
    """Return the multiprocessing context whose processes are forked from one that has imported the command line."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cli"])
    return context


def run(context: Any, arguments: Sequence[str], log: Path) -> Outcome:
    """Run ``python train.py`` with ``arguments`` to its end; what it prints goes to ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(list(arguments), str(log), sender))
    process.start()
    sender.close()
    try:
        code, folder = receiver.recv()
    except EOFError:  # killed
        code, folder = -1, None
    process.join()
    return Outcome(code, folder, summary(folder))


def summary(folder: str | None) -> dict[str, Any]:
    """Return what a run says of itself at its end; nothing for one that did not get there."""
    path = Path(folder) / "summary.json" if folder else None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
    return found


def _train(arguments: list[str], log: str, sender: Connection) -> None:
    """The run's process."""
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    from cli import main
    from run_folders import FOLDER

    os.environ.pop(FOLDER, None)
    sys.argv = ["train.py", *arguments]
    try:
        code = main(arguments)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    sys.stdout.flush()
    sender.send((code, os.environ.get(FOLDER)))


def _end_with_the_sweep() -> None:
    """A sweep that was killed leaves no runs behind that nobody waits for."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
