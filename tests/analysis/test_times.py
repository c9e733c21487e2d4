"""Compare times to a target with closed forms, by hand and by simulation."""

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from analysis.statistics import geometric_interval, mean_interval
from analysis.times import Time, median_coverage, median_time, race, reached_share


def reached(*times: float) -> list[Time]:
    return [Time(time, time) for time in times]


def missed(*watched: float) -> list[Time]:
    return [Time(None, end) for end in watched]


def test_the_median_of_times_that_all_were_reached_is_the_middle_one() -> None:
    median = median_time(reached(30, 10, 20))
    assert (median.n, median.reached, median.median, median.horizon) == (3, 3, 20, 30)


def test_censored_times_count_as_longer_than_they_were_watched() -> None:
    # Kaplan-Meier by hand: 1 of 5 at 1; one leaves at 2; 1 of 3 at 3: (4/5)(2/3) = 0.533; 1 of 2 at 4: 0.267.
    times = [*reached(1, 3, 4), *missed(2, 10)]
    median = median_time(times)
    assert (median.reached, median.median, median.horizon) == (3, 4, 10)
    # Leaving the missed ones out would give 3, and so would taking their ends for times.
    assert np.median([1, 3, 4]) == np.median([1, 3, 4, 2, 10]) == 3


def test_the_median_is_where_survival_is_exactly_one_half() -> None:
    # The one that was watched for no time contributes nothing: 24 are left, and after the 12th one half of them.
    assert median_time([*reached(*range(1, 25)), *missed(0.5)]).median == 12
    # One that outlasts all others counts: after 12 of 25, 13 are left.
    assert median_time([*reached(*range(1, 25)), *missed(30)]).median == 13
    for half in range(1, 40):
        for censored in range(4):
            times = [*reached(*range(1, 2 * half + 1)), *missed(*[0.5] * censored)]
            assert median_time(times).median == half, (half, censored)
    # As many runs miss the target as reach it: one half is left after the last that reaches it.
    for half in range(1, 40):
        assert median_time([*reached(*range(1, half + 1)), *missed(*[100] * half)]).median == half


def test_a_target_that_most_runs_missed_has_no_median() -> None:
    median = median_time([*reached(4), *missed(9, 9)])
    assert (median.median, median.horizon, median.reached) == (None, 9, 1)
    assert median_time(missed(5, 7)).median is None
    assert median_time(missed(5, 7)).horizon == 7


def test_a_diverged_run_never_reaches_anything() -> None:
    # Watched for ever: it is among those that outlast every time, however early it ended.
    assert median_time([*reached(1, 2), *missed(math.inf, math.inf, math.inf)]).median is None
    assert median_time([*reached(1, 2, 3), *missed(math.inf)]).median == 2


def test_the_interval_of_a_median_covers_it_and_narrows_with_seeds() -> None:
    times = np.random.default_rng(1).exponential(100, size=400)
    widths = []
    for n in (10, 40, 400):
        median = median_time(reached(*times[:n]))
        assert median.median is not None and median.low is not None and median.high is not None
        assert median.low <= median.median <= median.high
        widths.append(median.high - median.low)
    assert all(narrower < wider for wider, narrower in pairwise(widths))
    assert median.low < 100 * math.log(2) < median.high


def test_the_coverage_of_a_medians_interval_is_exact() -> None:
    # From the least to the greatest of n: all n are on one side with probability 2 / 2^n.
    assert [median_coverage(n) for n in (1, 2, 3, 5)] == pytest.approx([0, 0.5, 0.75, 0.9375])
    draws = np.random.default_rng(0).exponential(size=(1000, 7))
    found = [median_time(reached(*row)) for row in draws]
    covered = [m.low is not None and m.high is not None and m.low <= math.log(2) <= m.high for m in found]
    assert np.mean(covered) == pytest.approx(median_coverage(7), abs=0.03)


def test_the_interval_of_a_median_is_open_where_too_few_got_there() -> None:
    median = median_time([*reached(1, 2, 3, 4), *missed(9)])
    assert (median.low, median.high) == (1, None)


