"""Compute intervals over seeds and paired tests.

Times to a target, some of which are censored, are in :mod:`analysis.times`.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

CONFIDENCE = 0.95
POWER = 0.8
# Number of random sign changes and of bootstrap draws; up to 13 seeds every change of signs is made.
_RESAMPLES = 9999


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
    if mean.high is None:
        return mean
    low, high = _within(np.asarray(mean.mean), np.asarray(mean.high - mean.mean), most)
    return Mean(mean.n, mean.mean, float(low), float(high))


def _within(mean: np.ndarray, half: np.ndarray, most: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the limits of intervals that stay between 0 and ``most``.

    Where the mean is one of these ends, they are those of the t-interval.
    """
    inside = (mean > 0) & (mean < most)
    m = np.where(inside, mean, 0.5 if most < np.inf else 1.0)
    odds = m / (1 - m / most)
    limits = (odds * np.exp(sign * half * odds / m**2) for sign in (-1, 1))
    low, high = (
        np.where(inside, x / (1 + x / most), mean + sign * half) for x, sign in zip(limits, (-1, 1), strict=True)
    )
    return low, high


def mean_intervals(values: np.ndarray, most: float | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the means of columns and the limits of their t-intervals.

    Both limits are the mean where a column has fewer than two finite values. With ``most``, see
    :func:`bounded_interval`.
    """
    finite = np.isfinite(values)
    n = finite.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(finite, values, 0.0).sum(axis=0) / n
        squares = np.where(finite, values - mean, 0.0) ** 2
        error = np.sqrt(squares.sum(axis=0) / (n - 1) / n)
    factors = {count: _quantile(int(count) - 1, CONFIDENCE) for count in np.unique(n) if count > 1}
    half = np.where(n > 1, np.vectorize(lambda count: factors.get(count, 0.0))(n) * error, 0.0)
    return mean, *((mean - half, mean + half) if most is None else _within(mean, half, most))


def exponential(log: Mean) -> Mean:
    """Return a mean of logarithms as a geometric mean, with the limits of its interval."""
    low, high = (None if limit is None else float(np.exp(limit)) for limit in (log.low, log.high))
    return Mean(log.n, float(np.exp(log.mean)), low, high)


def scaled(mean: Mean, factor: float) -> Mean:
    """Return a mean and its interval in another unit, or of the other sign."""
    low, high = sorted(factor * x for x in (mean.low, mean.high) if x is not None) or (None, None)
    return Mean(mean.n, factor * mean.mean, low, high)


def geometric_interval(values: Sequence[float]) -> Mean:
    """Return geometric mean and interval of positive ``values``.

    The interval is the t-interval of their logarithms. It never reaches zero, as that of a few scattered times would.
    """
    return exponential(mean_interval(np.log(values).tolist()))


@dataclass(frozen=True)
class Paired:
    """Differences between two rows on the seeds that both have.

    ``p`` is of the paired t-test, NaN without scatter. ``detectable`` is the smallest true difference that a t-test
    with this number and scatter of seeds detects at the 5 % level with a power of 80 %. Smaller ones are not excluded.
    """

    difference: Mean
    p: float
    detectable: float
    differences: tuple[float, ...]

    @property
    def p_permutation(self) -> float:
        """Of the permutation test, NaN without scatter."""
        return np.nan if np.isnan(self.p) else permutation_p(self.differences)


def paired(values: Mapping[str, float], reference: Mapping[str, float]) -> Paired | None:
    """Compare two rows, given as values by seed.

    ``None`` is returned for fewer than two seeds with a finite value in both.
    """
    seeds = sorted(seed for seed in values.keys() & reference.keys() if np.isfinite(values[seed] - reference[seed]))
    differences = [values[seed] - reference[seed] for seed in seeds]
    if len(differences) < 2:
        return None
    p, detectable = np.nan, 0.0
    # Metrics are in single precision. Differences of the size of its rounding are not scatter.
    if np.ptp(differences) > 1e-6 * max(abs(side[seed]) for side in (values, reference) for seed in seeds):
        p = float(stats.ttest_1samp(differences, 0.0).pvalue)
        detectable = detectable_effect(len(differences)) * float(np.std(differences, ddof=1))
    return Paired(mean_interval(differences), p, detectable, tuple(differences))


def permutation_p(differences: Sequence[float]) -> float:
    """Return the two-sided p-value that differences are symmetric about zero.

    It assumes no normal distribution.
    Their mean is compared with those after changes of their signs, all of them or 9,999 at random. With n differences
    it cannot be below 2 to the power of 1 - n.
    """
    test = stats.permutation_test(
        (np.asarray(differences),),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


@functools.cache
def detectable_effect(n: int) -> float:
    """Return the true mean that a t-test of ``n`` values detects with 80 %.

    It is in deviations of one value; the test is two-sided.
    """
    return float(TTestPower().solve_power(nobs=n, alpha=1 - CONFIDENCE, power=POWER))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number by Holm's step-down rule (Holm 1979).

    NaN stays NaN and is not counted.
    """
    p = np.asarray(p_values, dtype=float)
    known = np.isfinite(p)
    if known.any():
        p[known] = multipletests(p[known], method="holm")[1]
    return p.tolist()


def improvement(ahead: np.ndarray) -> Mean:
    """Return the probability of improvement (Agarwal et al. 2021).

    It is the probability that a run of one row is ahead of one of another.
    The interval is of the percentile bootstrap over the runs of both rows. Near 0 and 1 the bootstrap has little
    scatter, so the interval is at least that of Clopper and Pearson (1934) for as many pairs of different runs as
    there are. It is ``None`` for a single run.

    Args:
        ahead: for each pair of their runs 1 if the first is ahead, 0 if the second is, and 1/2 if neither.
    """
    mean, n = float(ahead.mean()), min(ahead.shape)
    if n < 2:
        return Mean(n, mean, None, None)
    tail, won = (1 - CONFIDENCE) / 2, mean * n
    low = float(stats.beta.ppf(tail, won, n - won + 1)) if won > 0 else 0.0
    high = float(stats.beta.isf(tail, won + 1, n - won)) if won < n else 1.0
    if np.ptp(ahead) > 0:
        found = stats.bootstrap(
            tuple(map(np.arange, ahead.shape)),
            lambda one, other, axis: ahead[one[..., :, None], other[..., None, :]].mean(axis=(-2, -1)),
            n_resamples=_RESAMPLES // 5,
            vectorized=True,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        low, high = np.nanmin([low, found.low]), np.nanmax([high, found.high])
    return Mean(n, mean, float(low), float(high))


def pairs_ahead(values: Sequence[float], others: Sequence[float], lower: bool) -> np.ndarray:
    """Return which value of each pair is better, for :func:`improvement`.

    NaN is worse than any other.
    """
    worst = np.inf if lower else -np.inf
    one, other = (np.nan_to_num(np.asarray(side, dtype=float), nan=worst) for side in (values, others))
    with np.errstate(invalid="ignore"):
        better = np.sign(other[None, :] - one[:, None] if lower else one[:, None] - other[None, :])
    return np.asarray((1 + np.nan_to_num(better)) / 2)
