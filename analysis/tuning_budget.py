"""Count the trials and costs of every search, and collect sensitivities."""

import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

from analysis.rows import Group
from analysis.runs import Run
from analysis.tables import Table, number
from experiment.quantities import count, duration
from experiment.target import Target

# Options whose sensitivity is of interest: of any track, any optimizer.
_SENSITIVE = ("lr", "weight_decay", "rho")


def tuning_budgets(group: Group) -> Iterator[Table]:
    """Yield the budget of each optimizer for every search; unequal ones are flagged."""
    keys = dict.fromkeys([*group.sweeps, *group.failed])
    for name in dict.fromkeys(name for name, _ in keys):
        lines, budgets = [], set()
        for optimizer in [optimizer for other, optimizer in keys if other == name]:
            trials, failed = group.sweeps.get((name, optimizer), []), group.failed[name, optimizer]
            ended = sum(run.finished and not run.diverged for run in trials)
            diverged = sum(run.diverged for run in trials)
            budgets.add(len(trials) + failed)
            lines.append(
                [
                    optimizer,
                    str(len(trials) + failed),
                    str(ended),
                    str(len(trials) - ended - diverged),
                    str(diverged + failed),
                    number(_total(trials, "cost/gradient_evaluations"), 6),
                    duration(_total(trials, "cost/training_seconds")),
                ]
            )
        heads = ["optimizer", "trials", "ended", "cut short", "diverged or failed"]
        heads += ["gradient evaluations", "training time"]
        notes = ["Every trial that was begun is counted, however it ended."]
        if len(budgets) > 1:
            counts = f"from {min(budgets)} to {count(max(budgets), 'trial')}"
            notes.append(f"UNEQUAL BUDGETS: {counts}; the winners of this search are not comparable.")
        yield Table(f"Tuning budget of {name}", heads, lines, notes)


def _total(runs: list[Run], axis: str) -> float:
    return sum(run.at_end(axis) or 0.0 for run in runs)


Points: TypeAlias = list[tuple[float, float]]
_AXIS = "cost/gradient_evaluations"


def best_of(group: Group) -> Callable[[Run], float | None]:
    """Return a function of a run's best value of the group's metric."""
    return lambda run: run.best(group.metric, group.lower)


def evaluations_to(target: Target) -> Callable[[Run], float | None]:
    """Return a function of a run's gradient evaluations to ``target``, if reached."""
    return lambda run: run.reached(target, _AXIS)


def evaluations_without(target: Target) -> Callable[[Run], float | None]:
    """Return a function of a run's gradient evaluations if ``target`` was not reached."""
    return lambda run: run.at_end(_AXIS) if run.reached(target, _AXIS) is None else None


def sensitivities(group: Group, name: str, value_of: Callable[[Run], float | None]) -> dict[str, dict[str, Points]]:
    """Return the trials of a search by option and optimizer, as (option, value).

    Options are those that the search varied, out of the learning rates and weight decays of either track and the
    radius. A trial without a finite value is left out.
    """
    points: dict[str, dict[str, Points]] = {}
    for (other, optimizer), trials in group.sweeps.items():
        if other != name:
            continue
        options = [run.identity.options for run in trials]
        for key in options[0]:
            values = [option.get(key) for option in options]
            numbers = [value for value in values if isinstance(value, (int, float))]
            if key.rpartition(".")[2] in _SENSITIVE and len(set(numbers)) > 1:
                of_trials = zip(values, map(value_of, trials), strict=True)
                points.setdefault(key, {})[optimizer] = sorted(
                    (float(option), value)
                    for option, value in of_trials
                    if option is not None and value is not None and math.isfinite(value)
                )
    return points
