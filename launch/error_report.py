"""Report an exception as one line, with its traceback in a file."""

import contextlib
import linecache
import re
import shutil
import sys
import sysconfig
import traceback
from pathlib import Path

from experiment.distributed import is_rank_zero, launched_rank
from experiment.folders import RunFolder
from launch.errors import LOST_PROCESS, REFUSED_VALUE, one_line, worker_traceback

# The project's packages; users may add their own modules to those of the tasks.
_PROJECT = {"analysis", "ars2", "callbacks", "datamodules", "experiment", "launch", "modules", "studies", "__main__"}
_TASKS = ("modules", "datamodules")
# The suite's code that calls tasks; an operation of the task may fail in its backward pass.
_BASES = ("datamodules.batches", "modules.evaluation", "modules.optimizers", "modules.resuming", "modules.two_pass")
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


def report(error: Exception, debug: bool = False) -> int:
    """Print ``error``, save its traceback, and return the exit code.

    A run folder in which nothing was trained yet is removed. The traceback goes into ``error.txt`` in the run folder,
    or in the data cache where there is none. No file is written if the line suffices.

    Args:
        error: the exception that ended the command.
        debug: whether to print the traceback before the line.
    """
    source, place = locate(error)
    folder = RunFolder.current()
    message = one_line(source if REFUSED_VALUE in str(error) else error, folder) + place
    if folder is not None and is_rank_zero() and not folder.has_results():
        shutil.rmtree(folder.path, ignore_errors=True)
        folder = None
    if folder is not None or place or not isinstance(error, (ValueError, OSError)):
        # Imported here because only errors need it.
        from datamodules.token_cache import default_cache

        # Each process has a file, because the others fail too when they lose the connection to the first that fails.
        name = "error.txt" if is_rank_zero() else f"error-rank{launched_rank()}.txt"
        details = (default_cache() if folder is None else folder.path) / name
        with contextlib.suppress(OSError):
            details.parent.mkdir(parents=True, exist_ok=True)
            details.write_text("".join(traceback.format_exception(error)))
            message += f" (details in {details})"
    if debug:
        traceback.print_exception(error)
    # In one piece, because several processes may write at the same time.
    sys.stderr.write(f"error: {message}\n")
    return 1


def locate(error: BaseException) -> tuple[BaseException, str]:
    """Return the exception raised in the user's code, and `` (file, line n)``.

    Without such an exception, return ``error`` and an empty string. A user's class may be among the suite's tasks, in
    modules/ or datamodules/. There, a line that raises the exception itself is a deliberate error message, and any
    other line is a bug.
    """
    cause: BaseException | None = None if LOST_PROCESS.search(str(error)) else error
    while cause is not None:
        if isinstance(cause, SyntaxError) and cause.filename and Path(cause.filename).is_file():
            return cause, f" ({cause.filename}, line {cause.lineno})"
        places = _places(cause)
        project = [(name, file, line) for name, file, line in places if not file.startswith(_LIBRARIES)]
        is_message = any(_is_message(*place) for place in places[-1:])
        for name, file, line in reversed(project):
            package = name.partition(".")[0]
            is_refused_value = isinstance(cause, (ValueError, OSError)) and (name, file, line) != places[-1]
            is_task = package in _TASKS and name not in _BASES
            if package not in _PROJECT or (is_task and not is_message and not is_refused_value):
                return cause, f" ({file}, line {line})"
        cause = cause.__cause__ or cause.__context__
    return error, ""


def _is_message(name: str, file: str, line: int) -> bool:
    """Return whether the line raises an error of the project itself."""
    return name.partition(".")[0] in _PROJECT and linecache.getline(file, line).strip().startswith("raise ")


def _places(error: BaseException) -> list[tuple[str, str, int]]:
    """Return module, file and line of the traceback's frames, outermost first."""
    names = {getattr(module, "__file__", None): name for name, module in list(sys.modules.items())}
    # Another process leaves only the text of its traceback.
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    frames += [(file, int(line)) for file, line in re.findall(r'File "(.+)", line (\d+)', worker_traceback(error))]
    return [(names.get(file) or Path(file).stem, file, line) for file, line in frames if Path(file).is_file()]