def test_a_race_counts_who_was_first_on_each_seed() -> None:
    one = {"0": Time(1, 1), "1": Time(4, 4), "2": Time(None, 9), "3": Time(None, 2), "4": Time(5, 5)}
    other = {"0": Time(2, 2), "1": Time(3, 3), "2": Time(8, 8), "3": Time(8, 8), "4": Time(None, 5), "5": Time(1, 1)}
    result = race(one, other)
    # Seed 3 is open, as the first run was watched until 2 only. On seed 4 the second was still running at 5.
    assert (result.first, result.second, result.undecided) == (2, 2, 1)
    assert result.p == 1.0
    assert result.ratio is None and math.isnan(result.p_ratio)


def test_a_race_that_all_finish_has_a_ratio() -> None:
    result = race({"0": Time(1, 1), "1": Time(8, 8)}, {"0": Time(2, 2), "1": Time(4, 4)})
    assert result.ratio is not None
    assert result.ratio.mean == pytest.approx(1.0)  # one half and twice
    assert result.ratio.low is not None and 0 < result.ratio.low < 1
    five = {str(seed): Time(1, 1) for seed in range(5)}
    slower = {str(seed): Time(2, 2) for seed in range(5)}
    # Five of five are not enough for the sign test; without scatter, there is no other.
    even = race(five, slower)
    assert even.p == pytest.approx(2 * 0.5**5) and math.isnan(even.p_ratio)
    slower["0"] = Time(3, 3)
    expected = stats.ttest_1samp(-np.log([3, 2, 2, 2, 2]), 0).pvalue
    assert race(five, slower).p_ratio == pytest.approx(expected) and expected < 0.001


def test_a_race_is_tested_by_its_ratios_if_every_common_seed_has_one() -> None:
    one = {str(seed): Time(time, time) for seed, time in enumerate([10.0, 12.0, 11.0])}
    other = {str(seed): Time(time, time) for seed, time in enumerate([20.0, 21.0, 26.0])}
    logs = np.log([10 / 20, 12 / 21, 11 / 26])
    assert race(one, other).p == pytest.approx(stats.ttest_1samp(logs, 0).pvalue)
    # One that missed the target has no ratio: then there are none at all, and who was first counts.
    other["2"] = Time(None, 26)
    result = race(one, other)
    assert (result.ratio, result.first, result.p) == (None, 3, pytest.approx(2 * 0.5**3))


def test_the_share_of_runs_that_reached_a_target_is_kaplan_meiers() -> None:
    # By hand: 1 of 5 at 1; one leaves at 2; 1 of 3 at 3. One is watched until 10.
    x, y = reached_share([*reached(1, 3, 4), *missed(2, 10)])
    assert x.tolist()[0] == 0 and x.tolist()[-1] == 10
    shares = {time: share for time, share in zip(x, y, strict=True)}
    assert [shares[time] for time in (0, 1, 3, 4, 10)] == pytest.approx([0, 1 / 5, 7 / 15, 11 / 15, 11 / 15])
    # Of those that diverged none ever reaches it, however early they ended.
    assert reached_share([*reached(1), *missed(math.inf)])[1].tolist() == [0, 0.5, 0.5]
    x, y = reached_share(missed(5, 7))
    assert (x.tolist(), y.tolist()) == ([0, 7], [0, 0])


def test_quartiles_are_the_times_by_which_a_quarter_and_three_quarters_got_there() -> None:
    assert median_time(reached(1, 2, 3, 4)).quartiles == (1, 3)
    assert median_time([*reached(1, 2), *missed(9, 9)]).quartiles == (1, None)
    assert median_time(missed(9, 9)).quartiles == (None, None)


def test_a_time_has_no_interval_below_zero() -> None:
    scattered = [200.0, 210.0, 1800.0]
    plain = mean_interval(scattered)
    assert plain.low is not None and plain.low < 0
    logs = np.log(scattered)
    expected = np.exp(stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs)))
    found = geometric_interval(scattered)
    assert found.mean == pytest.approx(stats.gmean(scattered))
    assert (found.low, found.high) == pytest.approx(tuple(expected))
