"""Where a run's numbers go: a CSV file always, Weights & Biases when asked or when a key is configured."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from experiment.csv_log import RunCSVLogger
from experiment.wandb_log import RunWandbLogger, quiet_wandb


def make_loggers(folder: Path, config: Mapping[str, Any], wandb: bool | None, resumes: bool = False) -> list[Logger]:
    """Return the loggers of a run; the CSV file comes first, so that the run's folder is the one Lightning writes to.

    Args:
        folder: of the run.
        config: of the run, resolved; Weights & Biases names and groups the run by it, and records it.
        wandb: whether to log to Weights & Biases; ``None`` does so only where a key is configured. Without a key, or
            where the server fails, the run is recorded offline, see :class:`experiment.wandb_log.RunWandbLogger`.
        resumes: whether the run goes on in a folder that has rows of it.

    Raises:
        ValueError: ``wandb`` is true and its package is not installed.
    """
    loggers: list[Logger] = [RunCSVLogger(folder, resumes)]
    if getattr(rank_zero_only, "rank", 0) or wandb is False:
        return loggers
    if wandb is None and importlib.util.find_spec("wandb") is None:
        if os.environ.get("WANDB_API_KEY"):
            print("WANDB_API_KEY is set and the package wandb is not installed: this run is not logged there")
        return loggers
    key = has_key()
    if wandb or key:
        loggers.append(RunWandbLogger(folder, config, key, resumes))
    return loggers


def has_key() -> bool:
    """Return whether a key of Weights & Biases is configured."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    homes = [os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"]
    if not any(home and Path(home).is_file() for home in homes):
        return False
    # In that mode wandb denies that there is a key; who sets it wants a record.
    return os.environ.get("WANDB_MODE") == "offline" or bool(quiet_wandb().login(prompt=False, verify=False))
