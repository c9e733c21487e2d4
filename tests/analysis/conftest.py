from pathlib import Path

import pytest

from tests.analysis.runs import make_corners, make_runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of real runs; tests copy what they damage."""
    folder = tmp_path_factory.mktemp("runs")
    make_runs(folder)
    return folder


@pytest.fixture(scope="session")
def corners(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search's winners: all eight corners of flatness, geometry and energy, probed, two seeds each."""
    folder = tmp_path_factory.mktemp("corners")
    make_corners(folder)
    return folder
