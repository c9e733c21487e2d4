"""Mark cases of parametrized tests."""

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """Return one case of a parametrized test that only ``make test-all`` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)
