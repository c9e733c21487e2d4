"""Save the project's dashboard on Weights & Biases.

    python -m analysis.dashboard ENTITY/PROJECT modular_addition cifar wikitext

It needs a key. The dashboard is a W&B report with a section a task, and updates as runs come in. The sections of a
workspace would all show the same runs. Runs are grouped by everything but the seed. Rows, axes and titles have the
names of a report of compare.py.
"""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from analysis.rows import AXIS, TITLES
from analysis.runs import AXES, curve_title

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr

# Validation metric by task; a task that is not here has its loss alone.
METRICS = {"modular_addition": "val/accuracy", "cifar": "val/accuracy", "wikitext": "val/perplexity"}


def panels(metric: str) -> list[Any]:
    """Return the panels of a task, its metric over every axis among them."""
    import wandb_workspaces.reports.v2 as wr

    def line(x: str, *y: str, log: bool = False) -> wr.LinePlot:
        # Groups of runs that differ in their seeds: mean, and the deviation as a band.
        return wr.LinePlot(
            title=curve_title(" and ".join(y), x),
            x=x,
            y=list(y),
            log_y=log,
            groupby=wr.Config("group"),
            groupby_aggfunc="mean",
            groupby_rangefunc="stddev",
            smoothing_type="none",
        )

    lower = not metric.endswith("accuracy")
    return [
        *(line(axis, metric, log=lower) for axis in AXES),
        *(line(AXIS, loss, log=True) for loss in ("train/loss", "val/loss") if loss != metric),
        line("cost/optimizer_steps", "flatness/phi", "flatness/threshold"),
        line("cost/optimizer_steps", "flatness/trigger_rate"),
        line("cost/optimizer_steps", "flatness/hessian_top", log=True),
        line("cost/optimizer_steps", "optimizer/update_ratio_matrix", log=True),
        wr.BarPlot(
            title=f"best {metric}",
            metrics=[f"{metric}.{'min' if lower else 'max'}"],
            groupby=wr.Config("group"),
            groupby_aggfunc="mean",
            groupby_rangefunc="stddev",
        ),
        wr.MediaBrowser(
            title="pictures",
            media_keys=["pictures/curves", "pictures/second_passes", "loss_surface", "test/confusion_matrix"],
        ),
        wr.RunComparer(diff_only=True),
    ]


def dashboard(entity: str, project: str, tasks: list[str]) -> "wr.Report":
    """Return the dashboard; nothing is sent before its ``save``.

    Args:
        entity: user or team.
        project: that the runs are in.
        tasks: the names that runs have, see :class:`experiment.identity.RunIdentity`.
    """
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces import expr

    blocks: list[Any] = []
    for task in tasks:
        runs = wr.Runset(
            name=task,
            filters=[expr.Config("task") == task],
            groupby=["config.row", "config.group"],
        )
        text = "Groups differ in their settings, runs of a group in their seeds; protocols are tags."
        grid = wr.PanelGrid(runsets=[runs], panels=panels(METRICS.get(task, "val/loss")))
        blocks += [wr.H2(text=TITLES.get(task, task.replace("_", " "))), wr.P(text=text), grid]
    return wr.Report(
        entity=entity,
        project=project,
        title="Optimizers, by task",
        description="Values reached by each optimizer, over each cost.",
        width="fluid",
        blocks=blocks,
    )


def main() -> int:
    """Save the dashboard and print where it is; returns the exit code."""
    parser = argparse.ArgumentParser(prog="analysis.dashboard", description="Save the dashboard to W&B.")
    parser.add_argument("place", metavar="ENTITY/PROJECT")
    parser.add_argument("tasks", nargs="*", default=list(METRICS))
    options = parser.parse_args()
    entity, _, project = options.place.partition("/")
    if not project:
        parser.error(f"the place is ENTITY/PROJECT, got {options.place}")
    try:
        from experiment.loggers import has_key  # takes seconds, as it imports Lightning

        if not has_key():
            raise ValueError("there is no key of Weights & Biases: run wandb login, or set WANDB_API_KEY")
        report = dashboard(entity, project, options.tasks)
        report.save()
    except ModuleNotFoundError as error:
        print(f"error: the dashboard needs the package {error.name}: pip install wandb-workspaces", file=sys.stderr)
        return 1
    except Exception as error:  # wandb raises dozens of exception types
        print(
            f"error: the dashboard could not be saved in {options.place}: {' '.join(str(error).split())}",
            file=sys.stderr,
        )
        return 1
    print(f"dashboard: {report.url}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
