"""Fork processes for tests from one server that has the imports done.

A new interpreter spends five seconds on imports; a forked one begins at once. Tests of the imports themselves use
:func:`tests.helpers.commands.fresh_python`.
"""

import atexit
import itertools
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]
context = multiprocessing.get_context("forkserver")


def server() -> Any:
    """Return the context of the processes, whose server starts with the first call."""
    context.set_forkserver_preload(["tests.helpers.preloaded"])
    ensure_running()
    return context


@dataclass(frozen=True)
class Program:
    """Describe what a process runs, and in which surroundings.

    Args:
        arguments: of ``python``: a script, ``-m`` with a module, or ``-c`` with code, each with its arguments.
        environment: all of its environment variables.
        streams: the files for standard input, output and error.
        kill_at_call: number of the call, of those that rename files or bring them to the disk, before which the process
            kills itself.
        largest_file: bytes that a file may have until the system refuses to write more.
    """

    arguments: Sequence[str]
    environment: Mapping[str, str]
    streams: tuple[str, str, str]
    kill_at_call: int | None = None
    largest_file: int | None = None


def run_program(program: Program) -> None:
    """Run a program in this process, which is a new one."""
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(program.environment)
    for stream, file in enumerate(program.streams):
        flags = os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(file, flags | os.O_NOCTTY), stream)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    # In a background job a child would ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if program.largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (program.largest_file, program.largest_file))
    if program.kill_at_call is not None:
        calls = itertools.count(1)
        for name in ("replace", "fsync"):
            setattr(os, name, deadly(getattr(os, name), calls, program.kill_at_call))
    try:
        run_python(list(program.arguments))
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()  # a forked process would leave without


def run_python(arguments: list[str]) -> None:
    """Run a script, a module or code as the interpreter does."""
    kind, *rest = arguments
    sys.path.insert(0, str(ROOT))
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")


def deadly(real: Callable[..., Any], calls: "itertools.count[int]", kill_at_call: int) -> Callable[..., Any]:
    """Return a function that kills this process in place of a given call."""

    def call(*arguments: Any, **options: Any) -> Any:
        if next(calls) == kill_at_call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    return call


class Running:
    """Run a program in a forked process.

    It has the methods of ``subprocess.Popen`` that the tests need.

    Args:
        arguments: of ``python``, see :class:`Program`.
        environment: all of its environment variables.
        streams: files for standard input, output and error; without them the output is kept for :meth:`communicate`.
        options: the others of :class:`Program`.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        streams: tuple[str, str, str] | None = None,
        **options: Any,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._output = [Path(self._folder.name) / name for name in ("out", "err")]
        for file in self._output:
            file.touch()
        files = streams or ("/dev/null", str(self._output[0]), str(self._output[1]))
        program = Program(list(arguments), dict(environment), files, **options)
        self._process = server().Process(target=run_program, args=(program,))
        self._process.start()
        self.pid: int = self._process.pid

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.kill()
        self._process.join()
        self._folder.cleanup()

    @property
    def returncode(self) -> int | None:
        """Return the exit code, ``None`` while it runs, ``-9`` if it was killed."""
        code: int | None = self._process.exitcode
        return code

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    @property
    def out(self) -> str:
        """Return what it has written to standard output so far."""
        return self._output[0].read_text()

    def wait(self, timeout: float) -> int | None:
        """Wait for its end; return its exit code, ``None`` if it still runs."""
        self._process.join(timeout)
        return self.returncode

    def communicate(self, timeout: float = 60.0) -> tuple[str, str]:
        """Wait for its end; return its output and errors."""
        if self.wait(timeout) is None:
            raise subprocess.TimeoutExpired("python", timeout, self.out)
        return self.out, self._output[1].read_text()


def wait_until(condition: Callable[[], object], running: Running, seconds: float = 60.0) -> None:
    """Wait until a condition holds, while a process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert running.poll() is None, running.communicate(0)
        assert time.monotonic() < deadline, running.out
        time.sleep(0.01)


def begin(arguments: list[str], output: Path, **options: Any) -> Running:
    """Start ``train.py`` with ``arguments``, all output to a file.

    The options are those of :class:`Program`.
    """
    return Running(["train.py", *arguments], os.environ, ("/dev/null", str(output), str(output)), **options)


def life(arguments: list[str], output: Path, kill_after: float | None = None, **options: Any) -> int | None:
    """Run ``train.py`` in a forked process; return its exit code, -9 if killed.

    Args:
        arguments: of the command line.
        output: file for what it prints.
        kill_after: seconds after which it is killed, if it still runs.
        options: of :class:`Program`.
    """
    with begin(arguments, output, **options) as running:
        running.wait(120 if kill_after is None else kill_after)
        running.kill()
        return running.wait(120)
