"""Processes send what the formulas give, mode by mode."""

import pytest

from benchmarks import scaling
from benchmarks.scaling_on_paper import MODES, Network, seconds, sent

NET = Network(parameters=1000, matrices=800, iteration=[500, 300], operations=10**6)


@pytest.mark.slow
def test_the_measured_bytes_are_those_of_the_modes() -> None:
    rows = {row["mode"]: row["sent_bytes"] / row["gradient_bytes"] for row in scaling.run(["grokking"], seconds=0.1)}
    assert rows["AdamW"] == 1
    # Directions are 2 bytes, gradients 4; the greater of two shares is at least half of them.
    directions = rows["base"] - 1
    assert 0.2 < directions < 0.5
    assert rows["sync"] == pytest.approx(2 + directions)
    assert rows["sync, first pass local"] == pytest.approx(1 + directions)
    assert rows["aga"] == pytest.approx(1 + directions + 1 / scaling.PERIOD)


def test_in_the_model_one_gpu_sends_nothing_and_two_send_as_in_a_ring() -> None:
    for mode in MODES.values():
        assert sent(NET, mode, 1) == 0
        assert sent(NET, mode, 2) == mode.averaged * 4000 + mode.orthogonalizes * 800


def test_in_the_model_the_iteration_is_shared_by_at_most_one_rank_a_matrix() -> None:
    alone, two, four = (seconds(NET, MODES["Base"], n) - sent(NET, MODES["Base"], n) / 450e9 for n in (1, 2, 4))
    assert alone > two == four
