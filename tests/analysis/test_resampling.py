"""Permutation tests, adjusted p-values, powers and probabilities of improvement, against definitions."""

import itertools

import numpy as np
import pytest
from scipy import stats

from analysis.statistics import (
    Mean,
    bounded_interval,
    detectable_effect,
    holm,
    improvement,
    mean_intervals,
    paired,
    pairs_ahead,
    permutation_p,
    scaled,
)
from analysis.times import Time, race


def test_the_permutation_test_counts_every_change_of_signs() -> None:
    differences = [0.5, 2.0, 1.0, -0.25, 1.5]
    means = [np.mean(np.multiply(differences, signs)) for signs in itertools.product((1, -1), repeat=5)]
    extreme = sum(abs(mean) >= abs(np.mean(differences)) - 1e-12 for mean in means)
    assert permutation_p(differences) == pytest.approx(extreme / 32)
    # The least that n seeds can give.
    for n in (2, 5, 10):
        assert permutation_p([1.0 + 0.1 * i for i in range(n)]) == pytest.approx(2 / 2**n)


def test_random_signs_agree_with_all_of_them() -> None:
    differences = np.random.default_rng(1).normal(0.4, 1.0, 16)  # 65,536 changes of signs
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=16)))
    exact = float((np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9).mean())
    assert permutation_p(differences.tolist()) == pytest.approx(exact, abs=4 * np.sqrt(exact / 9999))


def test_without_scatter_no_test_has_a_p_value() -> None:
    compared = paired({"0": 1.0, "1": 2.0}, {"0": 0.5, "1": 1.5})
    assert compared is not None and np.isnan(compared.p_permutation)
    tied = race({"0": Time(10, 10), "1": Time(20, 20)}, {"0": Time(20, 20), "1": Time(40, 40)})
    assert np.isnan(tied.p_ratio) and np.isnan(tied.p_permutation)
    assert tied.p == tied.p_sign == 0.5


def test_holm_is_the_definition_for_any_number_of_p_values() -> None:
    generator = np.random.default_rng(0)
    for n in range(1, 8):
        p = generator.random(n)
        order, expected, highest = np.argsort(p), np.empty(n), 0.0
        for rank, place in enumerate(order):
            highest = max(highest, min(1.0, (n - rank) * p[place]))
            expected[place] = highest
        assert holm(p.tolist()) == pytest.approx(expected)
    assert holm([]) == [] and np.isnan(holm([np.nan])).all()


@pytest.mark.parametrize("n", [2, 5, 16])
def test_the_detectable_effect_has_a_power_of_four_fifths(n: int) -> None:
    effect, critical = detectable_effect(n), stats.t.ppf(0.975, n - 1)
    power = stats.nct.sf(critical, n - 1, effect * np.sqrt(n)) + stats.nct.cdf(-critical, n - 1, effect * np.sqrt(n))
    assert power == pytest.approx(0.8, abs=1e-4)


def test_the_probability_of_improvement_is_that_of_mann_and_whitney() -> None:
    one, other = [1.0, 3.0, 5.0, 5.0], [2.0, 4.0, 5.0]
    found = improvement(pairs_ahead(one, other, lower=False))
    assert found.mean == pytest.approx(stats.mannwhitneyu(one, other).statistic / 12)
    assert found.low is not None and found.high is not None and 0 <= found.low < found.mean < found.high <= 1
    assert improvement(pairs_ahead(one, other, lower=True)).mean == pytest.approx(1 - found.mean)
    # A run that diverged has no value, and is behind every run with one.
    assert pairs_ahead([np.nan, 1.0], [2.0, np.nan], lower=True).tolist() == [[0, 0.5], [1, 1]]


