"""Run the tests that need a GPU, tests/gpu."""

import pytest

from benchmarks.gpu_parts.report import Report


def run(report: Report) -> None:
    """Run the tests in this process; each is named with its result as it ends."""
    options = ["-m", "gpu", "--verbose", "--tb=short", "--no-header", "--durations=5", "-p", "no:cacheprovider"]
    code = pytest.main([*options, "tests/gpu"])
    report.check("tests/gpu", code == pytest.ExitCode.OK, f"pytest ends with {int(code)}")
