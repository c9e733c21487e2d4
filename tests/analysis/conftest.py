from pathlib import Path

import pytest

from tests.analysis.runs import unpack


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of real runs; tests copy a run before they damage it."""
    return unpack("runs", tmp_path_factory.mktemp("unpacked"))


@pytest.fixture(scope="session")
def corners(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a search's winners of all eight corners, two seeds each, probed."""
    return unpack("corners", tmp_path_factory.mktemp("unpacked"))
