"""The folder of a run: made for it alone, held while it lasts, and found again when it is to go on."""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import IO, Any

import yaml

try:
    import fcntl
except ImportError:  # not everywhere: there, two runs must not be told to go on with one folder at the same time
    fcntl = None  # type: ignore[assignment]

FOLDER = "ARS2_RUN_FOLDER"
# How a run is continued does not make it another run, nor does the task's name, which a run learns from its classes.
_NOT_COMPARED = ("ckpt_path", "weights_only", "task")
_held: list[IO[str]] = []


def run_folder(parent: Path, stem: str) -> Path:
    """Make a folder of its own for this run, also where two start at once; its other processes are given the same."""
    if FOLDER in os.environ:
        return Path(os.environ[FOLDER])
    for number in range(1000):
        folder = parent / (stem if number == 0 else f"{stem}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            os.environ[FOLDER] = str(folder)
            return folder
    raise FileExistsError(f"{parent} is full of runs named {stem}: name another --runs folder")


def hold(folder: Path) -> bool:
    """Take ``folder`` for this process until :func:`let_go` or its death; ``False`` if another process has it."""
    if fcntl is None:
        return True
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(folder / ".lock", "a", encoding="utf-8"))
        try:
            # Not flock: workers that outlive a killed process for a moment would still hold that.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
        stack.pop_all()
    _held.append(file)
    return True


def let_go() -> None:
    """Give back every folder that this process holds."""
    while _held:
        _held.pop().close()


def unfinished_run(parent: Path, config: dict[str, Any]) -> Path | None:
    """Return, held for this process, the newest run folder in ``parent`` whose run can go on under ``config``.

    That is a run of the same options, seed included, that was killed, stopped or failed, and is not running now.

    Args:
        parent: the folder of the experiment.
        config: the resolved options of this run, as they would be saved in its ``config.yaml``.
    """
    names = (path for path in parent.glob(f"*-seed{config.get('seed_everything')}*") if path.is_dir())
    for folder in sorted(names, key=_age, reverse=True):
        if _is_finished(folder) or _options(folder) != _comparable(config):
            continue
        if hold(folder):
            return folder
    return None


def runs_of(parent: Path, config: dict[str, Any]) -> list[Path]:
    """Return the run folders in ``parent`` of the same model, optimizer and seed as ``config``, the newest first.

    Options that one of the two does not know do not count: it is of another version.
    """
    newest_first = sorted((path for path in parent.glob("*-seed*") if path.is_dir()), key=_age, reverse=True)
    found = ((folder, _options(folder) or {}) for folder in newest_first)
    compared = ("model", "seed_everything")
    return [folder for folder, saved in found if all(_agree(saved.get(key), config.get(key)) for key in compared)]


def _agree(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_agree(one[key], other[key]) for key in one.keys() & other.keys())
    return bool(one == other)


def _age(folder: Path) -> tuple[str, int]:
    """Order folders by the time in their names, and those of one second by their numbers."""
    match = re.fullmatch(r"(.*-seed-?\w+?)(?:-(\d+))?", folder.name)
    return (folder.name, 0) if match is None else (match[1], int(match[2] or 0))


def _is_finished(folder: Path) -> bool:
    try:
        status = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(status != "interrupted")


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _NOT_COMPARED}


def _options(folder: Path) -> dict[str, Any] | None:
    """Return the options of the run in ``folder``; ``None`` where it was killed before it had saved them."""
    try:
        saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return _comparable(saved) if isinstance(saved, dict) else None