@pytest.mark.parametrize(("runs", "others"), [(2, 2), (3, 9), (10, 4)])
def test_where_all_pairs_agree_the_limit_is_that_of_as_many_pairs_of_different_runs(runs: int, others: int) -> None:
    # The bootstrap has no scatter there, and an interval of no width would say too much.
    n, values = min(runs, others), [float(place) for place in range(runs)]
    better, worse = (improvement(pairs_ahead(values, [other] * others, lower=False)) for other in (-1.0, 99.0))
    for found, ahead in ((better, n), (worse, 0)):
        exact = stats.binomtest(ahead, n).proportion_ci(method="exact")
        assert (found.n, found.mean) == (n, ahead / n)
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
    # By hand: that all of n agree has a probability of 2.5 % at the limit.
    assert better.low is not None and better.low**n == pytest.approx(0.025)


def test_a_single_run_has_no_interval_of_the_probability_and_ties_a_wide_one() -> None:
    assert improvement(pairs_ahead([2.0], [0.0, 1.0], lower=False)) == Mean(1, 1.0, None, None)
    # Ties count one half: of two pairs of different runs one is won.
    ties = improvement(pairs_ahead([1.0, 1.0], [1.0, 1.0, 1.0], lower=False))
    exact = stats.binomtest(1, 2).proportion_ci()
    assert (ties.mean, ties.low, ties.high) == pytest.approx((0.5, exact.low, exact.high))
    # One half may also be of pairs that do not agree.
    found = improvement(pairs_ahead([1.0, 4.0], [2.0, 3.0], lower=False))
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)


def test_one_tie_does_not_make_the_interval_narrow() -> None:
    # All of ten seeds ahead, but for one tie: the bootstrap alone has hardly any scatter.
    agreed, tied = (improvement(pairs_ahead([2.0] * 9 + [last], [1.0] * 10, lower=False)) for last in (2.0, 1.0))
    assert agreed.low is not None and tied.low is not None
    assert tied.mean == 0.95 and tied.low < agreed.low == pytest.approx(0.025**0.1)


def test_the_bootstrap_interval_covers_the_probability_of_improvement() -> None:
    generator, covered = np.random.default_rng(0), 0
    truth = stats.norm.cdf(0.5 / np.sqrt(2))
    for _ in range(100):
        one, other = generator.normal(0.5, 1, 15), generator.normal(0, 1, 15)
        found = improvement(pairs_ahead(one.tolist(), other.tolist(), lower=False))
        assert found.low is not None and found.high is not None
        covered += found.low <= truth <= found.high
    assert covered >= 88


def test_unreached_times_are_undecided_among_each_other() -> None:
    times = {"0": Time(10, 40), "1": Time(None, 40)}
    found = race(times, {"0": Time(20, 40), "1": Time(None, 40)})
    assert (found.first, found.second, found.undecided) == (1, 0, 1)
    assert found.ratio is None and found.pairs.tolist() == [[1, 1], [0, 0.5]]
    assert improvement(found.pairs).mean == 2.5 / 4


def test_a_band_of_shares_stays_between_nothing_and_everything() -> None:
    values = np.array([[0.01, 50.0, 99.9, 0.0], [0.02, 60.0, 99.0, 0.0], [5.0, 70.0, 100.0, 0.0]])
    mean, low, high = mean_intervals(values, 100.0)
    assert mean_intervals(values)[1][0] < 0 and mean_intervals(values)[2][2] > 100  # without the bounds
    assert (low[:3] > 0).all() and (high[:3] < 100).all()
    assert (low[3], high[3]) == (0, 0)
    for place in range(3):
        expected = bounded_interval(values[:, place].tolist(), 100.0)
        assert (mean[place], low[place], high[place]) == pytest.approx((expected.mean, expected.low, expected.high))


def test_another_unit_or_sign_keeps_the_limits_in_order() -> None:
    assert scaled(Mean(3, 2.0, 1.0, 4.0), -100) == Mean(3, -200.0, -400.0, -100.0)
    assert scaled(Mean(1, 2.0, None, None), 100) == Mean(1, 200.0, None, None)
