"""Weights & Biases as a logger that is never in the way of training, and whose record can always be uploaded."""

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

from experiment.wandb_naming import init_arguments

# Seconds that the server has to answer at first, and to take what is left at the end. WANDB_INIT_TIMEOUT and
# WANDB_FINISH_TIMEOUT say otherwise.
_PATIENCE, _LAST_PATIENCE = 10.0, 60.0


def quiet_wandb() -> Any:
    """Import wandb, whose messages repeat ours or tell how to log in, and whose own telemetry can hold up the exit.

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
    """Lightning's logger for one run, which W&B's failures cost nothing but a line.

    W&B writes every row to a file of its own before it is sent, and rows never wait for the server. Where the server
    does not answer or refuses at first, the run is recorded offline; where it fails later, training and the file go on,
    and the end waits for it only so long. If W&B's own process dies, which writes its file in blocks, all rows go into
    a new, offline record. In each of these a line tells the command that uploads the record. A run that goes on in its
    folder has the same id as before.

    Args:
        folder: of the run.
        config: of the run, resolved; the run is named and grouped by it.
        online: whether there is a key; ``WANDB_MODE`` says otherwise.
        resumes: whether the run goes on in a folder that has its earlier record.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], online: bool, resumes: bool) -> None:
        self.folder, self.config = folder, config
        self.run_id = _latest_id(folder) if resumes else None
        self.resume = "allow" if self.run_id else None
        self.mode = os.environ.get("WANDB_MODE", "online" if online else "offline")
        self.died = False
        # Every row so far, on disk: a long run has many. It has no name there, and so goes with the process.
        self._rows = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        super().__init__(experiment=self._begin(), save_dir=str(folder))

    def _begin(self) -> Any:
        quiet_wandb()  # outside the block below: a missing package is no failure of the server
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
            print(f"W&B records offline; {self._how_to_upload()}")
        elif run.url:
            print(f"W&B records at {run.url}")
        return run

    def _start(self) -> Any:
        wandb = quiet_wandb()
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ars2"),
            **init_arguments(self.config),
            id=self.run_id,
            # An offline record says so too: its rows are then uploaded behind those of the run's earlier records.
            resume=self.resume,
            dir=str(self.folder),
            mode=self.mode,
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", _PATIENCE)),
                finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT", _LAST_PATIENCE)),
                finish_timeout_raises=True,
            ),
        )

    def _how_to_upload(self) -> str:
        records = [path for path in _records(self.folder) if path.name.startswith("offline-") or self.mode != "offline"]
        online = [] if all(path.name.startswith("offline-") for path in records) else ["--include-online"]
        return " ".join(["upload the run with: wandb sync", *online, *map(str, records)])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Take in a row."""
        self.attempt(lambda: super(RunWandbLogger, self).log_metrics(metrics, step))
        with contextlib.suppress(OSError):  # of a full disk, the log itself will tell
            pickle.dump((dict(metrics), step), self._rows)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Add to the run's config."""
        self.attempt(lambda: super(RunWandbLogger, self).log_hyperparams(params))

    def attempt(self, action: Callable[[], Any]) -> None:
        """Do something with the run; if it fails, with an offline record; if that fails too, nothing from then on."""
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
            self._begin_again(error)
            self.attempt(action)

    def _begin_again(self, error: Exception) -> None:
        print(f"W&B has failed ({type(error).__name__}: {error}): the run is recorded anew, offline")
        run: Any = self._experiment
        self.run_id, self.mode = run.id, "offline"
        with contextlib.suppress(Exception):  # of what is dead nothing is to be closed
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
        """End the run, and say so if the server has not taken all of it.

        Args:
            status: ``"success"``, or what Lightning calls another end.
        """
        run: Any = self._experiment
        if self.mode == "gone" or run is None:
            return
        taken = True
        try:
            run.finish(exit_code=int(status != "success"))
        except Exception:
            taken = False
        if self.mode == "online" and not (taken and _was_taken(Path(run.dir).parent)):
            print(f"W&B has not taken all of the run; {self._how_to_upload()}")


def _records(folder: Path) -> list[Path]:
    """Return the folders of W&B's records of a run, the oldest first."""
    found = [path for path in (folder / "wandb").glob("*run-*-*") if path.is_dir() and not path.is_symlink()]
    return sorted(found, key=lambda path: path.name.removeprefix("offline-"))


def _latest_id(folder: Path) -> str | None:
    records = _records(folder)
    return records[-1].name.rpartition("-")[2] if records else None


def _was_taken(record: Path) -> bool:
    """Say whether W&B's own log has no refusal that ended the upload; nobody is told of it otherwise."""
    try:
        return "filestream: fatal error" not in (record / "logs/debug-internal.log").read_text(encoding="utf-8")
    except OSError:
        return True
