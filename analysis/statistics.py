"""Compute intervals over seeds, paired tests, and medians of censored times."""

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Mean:
    """A mean over ``n`` values and the limits of its t-interval.

    The limits are ``None`` for fewer than two values.
    """

    n: int
    mean: float
    low: float | None
    high: float | None


@functools.cache
def _quantile(degrees: int, confidence: float) -> float:
    """Return the factor of a two-sided t-interval."""
    return float(stats.t.ppf((1 + confidence) / 2, degrees))


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Mean:
    """Return mean and t-interval of the finite ``values``; NaN where there is none."""
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    n = len(finite)
    if n < 2:
        return Mean(n, float(finite[0]) if n else np.nan, None, None)
    half = _quantile(n - 1, confidence) * finite.std(ddof=1) / np.sqrt(n)
    return Mean(n, float(finite.mean()), float(finite.mean() - half), float(finite.mean() + half))


def bounded_interval(values: Sequence[float], most: float = np.inf) -> Mean:
    """Return the mean of values between 0 and ``most``, with an interval that stays between them.

    It is the t-interval, carried over to the logarithm of m / (1 - m / most) by the delta method: the log scale without
    an upper bound, the logit scale for shares.
    """
    mean = mean_interval(values)
    if mean.high is None or not 0 < mean.mean < most:
        return mean
    odds = mean.mean / (1 - mean.mean / most)
    half = (mean.high - mean.mean) * odds / mean.mean**2
    low, high = (x / (1 + x / most) for x in odds * np.exp([-half, half]))
    return Mean(mean.n, mean.mean, float(low), float(high))


def mean_intervals(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the means of columns and the limits of their t-intervals.

    Both limits are the mean where a column has fewer than two finite values.
    """
    finite = np.isfinite(values)
    n = finite.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(finite, values, 0.0).sum(axis=0) / n
        squares = np.where(finite, values - mean, 0.0) ** 2
        error = np.sqrt(squares.sum(axis=0) / (n - 1) / n)
    factors = {count: _quantile(int(count) - 1, CONFIDENCE) for count in np.unique(n) if count > 1}
    half = np.where(n > 1, np.vectorize(lambda count: factors.get(count, 0.0))(n) * error, 0.0)
    return mean, mean - half, mean + half


def exponential(log: Mean) -> Mean:
    """Return a mean of logarithms as a geometric mean, with the limits of its interval."""
    low, high = (None if limit is None else float(np.exp(limit)) for limit in (log.low, log.high))
    return Mean(log.n, float(np.exp(log.mean)), low, high)


def geometric_interval(values: Sequence[float]) -> Mean:
    """Return geometric mean and interval of positive ``values``.

    The interval is the t-interval of their logarithms. It never reaches zero, as that of a few scattered times would.
    """
    return exponential(mean_interval(np.log(values).tolist()))


@dataclass(frozen=True)
class Paired:
    """Differences between two rows on the seeds that both have.

    ``p`` is of the paired t-test. ``detectable`` is the smallest true difference that a test with this number and
    scatter of seeds detects at the 5 % level with a power of 80 %. Smaller ones are not excluded.
    """

    difference: Mean
    p: float
    detectable: float


def paired(values: Mapping[str, float], reference: Mapping[str, float]) -> Paired | None:
    """Compare two rows, given as values by seed.

    ``None`` is returned for fewer than two seeds with a finite value in both.
    """
    seeds = sorted(seed for seed in values.keys() & reference.keys() if np.isfinite(values[seed] - reference[seed]))
    differences = np.asarray([values[seed] - reference[seed] for seed in seeds])
    n = len(differences)
    if n < 2:
        return None
    error = differences.std(ddof=1) / np.sqrt(n)
    # Metrics are in single precision. Differences of the size of its rounding are not scatter.
    if np.ptp(differences) <= 1e-6 * max(abs(side[seed]) for side in (values, reference) for seed in seeds):
        return Paired(mean_interval(differences.tolist()), np.nan, 0.0)
    p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return Paired(mean_interval(differences.tolist()), p, float(detectable_effect(n) * error))


@functools.cache
def detectable_effect(n: int, power: float = POWER, confidence: float = CONFIDENCE) -> float:
    """Return the true mean that a t-test of ``n`` values detects with ``power``.

    It is given in standard errors, for a two-sided test.
    """
    critical = stats.t.ppf((1 + confidence) / 2, n - 1)
    # The estimated deviation over the true one; the mean is normal and independent of it.
    deviation = stats.chi(n - 1, scale=1 / np.sqrt(n - 1))

    def shortfall(effect: float) -> float:
        rejected = deviation.expect(
            lambda u: stats.norm.sf(critical * u - effect) + stats.norm.cdf(-critical * u - effect)
        )
        return float(rejected - power)

    return float(optimize.brentq(shortfall, 0.0, 2 * critical + 2))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number by Holm's step-down rule (Holm 1979).

    NaN stays NaN and is not counted.
    """
    adjusted = np.full(len(p_values), np.nan)
    known = [i for i in np.argsort(p_values) if np.isfinite(p_values[i])]
    highest = 0.0
    for rank, i in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p_values[i]))
        adjusted[i] = highest
    return [float(value) for value in adjusted]


