"""Show the progress of a sweep, and a table of the winners at the end."""

from pathlib import Path
from statistics import fmean

from optuna.trial import TrialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from experiment.quantities import duration
from launch import trial
from launch.search import Runner, Search, run_jobs
from launch.sweep_specification import Sweep


class TimeColumn(ProgressColumn):
    """Show the time since the start, and the time that may be left."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        left = "" if task.time_remaining is None else f", {duration(task.time_remaining)} left"
        return Text(f"{duration(round(task.elapsed or 0.0))}{left}")


def run(sweep: Sweep, folder: Path, workers: int, runner: Runner = trial.run) -> None:
    """Run all trials, the best ones on further seeds, and the winners on fresh ones.

    At the end the table of winners is printed.

    Args:
        sweep: what to run.
        folder: of the sweep.
        workers: runs at a time.
        runner: see :class:`launch.search.Search`.
    """
    console = Console(highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeColumn())
    with Progress(*columns, console=console) as bar:
        search = Search(sweep, folder, trial.server(), lambda line: bar.console.print(line), runner)
        for what, jobs in (("trials", search.trials), ("best trials", search.rejudged), ("winners", search.finals)):
            todo = list(jobs())
            if not todo:  # a bar would show 0 of 0, and the time of another part
                continue
            task = bar.add_task(f"{sweep.name}: {what}", total=len(todo))
            run_jobs(iter(todo), workers, lambda task=task: bar.advance(task))  # type: ignore[misc]
    console.print(table(search))
    print(f"sweep folder: {folder}")


def table(search: Search) -> Table:
    """Return a table of the trials and the best options of each optimizer."""
    rows = Table(title=f"Sweep {search.sweep.name}: {search.sweep.objective}", title_justify="left")
    for heading in ("optimizer", "trials", "reached", "best", "best options"):
        rows.add_column(heading)
    for name in search.sweep.optimizers:
        ended = search.studies[name].get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        reached = sum(one.state == TrialState.COMPLETE for one in ended)
        best = search.best(name)
        options = {} if best is None else best.user_attrs["options"]
        # Of all seeds of the best trial, which decide together.
        values = [] if best is None else [value for value in search.values(name, best) if value is not None]
        value = f"{fmean(values):.6g}" if values else "none"
        settings = ", ".join(f"{key} {given}" for key, given in options.items())
        rows.add_row(name, str(len(ended)), str(reached), value, settings)
    return rows
