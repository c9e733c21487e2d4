"""Summarise and compare times to a target, some of which are censored."""

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from analysis.statistics import CONFIDENCE, Mean, geometric_interval, permutation_p


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
    """Return times and the Kaplan-Meier share of runs that reached the target.

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


@dataclass(frozen=True)
class Race:
    """Compare how early two rows reached a target, on common seeds.

    Attributes:
        first, second: how often the row was first, or the reference; ``undecided`` if neither is known to have been.
        ratios: of their times by seed; empty unless both reached the target on every common seed.
        pairs: for all pairs of runs 1 if that of the row was first, 0 if that of the reference, 1/2 if undecided.
    """

    first: int
    second: int
    undecided: int
    ratios: tuple[float, ...]
    pairs: np.ndarray

    @property
    def n(self) -> int:
        """Number of common seeds."""
        return self.first + self.second + self.undecided

    @property
    def ratio(self) -> Mean | None:
        """Geometric mean of the ratios."""
        return geometric_interval(self.ratios) if self.ratios else None

    @property
    def p_sign(self) -> float:
        """Of the sign test; NaN if no pair is decided."""
        decided = self.first + self.second
        return float(stats.binomtest(self.first, decided).pvalue) if decided else np.nan

    @property
    def p_ratio(self) -> float:
        """Of the t-test of the logarithms of the ratios; NaN without ratios that differ."""
        return float(stats.ttest_1samp(np.log(self.ratios), 0.0).pvalue) if self._scatters else np.nan

    @property
    def p_permutation(self) -> float:
        """Of the permutation test of these logarithms."""
        return permutation_p(np.log(self.ratios).tolist()) if self._scatters else np.nan

    @property
    def p(self) -> float:
        """Of the t-test if every common seed has a ratio, and of the sign test otherwise."""
        return self.p_ratio if self._scatters else self.p_sign

    @property
    def _scatters(self) -> bool:
        return len(self.ratios) > 1 and float(np.ptp(self.ratios)) > 0


def race(times: Mapping[str, Time], reference: Mapping[str, Time]) -> Race:
    """Compare a row's times to a target with those of a reference, seed by seed."""
    common = [(times[seed], reference[seed]) for seed in sorted(times.keys() & reference.keys())]
    first = sum(_is_first(one, other) for one, other in common)
    second = sum(_is_first(other, one) for one, other in common)
    reached = [(one.reached, other.reached) for one, other in common]
    # A target that is met before any cost has no ratio.
    ratios = tuple(one / other for one, other in reached if one and other)
    pairs = [[0.5 + (_is_first(a, b) - _is_first(b, a)) / 2 for b in reference.values()] for a in times.values()]
    undecided = len(common) - first - second
    return Race(first, second, undecided, ratios if len(ratios) == len(common) else (), np.asarray(pairs))


def _is_first(time: Time, other: Time) -> bool:
    """Return whether ``time`` is known to be shorter than ``other``."""
    if time.reached is None:
        return False
    return bool(time.reached < other.reached if other.reached is not None else time.reached <= other.watched)
