"""Where a run's numbers go: a CSV file always, Weights & Biases when asked or when a key is configured."""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


def make_loggers(folder: Path, experiment: str, wandb: bool | None) -> list[Logger]:
    """Return the loggers of a run; the CSV file comes first, so that the run's folder is the one Lightning writes to.

    Args:
        folder: of the run.
        experiment: the run's group.
        wandb: whether to log to Weights & Biases; ``None`` does so only where a key is configured. Without a key the run
            is recorded offline, and a line says how to upload it.
    """
    parent, version = folder.parent, folder.name
    loggers: list[Logger] = [CSVLogger(save_dir=str(parent.parent), name=parent.name, version=version)]
    if rank_zero_only.rank == 0 and wandb is not False:
        key = _has_key()
        if wandb or key:
            loggers.append(_wandb_logger(folder, experiment, online=key))
    return loggers


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    homes = [os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"]
    if not any(home and Path(home).is_file() for home in homes):
        return False
    import wandb

    return bool(wandb.api.api_key)


def _wandb_logger(folder: Path, experiment: str, online: bool) -> Logger:
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    def start(mode: str) -> Any:
        settings = wandb.Settings(console="off", silent=True, init_timeout=30)
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ars2"),
            group=experiment,
            name=f"{experiment}-{folder.name}",
            dir=str(folder),
            mode=mode,  # type: ignore[arg-type]
            settings=settings,
        )

    mode = os.environ.get("WANDB_MODE", "online" if online else "offline")
    try:
        run = start(mode)
    except Exception as error:
        if mode != "online":
            raise
        print(f"W&B cannot be reached ({type(error).__name__}): the run is recorded offline")
        mode, run = "offline", start("offline")
    if mode == "offline":
        print(f"W&B records offline; upload the run with: wandb sync {Path(run.dir).parent}")
    return WandbLogger(experiment=run, save_dir=str(folder))
