"""The best of k trials, against every choice of k."""

import itertools

import numpy as np
import pytest

from analysis.search_pictures import best_of_k


@pytest.mark.parametrize("lower", [True, False])
def test_quantiles_are_those_over_all_choices(lower: bool) -> None:
    values = [5.0, 1.0, 3.0, None, 8.0, 2.0, None]
    worst = np.inf if lower else -np.inf
    numbers = [worst if value is None else value for value in values]
    found = best_of_k(values, lower)
    for k in range(1, len(values) + 1):
        best = np.sort([(min if lower else max)(chosen) for chosen in itertools.combinations(numbers, k)])
        # The value that at least this part of all choices are as good as.
        expected = []
        for level in (0.1, 0.5, 0.9):
            place = int(np.ceil(level * len(best) - 1e-9)) - 1
            expected.append(best[place] if lower else best[::-1][place])
        assert found[k - 1].tolist() == (expected if lower else expected[::-1])


def test_the_best_of_all_trials_is_the_best_trial() -> None:
    values = np.random.default_rng(0).random(32).tolist()
    assert best_of_k(values, True)[-1].tolist() == [min(values)] * 3
    assert best_of_k(values, False)[-1].tolist() == [max(values)] * 3
    assert (np.diff(best_of_k(values, True), axis=0) <= 0).all()
    # The band is ordered from low to high for either direction.
    assert all((np.diff(best_of_k(values, lower), axis=1) >= 0).all() for lower in (True, False))
