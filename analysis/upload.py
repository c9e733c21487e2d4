"""Send a report to Weights & Biases, as a page and as an artifact."""

import os
from pathlib import Path
from typing import Any

from analysis.report import FILES, pictures
from experiment.loggers import has_key
from experiment.wandb_log import quiet_wandb


def upload(folder: Path, project: str, title: str) -> str:
    """Send a report.

    Args:
        folder: as :func:`analysis.report.write` left it.
        project: where to.
        title: of the report.

    Returns:
        A sentence that names its address. Without a key the report is recorded offline beside the folder.
    """
    wandb = quiet_wandb()
    mode: Any = os.environ.get("WANDB_MODE", "online" if has_key() else "offline")
    settings = wandb.Settings(console="off", silent=True)
    run = wandb.init(project=project, name=title, job_type="report", dir=str(folder), mode=mode, settings=settings)
    run.log({"report": wandb.Html((folder / "report.html").read_text(encoding="utf-8"), inject=False)})
    artifact = wandb.Artifact("report", type="report", metadata={"title": title})
    for file in [*(folder / name for name in FILES), *pictures(folder)]:
        artifact.add_file(str(file), name=file.relative_to(folder).as_posix())
    run.log_artifact(artifact)
    place, url = Path(run.dir).parent, run.url
    run.finish()
    return f"W&B has the report at {url}" if mode == "online" else f"upload the report with: wandb sync {place}"
