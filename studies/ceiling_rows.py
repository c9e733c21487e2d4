"""Compare the rows of a ceiling study by the ratio of their test measure on common seeds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.runs import Run, read
from analysis.statistics import Mean, Paired, exponential, holm, paired
from analysis.tuning_budget import first_runs

SMALLEST_EFFECT = 0.01


@dataclass(frozen=True)
class Measure:
    """Describe the measure of a task: its name, test key, and value from the test's metrics."""

    name: str
    key: str
    metric: str
    lower: bool

    def of(self, run: Run) -> float:
        """Return the measure of the run's best checkpoint on the test split, NaN without one."""
        value = run.summary.get("test", {}).get(self.key)
        if value is None:
            return math.nan
        return math.exp(value) if self.key == "test/loss" else 1.0 - value


PERPLEXITY = Measure("test perplexity", "test/loss", "val/loss", lower=True)
ERROR = Measure("test error", "test/accuracy", "val/accuracy", lower=False)


@dataclass(frozen=True)
class Comparison:
    """Compare two families by the ratio of the measure on common seeds.

    ``effect`` is of the logarithms; ``p`` is adjusted by Holm's method over all tests stated with it.
    """

    family: str
    reference: str
    effect: Paired
    p: float

    @property
    def ratio(self) -> Mean:
        """Return the geometric mean of the ratios with its 95 % interval."""
        return exponential(self.effect.difference)

    @property
    def verdict(self) -> str:
        """Say in words what the interval shows, for the smallest effect of interest."""
        low, high = self.effect.difference.low, self.effect.difference.high
        assert low is not None and high is not None
        least = math.log1p(SMALLEST_EFFECT)
        if -least < low and high < least:
            return "equal within 1 %"
        if self.p >= 0.05:
            return "undecided"
        better = self.effect.difference.mean < 0
        return ("better" if better else "worse") + (
            "" if min(abs(low), abs(high)) >= least else ", maybe by less than 1 %"
        )


def winners(folders: list[Path]) -> tuple[dict[str, dict[str, Run]], dict[str, list[Run]]]:
    """Return the winners' runs by row and seed, and the trials by row."""
    finals: dict[str, dict[str, Run]] = {}
    trials: dict[str, list[Run]] = {}
    for run in read(folders)[0]:
        sweep = run.identity.sweep
        if sweep is not None and sweep.trial is None:
            finals.setdefault(sweep.optimizer, {})[run.identity.seed] = run
        elif sweep is not None:
            trials.setdefault(sweep.optimizer, []).append(run)
    return finals, trials


def by_family(finals: Mapping[str, dict[str, Run]]) -> dict[str, dict[str, Run]]:
    """Return the winners' runs by family.

    Raises:
        ValueError: two rows of a family have such runs, as after its winner has changed.
    """
    rows: dict[str, dict[str, Run]] = {}
    for row, runs in finals.items():
        if family_of(row) in rows:
            raise ValueError(
                f"both budgets of {family_of(row)} have runs of winners: move away the -final folder of the one that"
                " its sweep did not choose"
            )
        rows[family_of(row)] = runs
    return rows


def family_of(row: str) -> str:
    """Return the family of a row, whose short budget has its own row."""
    return row.removesuffix("_short")


def logs(runs: Mapping[str, Run], of: Callable[[Run], float]) -> dict[str, float]:
    """Return the logarithm of a quantity by seed, without runs that lack it."""
    return {seed: math.log(of(run)) for seed, run in runs.items() if of(run) > 0}


def training_seconds(run: Run) -> float:
    """Return the seconds of training, without validation."""
    return run.at_end("cost/training_seconds") or math.nan


def searched(trials: Mapping[str, list[Run]], family: str, measure: Measure) -> list[list[float]]:
    """Return the validated measure of each trial, by row of the family."""
    rows = []
    for runs in (runs for row, runs in trials.items() if family_of(row) == family):
        best = [run.best(measure.metric, measure.lower) for run in first_runs(runs)]
        # A trial that diverged counts as the worst.
        rows.append([math.inf if math.isnan(x) else math.exp(x) if measure.lower else 1.0 - x for x in best])
    return rows


def tests_of(
    stated: Sequence[tuple[str, str]], rows: Mapping[str, Mapping[str, Run]], measure: Measure
) -> list[Comparison]:
    """Return those of the stated tests for which both families have run.

    Their p-values are adjusted for all stated tests, also for those that have not run yet.
    """
    found = []
    for family, reference in stated:
        if family in rows and reference in rows:
            effect = paired(logs(rows[family], measure.of), logs(rows[reference], measure.of))
            if effect is not None:
                found.append((family, reference, effect))
    adjusted = holm([effect.p for *_, effect in found] + [1.0] * (len(stated) - len(found)))
    return [Comparison(*parts, p) for parts, p in zip(found, adjusted[: len(found)], strict=True)]
