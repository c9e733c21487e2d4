"""Run the tests that need a GPU, tests/gpu."""

import pytest

from benchmarks.gpu_parts.report import Report


def run(report: Report) -> None:
    """Run the tests in this process, and print the name and result of each.

    Tests that compile are left out. They take longer than the limit, and the part ``graphs`` checks the same.
    """
    options = ["-m", "gpu", "--verbose", "--tb=short", "--no-header", "--durations=5", "-p", "no:cacheprovider"]
    options += ["--ignore", "tests/gpu/test_step_compiled.py"]
    code = pytest.main([*options, "tests/gpu"])
    report.check("tests/gpu", code == pytest.ExitCode.OK, f"pytest ends with {int(code)}")
