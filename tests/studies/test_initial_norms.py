"""The norms are those of the initialisation's distribution."""

import math

import pytest

from studies.initial_norms import rho_and_norm
from tests.helpers.commands import ROOT


def test_the_median_norm_of_a_network_is_that_of_its_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    # torch draws a convolution's entries uniformly, with a variance of 1 / (3 inputs). The median one has 128 outputs.
    rho, norm = rho_and_norm("cifar_sync")
    assert rho == 0.1 and norm == pytest.approx(math.sqrt(128 / 3), rel=0.01)