@dataclass(frozen=True)
class Median:
    """The median of times to a target, some of which are longer than their run.

    ``None`` is a time beyond ``horizon``, the longest time that a run was watched.
    ``low`` and ``high`` are the limits of its interval; both are ``None`` for a single run, see ``n``. Its coverage
    differs from 95 %, see :func:`median_coverage`.
    """

    n: int
    reached: int
    median: float | None
    low: float | None
    high: float | None
    horizon: float


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

    def crossing(probabilities: np.ndarray) -> float | None:
        # The curve is a product of fractions: where it is one half, rounding may leave it just above.
        below = np.flatnonzero(probabilities <= 0.5 + 1e-9)
        return float(steps[below[0]]) if len(below) else None

    median = crossing(survival.probabilities)
    if n < 2:
        return Median(n, len(reached), median, None, None, horizon)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        band = survival.confidence_interval(CONFIDENCE, method="log-log")
    # The band has no value where the curve is 1 or 0; there it is the curve.
    lower = np.where(np.isnan(band.low.probabilities), survival.probabilities, band.low.probabilities)
    upper = np.where(np.isnan(band.high.probabilities), survival.probabilities, band.high.probabilities)
    return Median(n, len(reached), median, crossing(lower), crossing(upper), horizon)


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


@dataclass(frozen=True)
class Race:
    """Counts of which of two rows reached a target first, with a sign test.

    ``ratio`` is the geometric mean of the ratios of their times with its interval, and ``p_ratio`` is of the t-test of
    their logarithms; ``None`` and NaN unless both reached the target on every common seed. A pair of which neither is
    known to have been first is in ``undecided``.
    """

    first: int
    second: int
    undecided: int
    p: float
    ratio: Mean | None
    p_ratio: float


def race(times: Mapping[str, Time], reference: Mapping[str, Time]) -> Race:
    """Compare a row's times to a target with those of a reference, seed by seed."""
    seeds = sorted(times.keys() & reference.keys())
    pairs = [(times[seed], reference[seed]) for seed in seeds]
    first = sum(_is_first(one, other) for one, other in pairs)
    second = sum(_is_first(other, one) for one, other in pairs)
    ratios = [
        one.reached / other.reached for one, other in pairs if one.reached is not None and other.reached is not None
    ]
    decided = first + second
    p = float(stats.binomtest(first, decided).pvalue) if decided else np.nan
    if not seeds or len(ratios) < len(seeds):
        return Race(first, second, len(seeds) - decided, p, None, np.nan)
    varied = len(ratios) > 1 and np.ptp(ratios) > 0
    p_ratio = float(stats.ttest_1samp(np.log(ratios), 0.0).pvalue) if varied else np.nan
    return Race(first, second, len(seeds) - decided, p, geometric_interval(ratios), p_ratio)


def _is_first(time: Time, other: Time) -> bool:
    """Return whether ``time`` is known to be shorter than ``other``."""
    if time.reached is None:
        return False
    return time.reached < other.reached if other.reached is not None else time.reached <= other.watched
