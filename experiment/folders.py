"""Create, lock and find the folders of runs."""

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import yaml

try:
    import fcntl
except ImportError:  # Windows has no such locks: two processes must not resume one folder at the same time there
    fcntl = None  # type: ignore[assignment]

LAST, PREVIOUS, BEST = "last.ckpt", "last-previous.ckpt", "best.ckpt"
# The hand-over to child processes, which train in the folder of the process that started them.
_VARIABLE = "ARS2_RUN_FOLDER"
# Options that do not identify a run: resuming continues it, and the task's name follows from its classes.
_NOT_COMPARED = ("ckpt_path", "weights_only", "task")
_RESULTS = ("summary.json", "metrics.csv", "checkpoints", "wandb")
_locks: list[IO[str]] = []


class RunFolder:
    """A run's folder and the files in it.

    Args:
        path: of the folder, which exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunFolder) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def create(cls, parent: Path, stem: str) -> "RunFolder":
        """Create a folder in ``parent``, numbered if its name is taken.

        Raises:
            FileExistsError: a thousand folders have this name.
        """
        for number in range(1000):
            path = parent / (stem if number == 0 else f"{stem}-{number}")
            with contextlib.suppress(FileExistsError):
                path.mkdir(parents=True)
                return cls(path)
        raise FileExistsError(f"{parent} is full of runs named {stem}: name another --runs folder")

    @classmethod
    def current(cls) -> "RunFolder | None":
        """Return the folder of the run that this process takes part in, if it has one yet."""
        return cls(Path(os.environ[_VARIABLE])) if _VARIABLE in os.environ else None

    def make_current(self) -> None:
        """Make this the run folder of this process and of its child processes."""
        os.environ[_VARIABLE] = str(self.path)

    def last_checkpoint(self) -> Path | None:
        """Return the last checkpoint, or the previous one where that is missing."""
        paths = (self.path / "checkpoints" / name for name in (LAST, PREVIOUS))
        return next((path for path in paths if path.exists()), None)

    def best_checkpoint(self) -> Path | None:
        """Return the checkpoint of the best epoch, if there is one."""
        path = self.path / "checkpoints" / BEST
        return path if path.exists() else None

    def config(self) -> dict[str, Any] | None:
        """Return the resolved config; ``None`` if the run was killed before saving it."""
        try:
            saved = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return None
        return saved if isinstance(saved, dict) else None

    def is_finished(self) -> bool:
        """Return whether the run ended by itself."""
        try:
            status = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))["status"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return bool(status != "interrupted")

    def has_results(self) -> bool:
        """Return whether anything was trained, logged or evaluated."""
        return any((self.path / name).exists() for name in _RESULTS)


def leave_current() -> None:
    """Forget the current run folder, so that the next run creates its own."""
    os.environ.pop(_VARIABLE, None)


def lock(folder: Path) -> bool:
    """Lock ``folder``; ``False`` if another process has locked it.

    The lock lasts until :func:`unlock_all` or the end of this process.
    """
    if fcntl is None:
        return True
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(folder / ".lock", "a", encoding="utf-8"))
        try:
            # Not flock: workers that outlive a killed process for a moment would keep that.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
        stack.pop_all()
    _locks.append(file)
    return True


def unlock_all() -> None:
    """Unlock every folder that this process has locked."""
    while _locks:
        _locks.pop().close()


def find_unfinished(parent: Path, config: Mapping[str, Any]) -> RunFolder | None:
    """Return, locked, the newest run that can be resumed under ``config``.

    Such a run has the same options, seed included, was killed, stopped or failed, and is not running now.

    Args:
        parent: the folder of the experiment.
        config: the resolved options of this run, as ``config.yaml`` would have them.
    """
    for folder in _newest_first(parent, f"*-seed{config.get('seed_everything')}*"):
        saved = folder.config()
        if folder.is_finished() or saved is None or _comparable(saved) != _comparable(config):
            continue
        if lock(folder.path):
            return folder
    return None


def find_runs(parent: Path, config: Mapping[str, Any]) -> list[RunFolder]:
    """Return the runs of the model, optimizer and seed of ``config``.

    The newest run comes first.

    Options that only one of the two configs has are ignored, because another version of the project wrote them.
    """
    return [
        folder
        for folder in _newest_first(parent, "*-seed*")
        if all(_agree((folder.config() or {}).get(key), config.get(key)) for key in ("model", "seed_everything"))
    ]


def _newest_first(parent: Path, pattern: str) -> list[RunFolder]:
    return [RunFolder(path) for path in sorted(parent.glob(pattern), key=_age, reverse=True) if path.is_dir()]


def _agree(left: Any, right: Any) -> bool:
    """Return whether two configs are equal in the keys that both have."""
    if isinstance(left, dict) and isinstance(right, dict):
        return all(_agree(left[key], right[key]) for key in left.keys() & right.keys())
    return bool(left == right)


def _age(folder: Path) -> tuple[str, int]:
    """Order folders by the time in their names, then by their number."""
    match = re.fullmatch(r"(.*-seed-?\w+?)(?:-(\d+))?", folder.name)
    return (folder.name, 0) if match is None else (match[1], int(match[2] or 0))


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _NOT_COMPARED}
