"""Kaplan-Meier medians, quartiles, intervals and shares are those of lifelines."""

import warnings
from collections.abc import Iterator

import numpy as np
import pytest

from analysis.times import Time, median_time, reached_share

with warnings.catch_warnings(action="ignore"):
    from lifelines import KaplanMeierFitter
    from lifelines.utils import median_survival_times


def samples() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield times and how long each was watched, with ties and up to all of them censored."""
    generator = np.random.default_rng(0)
    for _ in range(150):
        n = generator.integers(2, 25)
        yield 8.0 * generator.integers(1, 12, n), 8.0 * generator.integers(4, 14, n)


@pytest.mark.filterwarnings("ignore:Approximating")
def test_medians_quartiles_and_intervals_are_those_of_lifelines() -> None:
    compared = 0
    for time, watched in samples():
        fitted = KaplanMeierFitter().fit(np.minimum(time, watched), time <= watched)
        # Where the curve is exactly at a level, lifelines' rounding decides; ours is the time at which it gets there.
        curve = fitted.survival_function_.to_numpy().ravel()
        if min(np.abs(curve - level).min() for level in (0.25, 0.5, 0.75)) < 1e-9:
            continue
        found = median_time([Time(t if t <= w else None, w) for t, w in zip(time, watched, strict=True)])
        interval = median_survival_times(fitted.confidence_interval_).to_numpy().ravel()
        expected = [fitted.median_survival_time_, *interval, fitted.percentile(0.75), fitted.percentile(0.25)]
        ours = [found.median, found.low, found.high, *found.quartiles]
        assert [np.inf if value is None else value for value in ours] == expected
        compared += 1
    assert compared > 80


def test_the_share_of_runs_that_reached_the_target_is_one_less_lifelines_survival() -> None:
    for time, watched in samples():
        fitted = KaplanMeierFitter().fit(np.minimum(time, watched), time <= watched)
        x, y = reached_share([Time(t if t <= w else None, w) for t, w in zip(time, watched, strict=True)])
        assert y == pytest.approx(1 - fitted.predict(x).to_numpy())
        assert (x[0], y[0], x[-1]) == (0, 0, watched.max())


def test_a_run_that_diverged_never_reaches_the_target() -> None:
    # Of four runs one diverged: the share ends at three quarters, wherever the others end.
    x, y = reached_share([Time(10, 40), Time(20, 40), Time(30, 40), Time(None, np.inf)])
    assert (x.tolist(), y.tolist()) == ([0, 10, 20, 30, 40], [0, 0.25, 0.5, 0.75, 0.75])
    assert [part.tolist() for part in reached_share([Time(None, 40), Time(None, np.inf)])] == [[0, 40], [0, 0]]
    # The middle of an exact half is the time at which the curve gets there (24 reached and 1 censored: the 13th of 25).
    assert median_time([*(Time(t, t) for t in range(1, 25)), Time(None, 25)]).median == 13
    assert median_time([Time(t, t) for t in range(1, 25)]).median == 12
