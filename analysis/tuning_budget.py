"""Count the trials and costs of every search and its luck."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from analysis.palette import DASHES, Style, styles
from analysis.rows import AXIS, Group, Row
from analysis.runs import Run
from analysis.statistics import Mean
from analysis.tables import Table, mean_text, number
from experiment.quantities import count, duration

# Options whose sensitivity is of interest: of any track, any optimizer.
_SENSITIVE = ("lr", "weight_decay", "rho")
_DRAWS = 4000


def tuning_budgets(group: Group) -> Iterator[Table]:
    """Yield the budget of each optimizer for every search; unequal ones are flagged."""
    keys = dict.fromkeys([*group.sweeps, *group.failed])
    for name in dict.fromkeys(name for name, _ in keys):
        lines: list[list[str]] = []
        budgets: dict[str, int] = {}
        for optimizer in [optimizer for other, optimizer in keys if other == name]:
            trials, failed = group.sweeps.get((name, optimizer), []), group.failed[name, optimizer]
            ended = sum(run.finished and not run.diverged for run in trials)
            diverged = sum(run.diverged for run in trials)
            budgets[group.label_of(name, optimizer)] = len(trials) + failed
            lines.append(
                [
                    group.label_of(name, optimizer),
                    str(len(trials) + failed),
                    str(ended),
                    str(len(trials) - ended - diverged),
                    str(diverged + failed),
                    number(_total(trials, AXIS), 6),
                    duration(_total(trials, "cost/training_seconds")),
                ]
            )
        heads = ["row", "runs of trials", "ended", "interrupted", "diverged or failed"]
        heads += ["gradient evaluations", "training time"]
        notes = [
            "Counts every run that a trial began, also those on further seeds. Those that the search stopped early "
            "have ended."
        ]
        if len(set(budgets.values())) > 1:
            least, most = (which(budgets, key=budgets.__getitem__) for which in (min, max))
            counts = f"from {count(budgets[least], 'trial')} ({least}) to {budgets[most]} ({most})"
            notes.append(f"UNEQUAL BUDGETS: {counts}; the winners of this search are not comparable.")
        yield Table(f"Tuning budget of {name}", heads, lines, notes)


def _total(runs: list[Run], axis: str) -> float:
    return sum(run.at_end(axis) or 0.0 for run in runs)


def searches_luck(group: Group, reference: Row) -> Iterator[Table]:
    """Yield the ratios of the best trials of every search, with intervals over its trials.

    Rows of a family count together. Any other row is a family by itself.
    """
    goal = None if group.borrowed else group.goal
    worst = math.inf if goal or group.lower else 0.0
    # Ratios of losses mean little; those of perplexities are exponentials of differences.
    is_loss = goal is None and group.metric.endswith("/loss")

    def value(run: Run) -> float:
        found = run.reached(goal, AXIS) if goal else run.best(group.metric, group.lower)
        if found is None or math.isnan(found):
            return worst
        return math.exp(found) if is_loss else found

    for name in dict.fromkeys(name for name, _ in group.sweeps):
        values: dict[str, list[list[float]]] = {}
        base = None
        for (other, row), trials in group.sweeps.items():
            if other == name:
                own = group.label_of(name, row)
                family = next((family for family, rows in group.families.items() if row in rows), own)
                values.setdefault(family, []).append([value(run) for run in first_runs(trials)])
                if _is_reference(name, row, trials[0], reference):
                    base = base or family
        most = max((len(row) for rows in values.values() for row in rows), default=0)
        if base is None or len(values) < 2 or most < 2:  # a single trial is a stated setting, without luck
            continue
        best = {
            family: sorted((one for row in rows for one in row if one != worst), reverse=not worst)[:3]
            for family, rows in values.items()
        }
        lines = []
        for family, rows in values.items():
            ratio = "1" if family == base else "-"
            if family != base and best[family] and best[base]:
                ratio = mean_text(luck(rows, values[base], lower=worst > 0), 4)
            lines.append([family, str(sum(map(len, rows))), ", ".join(map(number, best[family])) or "-", ratio])
        metric = f"exp({group.metric})" if is_loss else group.metric
        what = f"gradient evaluations to {goal}" if goal else f"best {metric}"
        heads = ["row", "trials", "best three trials", f"ratio of the best to {base}"]
        notes = [
            f"{what[0].upper()}{what[1:]} of single trials. Rows that stand for one optimizer, such as those of two "
            "policies or budgets, count together where study.yaml says so. The interval has 95 % of the ratios where "
            "the trials of every row are drawn again with replacement: it shows how much the comparison owes to a few "
            "lucky points. A trial without a value, such as one that was ended early, counts as the worst, so that the "
            "intervals are too wide where a search stops trials early. The best of redrawn trials is never better than "
            "the real best. The luck of the seed that the trials share is not in the intervals."
        ]
        yield Table(f"Luck of the search {name}", heads, lines, notes)


def _is_reference(name: str, row: str, trial: Run, reference: Row) -> bool:
    """Return whether a row of a search is the reference, or else has its optimizer."""
    if reference.search is not None and reference.search[0] == name:
        return reference.search[1] == row
    return trial.identity.optimizer == reference.optimizer


def first_runs(trials: Sequence[Run]) -> list[Run]:
    """Return the first run of every trial. Only the best trials run again on further seeds."""
    return list({run.identity.sweep.trial: run for run in reversed(trials) if run.identity.sweep}.values())


def luck(trials: Sequence[Sequence[float]], others: Sequence[Sequence[float]], lower: bool = True) -> Mean:
    """Return the ratio of the best trials of two optimizers, with its bootstrap interval.

    Args:
        trials: values by row of the search.
        others: those of the optimizer in the denominator.
        lower: whether less is better.
    """
    generator, best = np.random.default_rng(0), np.min if lower else np.max

    def drawn(rows: Sequence[Sequence[float]]) -> np.ndarray:
        draws = [best(generator.choice(row, (_DRAWS, len(row))), axis=1) for row in rows]
        return np.asarray(best(draws, axis=0))

    with np.errstate(invalid="ignore", divide="ignore"):
        # Not interpolated, because some may be infinite; NaN where neither has a value.
        low, high = np.nanquantile(drawn(trials) / drawn(others), [0.025, 0.975], method="inverted_cdf")
        ratio = np.divide(best([best(row) for row in trials]), best([best(row) for row in others]))
    return Mean(sum(map(len, trials)), float(ratio), float(low), float(high))


def searched_rows(group: Group, name: str) -> dict[str, tuple[list[Run], Style]]:
    """Return the first runs of a search's trials, and the style of their row.

    Keys are the labels of rows, in the order of the rows; runs are in the order of the trials. A row
    that has only trials has the colour of its family.
    """
    rows = {row.search[1]: row for row in group.rows if row.search is not None and row.search[0] == name}
    searched = [row for other, row in group.sweeps if other == name]
    # Styles after those of the rows, so that no two are equal.
    further = styles([*(row.label for row in group.rows), *searched])[len(group.rows) :]
    spare = dict(zip(searched, further, strict=True))
    for members in group.families.values():
        colour = next((rows[member].style.colour for member in members if member in rows), None)
        for member in members:
            if colour and member in spare:
                spare[member] = replace(spare[member], colour=colour, dash=DASHES[1])
    ordered = sorted(searched, key=lambda row: group.rows.index(rows[row]) if row in rows else len(group.rows))
    return {
        group.label_of(name, row): (
            sorted(first_runs(group.sweeps[name, row]), key=_trial),
            rows[row].style if row in rows else spare[row],
        )
        for row in ordered
    }


def _trial(run: Run) -> int:
    sweep = run.identity.sweep
    return -1 if sweep is None or sweep.trial is None else sweep.trial


def options_of(trials: Sequence[Run]) -> list[str]:
    """Return the options of interest that differ between trials.

    They are learning rates and weight decays of either track, and the radius.
    """
    options = [run.identity.options for run in trials]
    return [
        key
        for key in options[0]
        if key.rpartition(".")[2] in _SENSITIVE
        and all(isinstance(option.get(key), (int, float)) for option in options)
        and len({option[key] for option in options}) > 1
    ]
