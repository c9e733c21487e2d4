"""Summarise and compare times to a target, some of which are longer than their run was watched."""

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from analysis.statistics import CONFIDENCE, Mean, geometric_interval, holm, improvement, one_sample_tests


@dataclass(frozen=True)
class Median:
    """The median of times to a target, some of which are longer than their run.

    ``None`` is a time beyond ``horizon``, the longest time that a run was watched.
    ``low`` and ``high`` are the limits of its interval; both are ``None`` for a single run, see ``n``. Its coverage
    differs from 95 %, see :func:`median_coverage`. ``quartiles`` are the times by which a quarter and three quarters
    had reached the target.
    """

    n: int
    reached: int
    median: float | None
    low: float | None
    high: float | None
    horizon: float
    quartiles: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True)
class Time:
    """The time at which a run reached a target.

    Args:
        reached: the time, ``None`` if it did not reach it.
        watched: how long the run was; infinite for one that diverged, which would never have reached the target.
    """

    reached: float | None
    watched: float


def median_time(times: Sequence[Time]) -> Median:
    """Return the Kaplan-Meier median of right-censored times (Kaplan and Meier 1958).

    It is the first time at which at most one half is left: the 12th of 24 that were all reached. Its interval is that
    of Brookmeyer and Crowley (1982): where the log-log band of the survival curve has one half.
    """
    n = len(times)
    reached = np.asarray([time.reached for time in times if time.reached is not None], dtype=float)
    missed = np.asarray([time.watched for time in times if time.reached is None], dtype=float)
    finite = np.concatenate([reached, missed[np.isfinite(missed)]])
    horizon = float(finite.max()) if len(finite) else np.nan
    # A run that can never reach it outlasts every other.
    missed = np.where(np.isfinite(missed), missed, 2 * np.nanmax([horizon, 1.0]))
    if len(reached) == 0:
        return Median(n, 0, None, None, None, horizon)
    survival = stats.ecdf(stats.CensoredData(uncensored=reached, right=missed)).sf
    steps = survival.quantiles

    def crossing(probabilities: np.ndarray, left: float = 0.5) -> float | None:
        # The curve is a product of fractions: where it is one half, rounding may leave it just above.
        below = np.flatnonzero(probabilities <= left + 1e-9)
        return float(steps[below[0]]) if len(below) else None

    median = crossing(survival.probabilities)
    quartiles = crossing(survival.probabilities, 0.75), crossing(survival.probabilities, 0.25)
    if n < 2:
        return Median(n, len(reached), median, None, None, horizon, quartiles)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        band = survival.confidence_interval(CONFIDENCE, method="log-log")
    # The band has no value where the curve is 1 or 0; there it is the curve.
    lower = np.where(np.isnan(band.low.probabilities), survival.probabilities, band.low.probabilities)
    upper = np.where(np.isnan(band.high.probabilities), survival.probabilities, band.high.probabilities)
    return Median(n, len(reached), median, crossing(lower), crossing(upper), horizon, quartiles)


@functools.cache
def median_coverage(n: int) -> float:
    """Return how often the interval of :func:`median_time` covers the true median of ``n`` times.

    It is exact for times that were all reached: the limits are order statistics, and the number of times below the
    median is binomial. Times that are equal only make it larger.
    """
    found = median_time([Time(time, time) for time in range(1, n + 1)])
    if found.low is None:
        return 0.0
    high = n + 1 if found.high is None else found.high
    return float(stats.binom.cdf(high - 1, n, 0.5) - stats.binom.cdf(found.low - 1, n, 0.5))


