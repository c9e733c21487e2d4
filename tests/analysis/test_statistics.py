"""Compare with closed forms, tables of textbooks, SciPy and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from analysis.statistics import bounded_interval, detectable_effect, holm, mean_interval, paired


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
    assert compared.detectable == pytest.approx(detectable_effect(3) * np.std([0.5, 2.0, 1.0], ddof=1))


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
        samples = generator.normal(detectable_effect(n), 1.0, size=(20_000, n))
        detected = (stats.ttest_1samp(samples, 0.0, axis=1).pvalue < 0.05).mean()
        assert detected == pytest.approx(0.8, abs=0.012), n
    # With many values t is normal: 1.96 + 0.8416 standard errors.
    assert math.sqrt(2000) * detectable_effect(2000) == pytest.approx(2.8016, abs=0.01)


def test_holm_adjusts_as_in_its_definition() -> None:
    # Three p-values: 3 times the least; twice the next, but no less than that; the last itself, but no less.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    adjusted = holm([0.6, math.nan, 0.5])
    assert adjusted[0] == adjusted[2] == 1.0
    assert math.isnan(adjusted[1])
