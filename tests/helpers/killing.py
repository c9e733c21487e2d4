"""Lives of a command line that end with SIGKILL: each in a process that is forked from one with the imports done."""

import itertools
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from launch.cli import main
from tests.helpers.commands import ROOT

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.helpers.killing"])


def live(arguments: list[str], output: str, kill_at_call: int | None, largest_file: int | None) -> None:
    """Run the command line in this process, which kills itself in place of a given call that changes the disk."""
    with open(output, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    os.chdir(ROOT)
    calls = itertools.count(1)

    def deadly(real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(calls) == kill_at_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    for name in ("replace", "fsync") if kill_at_call is not None else ():
        setattr(os, name, deadly(getattr(os, name)))
    sys.exit(main(arguments))


def begin(arguments: list[str], output: Path, kill_at_call: int | None = None, largest_file: int | None = None) -> Any:
    """Start the command line in a process of its own; the arguments are those of :func:`life`."""
    process = context.Process(target=live, args=(arguments, str(output), kill_at_call, largest_file))
    process.start()
    return process


def life(arguments: list[str], output: Path, kill_after: float | None = None, **options: int) -> int | None:
    """Run the command line in a process of its own; returns its exit code, -9 if it was killed.

    Args:
        arguments: of the command line.
        output: file for what it prints.
        kill_after: seconds after which it is killed, if it still runs.
        options: ``kill_at_call``, the number of the call, of those that rename files or bring them to the disk, before
            which it dies; ``largest_file``, the bytes that a file may have until the system refuses to write more.
    """
    process = begin(arguments, output, **options)
    process.join(kill_after)
    if process.is_alive():
        process.kill()
    process.join(120)
    code: int | None = process.exitcode
    return code