def reached_share(times: Sequence[Time]) -> tuple[np.ndarray, np.ndarray]:
    """Return times, ascending, and the Kaplan-Meier share of runs that had reached the target by then.

    Both begin at zero, and end with the longest time that a run was watched.
    """
    reached = [time.reached for time in times if time.reached is not None]
    ends = [time.watched for time in times if np.isfinite(time.watched)]
    horizon = max([*reached, *ends], default=0.0)
    if not reached:
        return np.asarray([0.0, horizon]), np.zeros(2)
    # A run that can never reach it outlasts every other.
    missed = [min(time.watched, 2 * horizon) for time in times if time.reached is None]
    share = stats.ecdf(stats.CensoredData(uncensored=reached, right=missed)).cdf
    inside = share.quantiles <= horizon
    x, y = share.quantiles[inside], share.probabilities[inside]
    return np.concatenate([[0.0], x, [horizon]]), np.concatenate([[0.0], y, y[-1:]])


# Pairs of rows with fewer common seeds are left unsettled.
FEWEST_SEEDS = 5
LEVEL = 0.05


@dataclass(frozen=True)
class Race:
    """Compare how early two rows reached a target, on common seeds.

    Attributes:
        first, second: how often the row was first, or the reference; ``undecided`` if neither is known to have been.
        p_sign: of the sign test of ``first`` and ``second``.
        ratio: geometric mean of the ratios of their times, ``None`` unless both reached the target on every common seed.
        p_ratio, p_permutation: of the t-test and the permutation test of their logarithms, or else NaN.
        ahead: probability that a run of the row is faster than one of the reference, over all pairs of runs.
    """

    first: int
    second: int
    undecided: int
    p_sign: float
    ratio: Mean | None
    p_ratio: float
    p_permutation: float
    ahead: Mean

    @property
    def p(self) -> float:
        """Of the t-test of the ratios if every common seed has one, and of the sign test otherwise."""
        return self.p_sign if np.isnan(self.p_ratio) else self.p_ratio


def race(times: Mapping[str, Time], reference: Mapping[str, Time]) -> Race:
    """Compare a row's times to a target with those of a reference, seed by seed."""
    seeds = sorted(times.keys() & reference.keys())
    pairs = [(times[seed], reference[seed]) for seed in seeds]
    first = sum(_is_first(one, other) for one, other in pairs)
    second = sum(_is_first(other, one) for one, other in pairs)
    decided = first + second
    p_sign = float(stats.binomtest(first, decided).pvalue) if decided else np.nan
    ahead = [[(1 + _is_first(a, b) - _is_first(b, a)) / 2 for b in reference.values()] for a in times.values()]
    both = [(one.reached, other.reached) for one, other in pairs]
    ratios = np.asarray([one / other for one, other in both if one is not None and other is not None])
    ratio, p_ratio, p_permutation = None, np.nan, np.nan
    if seeds and len(ratios) == len(seeds):
        ratio = geometric_interval(ratios.tolist())
        if np.ptp(ratios) > 0:
            p_ratio, p_permutation = one_sample_tests(np.log(ratios))
    undecided = len(seeds) - decided
    return Race(
        first, second, undecided, p_sign, ratio, p_ratio, p_permutation, improvement(np.asarray(ahead, dtype=float))
    )


def _is_first(time: Time, other: Time) -> bool:
    """Return whether ``time`` is known to be shorter than ``other``."""
    if time.reached is None:
        return False
    return time.reached < other.reached if other.reached is not None else time.reached <= other.watched


def settle(rows: Sequence[Mapping[str, Time]]) -> np.ndarray:
    """Return for each pair of rows 1 if the first needs less than the second, -1 if more, and 0 if it is not settled.

    A pair is settled if it has at least five common seeds, and if :attr:`Race.p` is below 5 % after Holm's adjustment
    for all such pairs.
    """
    pairs = [(i, j) for i in range(len(rows)) for j in range(i) if len(rows[i].keys() & rows[j].keys()) >= FEWEST_SEEDS]
    races = [race(rows[i], rows[j]) for i, j in pairs]
    settled = np.zeros((len(rows), len(rows)), dtype=int)
    for (i, j), found, p in zip(pairs, races, holm([found.p for found in races]), strict=True):
        if p < LEVEL:
            less = found.ratio.mean < 1 if found.ratio is not None else found.first > found.second
            settled[i, j], settled[j, i] = (1, -1) if less else (-1, 1)
    return settled
