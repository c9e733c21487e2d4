"""Create the loggers of a run, a CSV file and optionally Weights & Biases."""

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
    """Return the loggers of a run, the CSV file first.

    Lightning writes its files to the folder of the first logger.

    Args:
        folder: of the run.
        config: of the run, resolved; Weights & Biases records it, and names and groups the run by it.
        wandb: whether to log to Weights & Biases; ``None`` logs only if a key is configured. Without a key, or if the
            server fails, the run is recorded offline, see :class:`experiment.wandb_log.RunWandbLogger`.
        resumes: whether the run is resumed in a folder that has its earlier rows.

    Raises:
        ValueError: ``wandb`` is true and its package is not installed.
    """
    loggers: list[Logger] = [RunCSVLogger(folder, resumes)]
    if getattr(rank_zero_only, "rank", 0) or wandb is False:
        return loggers
    if wandb is None and importlib.util.find_spec("wandb") is None:
        if os.environ.get("WANDB_API_KEY"):
            print("WANDB_API_KEY is set, but the package wandb is not installed: this run is not logged to W&B")
        return loggers
    key = has_key()
    if wandb or key:
        loggers.append(RunWandbLogger(folder, config, key, resumes))
    return loggers


def has_key() -> bool:
    """Return whether an API key of Weights & Biases is configured."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    homes = [os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"]
    if not any(home and Path(home).is_file() for home in homes):
        return False
    # In offline mode wandb reports no key, but the user wants a record.
    return os.environ.get("WANDB_MODE") == "offline" or bool(quiet_wandb().login(prompt=False, verify=False))
