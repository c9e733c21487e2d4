"""Compare with closed forms, tables of textbooks, SciPy and simulation."""

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from analysis.statistics import bounded_interval, detectable_effect, holm, mean_interval, paired
from analysis.times import Time, median_coverage, median_time, race


def reached(*times: float) -> list[Time]:
    return [Time(time, time) for time in times]


def missed(*watched: float) -> list[Time]:
    return [Time(None, end) for end in watched]


def test_the_interval_of_a_mean_is_students() -> None:
    # Mean 2, deviation 1, three values: the 97.5 % point of t with 2 degrees of freedom is 4.30265.
    interval = mean_interval([1.0, 2.0, 3.0])
    assert (interval.n, interval.mean) == (3, 2.0)
    assert interval.low == pytest.approx(2 - 4.30265 / math.sqrt(3), abs=1e-5)
    assert interval.high == pytest.approx(2 + 4.30265 / math.sqrt(3), abs=1e-5)


def test_an_interval_on_the_log_scale_stays_within_the_range() -> None:
    values = [0.01, 0.02, 0.15]
    plain, log, logit = mean_interval(values), bounded_interval(values), bounded_interval(values, 1.0)
    assert plain.low is not None and plain.low < 0 and plain.high is not None
    for found, derivative in ((log, 1 / plain.mean), (logit, 1 / plain.mean / (1 - plain.mean))):
        assert found.low is not None and found.high is not None
        ends = np.array([found.low, plain.mean, found.high])
        if found is logit:
            ends = ends / (1 - ends)
        half = (plain.high - plain.mean) * derivative
        assert np.diff(np.log(ends)) == pytest.approx([half, half])
    # Without scatter there is nothing to transform, also at the ends of the range.
    for same in (0.0, 1.0):
        assert vars(bounded_interval([same] * 3, 1.0)) == {"n": 3, "mean": same, "low": same, "high": same}
    assert bounded_interval([0.5], 1.0) == mean_interval([0.5])


def test_one_value_has_no_interval_and_none_has_no_mean() -> None:
    one = mean_interval([5.0, math.nan, math.inf])
    assert (one.n, one.mean, one.low, one.high) == (1, 5.0, None, None)
    assert math.isnan(mean_interval([math.nan]).mean)


def test_paired_seeds_are_compared_seed_by_seed() -> None:
    first, second = {"0": 3.0, "1": 5.0, "2": 7.0, "9": 100.0}, {"2": 6.0, "1": 3.0, "0": 2.5, "8": -100.0}
    compared = paired(first, second)
    assert compared is not None
    # Differences 0.5, 2 and 1 in any order; seeds that only one has do not count.
    assert (compared.difference.n, compared.difference.mean) == (3, pytest.approx(3.5 / 3))
    assert compared.p == pytest.approx(stats.ttest_rel([3.0, 5.0, 7.0], [2.5, 3.0, 6.0]).pvalue)
    error = np.std([0.5, 2.0, 1.0], ddof=1) / math.sqrt(3)
    assert compared.detectable == pytest.approx(detectable_effect(3) * error)


@pytest.mark.parametrize("values", [{"0": 1.0}, {"0": 1.0, "1": math.nan}, {"7": 1.0, "8": 2.0}])
def test_fewer_than_two_common_seeds_compare_nothing(values: dict[str, float]) -> None:
    assert paired(values, {"0": 2.0, "1": 3.0}) is None


def test_without_scatter_there_is_no_p_value() -> None:
    compared = paired({"0": 1.0, "1": 2.0}, {"0": 0.5, "1": 1.5})
    assert compared is not None
    assert compared.difference.mean == 0.5
    assert math.isnan(compared.p)
    # One point better on both seeds, as single precision has it: the differences are equal but for rounding.
    single = [{str(seed): float(np.float32(value)) for seed, value in enumerate(v)} for v in ((0.9, 0.8), (0.8, 0.7))]
    compared = paired(*single)
    assert compared is not None
    assert math.isnan(compared.p)


@pytest.mark.slow
def test_the_smallest_detectable_difference_is_detected_in_four_of_five_experiments() -> None:
    generator = np.random.default_rng(0)
    for n in (3, 5, 10):
        effect = detectable_effect(n) / math.sqrt(n)  # in deviations of one value
        samples = generator.normal(effect, 1.0, size=(20_000, n))
        detected = (stats.ttest_1samp(samples, 0.0, axis=1).pvalue < 0.05).mean()
        assert detected == pytest.approx(0.8, abs=0.012), n
    # With many values t is normal: 1.96 + 0.8416.
    assert detectable_effect(2000) == pytest.approx(2.8016, abs=0.01)


def test_holm_adjusts_as_in_its_definition() -> None:
    # Three p-values: 3 times the least; twice the next, but no less than that; the last itself, but no less.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    adjusted = holm([0.6, math.nan, 0.5])
    assert adjusted[0] == adjusted[2] == 1.0
    assert math.isnan(adjusted[1])


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
