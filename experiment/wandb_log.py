"""Log to Weights & Biases without ever stopping training."""

import contextlib
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from experiment.identity import RunIdentity

# Seconds; the environment variables WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT take precedence.
_INIT_TIMEOUT, _FINISH_TIMEOUT = 10.0, 60.0


def quiet_wandb() -> Any:
    """Import wandb without console messages and error telemetry.

    The telemetry can delay the exit.

    Raises:
        ValueError: it is not installed.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ValueError(
            "logging to Weights & Biases needs the package wandb: install it (pip install wandb), or leave out --wandb"
        ) from error
    return wandb


class RunWandbLogger(WandbLogger):
    """Log to W&B. If W&B fails, print one line and continue training.

    W&B writes every row to a local file before sending it, and training never waits for the server. If the server
    does not answer or refuses at the start, the run is recorded offline. If it fails later, training and the local
    file continue, and the end of the run waits for the server only until a timeout. If W&B's own process dies, which
    writes its file in blocks, all rows go into a new offline record. In each case a line prints the command that
    uploads the record. A resumed run keeps its id.

    Args:
        folder: of the run.
        config: of the run, resolved; the run is named and grouped by it.
        online: whether an API key is configured; ``WANDB_MODE`` takes precedence.
        resumes: whether the run is resumed in a folder that has its earlier record.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], online: bool, resumes: bool) -> None:
        self.folder, self.config = folder, config
        self.run_id = _latest_id(folder) if resumes else None
        self.resume = "allow" if self.run_id else None
        self.mode = os.environ.get("WANDB_MODE", "online" if online else "offline")
        self.died = False
        # All rows so far, in an unnamed file that disappears with the process: a long run has too many for memory.
        self._rows = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        super().__init__(experiment=self._begin(), save_dir=str(folder))

    def _begin(self) -> Any:
        quiet_wandb()  # outside the try block, because a missing package is not a failure of the server
        before = set(_records(self.folder))
        try:
            run = self._start()
        except Exception as error:
            if self.mode != "online":
                raise
            print(f"W&B cannot be reached ({type(error).__name__}): the run is recorded offline")
            for attempt in set(_records(self.folder)) - before:
                shutil.rmtree(attempt, ignore_errors=True)
            self.mode = "offline"
            run = self._start()
        if self.mode == "offline":
            print(f"W&B records offline; {self._upload_command()}")
        elif run.url:
            print(f"W&B records at {run.url}")
        return run

    def _start(self) -> Any:
        wandb = quiet_wandb()
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ars2"),
            **init_arguments(self.config),
            id=self.run_id,
            # Offline too: the upload then appends its rows to those of the run's earlier records.
            resume=self.resume,
            dir=str(self.folder),
            mode=self.mode,
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", _INIT_TIMEOUT)),
                finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT", _FINISH_TIMEOUT)),
                finish_timeout_raises=True,
            ),
        )

    def _upload_command(self) -> str:
        records = [path for path in _records(self.folder) if path.name.startswith("offline-") or self.mode != "offline"]
        online = [] if all(path.name.startswith("offline-") for path in records) else ["--include-online"]
        return " ".join(["upload the run with: wandb sync", *online, *map(str, records)])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log a row."""
        self.attempt(lambda: super(RunWandbLogger, self).log_metrics(metrics, step))
        with contextlib.suppress(OSError):  # the CSV log reports a full disk
            pickle.dump((dict(metrics), step), self._rows)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Add to the run's config."""
        self.attempt(lambda: super(RunWandbLogger, self).log_hyperparams(params))

    def attempt(self, action: Callable[[], Any]) -> None:
        """Call ``action``; retry it offline once, then disable W&B."""
        if self.died and self.mode != "offline":
            return
        try:
            action()
        except Exception as error:
            if self.died:
                self.mode = "gone"
                print(f"W&B has failed again ({type(error).__name__}: {error}): it records nothing more of this run")
                return
            self.died = True
            self._restart_offline(error)
            self.attempt(action)

    def _restart_offline(self, error: Exception) -> None:
        print(f"W&B has failed ({type(error).__name__}: {error}): the run is recorded anew, offline")
        run: Any = self._experiment
        self.run_id, self.mode = run.id, "offline"
        with contextlib.suppress(Exception):  # a dead service cannot be closed
            quiet_wandb().teardown()
        try:
            self._experiment = self._begin()
            self._rows.seek(0)
            with contextlib.suppress(EOFError):
                while True:
                    super().log_metrics(*pickle.load(self._rows))
        except Exception as another:
            self.mode = "gone"
            print(f"W&B cannot record offline either ({type(another).__name__}: {another})")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Finish the run, and print how to upload it if the upload is incomplete.

        Args:
            status: ``"success"``, or another status of Lightning.
        """
        run: Any = self._experiment
        if self.mode == "gone" or run is None:
            return
        finished = True
        try:
            run.finish(exit_code=int(status != "success"))
        except Exception:
            finished = False
        if self.mode == "online" and not (finished and _was_uploaded(Path(run.dir).parent)):
            print(f"W&B did not receive all of the run; {self._upload_command()}")


def _records(folder: Path) -> list[Path]:
    """Return the folders of W&B's records of a run, the oldest first."""
    found = [path for path in (folder / "wandb").glob("*run-*-*") if path.is_dir() and not path.is_symlink()]
    return sorted(found, key=lambda path: path.name.removeprefix("offline-"))


def _latest_id(folder: Path) -> str | None:
    records = _records(folder)
    return records[-1].name.rpartition("-")[2] if records else None


def _was_uploaded(record: Path) -> bool:
    """Return whether W&B's debug log, the only source, lists no refused upload."""
    try:
        return "filestream: fatal error" not in (record / "logs/debug-internal.log").read_text(encoding="utf-8")
    except OSError:
        return True


def nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` without ``init_args`` levels, class paths as ``class``.

    W&B then shows the learning rate as ``model.optimizer.lr``, a number that runs can be filtered by.
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key == "class_path":
            flat["class"] = value
        elif isinstance(value, Mapping):
            flat |= nested(value) if key == "init_args" else {key: nested(value)}
        else:
            flat[key] = value
    return flat


def init_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return name, group, tags and config for ``wandb.init``.

    The name is the run's row in a report and its seed, such as ``grok_sync, seed 0``. The group is everything but the
    seed, with a digest of the settings. The tags are task, optimizer, protocol, and the search that the run is of. The
    config also has ``task``, ``row``, ``optimizer``, ``group``, ``seed`` and ``protocol`` as keys to filter by.
    """
    identity = RunIdentity(config)
    about = {
        "task": identity.task,
        "row": identity.row,
        "optimizer": identity.optimizer,
        "group": identity.group,
        "seed": identity.seed,
        "protocol": identity.protocol_digest,
    }
    tags = [identity.task, identity.optimizer, f"protocol {identity.protocol_digest}"]
    if identity.sweep is not None:
        tags.append(f"sweep {identity.sweep.name}"[:64])  # W&B's maximum length
    return {"name": identity.name, "group": identity.group, "tags": tags, "config": {**nested(config), **about}}
