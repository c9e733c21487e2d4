"""Where a run's numbers go: a CSV file always, Weights & Biases when asked or when a key is configured."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from csv_rows import RunCSVLogger
from wandb_naming import init_arguments

_PATIENCE = 10.0  # seconds for the server to answer; WANDB_INIT_TIMEOUT says otherwise


def make_loggers(folder: Path, config: Mapping[str, Any], wandb: bool | None, resumes: bool = False) -> list[Logger]:
    """Return the loggers of a run; the CSV file comes first, so that the run's folder is the one Lightning writes to.

    Args:
        folder: of the run.
        config: of the run, resolved; Weights & Biases names and groups the run by it, and records it.
        wandb: whether to log to Weights & Biases; ``None`` does so only where a key is configured. Without a key, or
            where the server does not answer, the run is recorded offline, and a line says how to upload it.
        resumes: whether the run goes on in a folder that has rows of it.
    """
    loggers: list[Logger] = [RunCSVLogger(folder, resumes)]
    if not getattr(rank_zero_only, "rank", 0) and wandb is not False:
        key = has_key()
        if wandb or key:
            loggers.append(_wandb_logger(folder, config, online=key))
    return loggers


def has_key() -> bool:
    """Return whether a key of Weights & Biases is configured."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    homes = [os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"]
    if not any(home and Path(home).is_file() for home in homes):
        return False
    # In that mode wandb denies that there is a key; who sets it wants a record.
    return os.environ.get("WANDB_MODE") == "offline" or bool(_quiet_wandb().login(prompt=False, verify=False))


def _quiet_wandb() -> Any:
    """Import wandb, whose messages repeat ours or tell how to log in."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    return wandb


def _wandb_logger(folder: Path, config: Mapping[str, Any], online: bool) -> Logger:
    from lightning.pytorch.loggers import WandbLogger

    wandb = _quiet_wandb()

    def start(mode: str) -> Any:
        patience = float(os.environ.get("WANDB_INIT_TIMEOUT", _PATIENCE))
        settings = wandb.Settings(console="off", silent=True, init_timeout=patience)
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ars2"),
            **init_arguments(config),
            dir=str(folder),
            mode=mode,
            settings=settings,
        )

    mode = os.environ.get("WANDB_MODE", "online" if online else "offline")
    try:
        run = start(mode)
    except Exception as error:
        if mode != "online":
            raise
        print(f"W&B cannot be reached ({type(error).__name__}): the run is recorded offline")
        for attempt in (folder / "wandb").glob("run-*"):
            shutil.rmtree(attempt, ignore_errors=True)
        mode, run = "offline", start("offline")
    if mode == "offline":
        print(f"W&B records offline; upload the run with: wandb sync {Path(run.dir).parent}")
    elif run.url:
        print(f"W&B records at {run.url}")
    return WandbLogger(experiment=run, save_dir=str(folder))
