"""The GPU benchmark keeps its limits and rehearses on a CPU.

A part that fails stops no other part.
"""

import json
import math
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.device_timing import host_syncs, milliseconds_in_a_row
from benchmarks.gpu import Output, Part, limits, run_in_turn, started
from benchmarks.gpu_parts import NUMBER, newton_schulz, parity, step
from benchmarks.gpu_parts.report import NEEDS_GPU, Report
from tests.helpers.marks import slow

WORKS = "import sys; print('seconds:', sys.stdin.readline().strip())"
HANGS = "import time; print('before', flush=True); time.sleep(60)"


def python(name: str, code: str, share: float = 1.0) -> Part:
    return Part(name, share, (sys.executable, "-c", code))


def run(parts: list[Part], seconds: float, file: Path) -> tuple[int, list[str]]:
    with file.open("w") as text, started(parts) as running:
        code = run_in_turn(running, time.monotonic() + seconds, Output(text))
    return code, file.read_text().splitlines()


def test_parts_that_succeed_give_exit_code_0(tmp_path: Path) -> None:
    code, lines = run([python("one", WORKS), python("two", WORKS)], 20, tmp_path / "out")
    assert code == 0
    assert [line for line in lines if line in ("one", "two")] == ["one", "two"]
    first, second = (float(line.removeprefix("seconds: ")) for line in lines if line.startswith("seconds"))
    assert 9 < first <= 10 < second <= 20  # the second part has the time that the first one did not use


@pytest.mark.slow
def test_a_part_that_hangs_is_stopped_at_its_limit_and_the_others_run(tmp_path: Path) -> None:
    start = time.monotonic()
    code, lines = run([python("hangs", HANGS), python("works", WORKS, share=5)], 12, tmp_path / "out")
    assert time.monotonic() - start < 12
    assert code == 1
    assert lines[1:4] == ["hangs", "before", "  stopped after 2 s"]
    assert any(line.startswith("seconds") for line in lines)


@pytest.mark.slow
def test_processes_of_a_stopped_part_are_stopped_with_it(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(1.5); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    assert run([python("parent", code)], 1, tmp_path / "out")[0] == 1
    time.sleep(1.5)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("crash", "expected"),
    [
        ("import os; print('before', flush=True); os._exit(3)", "  failed (exit code 3)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "  failed (killed by SIGKILL)"),
        ("raise ValueError('no such thing')", "  failed (exit code 1): ValueError: no such thing"),
    ],
)
def test_a_crash_of_a_part_is_reported_and_the_others_run(crash: str, expected: str, tmp_path: Path) -> None:
    code, lines = run([python("crashes", crash), python("works", WORKS)], 20, tmp_path / "out")
    assert code == 1
    assert expected in lines
    assert any(line.startswith("seconds") for line in lines)


def test_limits_sum_to_the_available_time() -> None:
    found = limits(list(gpu.SHARES.values()), gpu.SECONDS - gpu.MARGIN)
    assert sum(found) <= gpu.SECONDS
    assert min(found) > 4
    assert limits([1, 3], 8) == [2, 6]


def test_numbers_go_to_a_separate_file(tmp_path: Path) -> None:
    with (tmp_path / "text").open("w") as text, (tmp_path / "json").open("w") as numbers:
        output = Output(text, numbers)
        output.line("a line")
        output.line(NUMBER + '{"value": 1}')
    assert (tmp_path / "text").read_text() == "a line\n"
    assert (tmp_path / "json").read_text() == '{"value": 1}\n'


def test_without_a_gpu_the_benchmark_ends_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--parts", "parity"])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "put back by the fixture")
    assert gpu.main() == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert error == "error: there is no GPU; --device cpu --rehearse makes every part at a tiny size\n"


def test_the_lower_bound_equals_one_by_hand() -> None:
    # 5 (4 * 2^2 * 3 + 2 * 2^3) = 320 operations, whichever side is the longer one.
    assert step.newton_schulz_operations([torch.Size((1, 2, 3))]) == 320
    assert step.newton_schulz_operations([torch.Size((1, 3, 2)), torch.Size((4, 2, 3))]) == 5 * 320
    # 320 operations at 1000 a second, and 6 + 5 parameters of 7 float32 at 500 bytes a second.
    groups = [
        {"track": "matrix", "params": [("w", torch.zeros(2, 3))]},
        {"track": "vector", "params": [("b", torch.zeros(5))]},
    ]
    base, adamw = step.CONTESTANTS["ARS2-Neo base"], step.CONTESTANTS["AdamW fused"]
    assert step.floor_of(groups, base, step.Limits(1000, 500)) == pytest.approx(1e3 * (0.32 + 11 * 7 * 4 / 500))
    assert step.floor_of(groups, adamw, step.Limits(1000, 500)) == pytest.approx(1e3 * 11 * 7 * 4 / 500)


def test_counting_host_syncs_runs_the_step_once_and_is_safe_without_a_gpu() -> None:
    calls: list[int] = []
    count = host_syncs(lambda: calls.append(1))
    assert (calls, count) == ([1], 0)


def test_host_syncs_are_counted_by_the_warnings_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits_twice() -> None:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("another warning", stacklevel=1)

    assert host_syncs(waits_twice) == 2
    assert modes == ["warn", 0]


def test_steps_in_a_row_are_a_multiple_of_the_period() -> None:
    calls: list[int] = []
    assert milliseconds_in_a_row(lambda: calls.append(1), "cpu", 0.0, at_least=3, multiple=5) >= 0
    assert len(calls) == 1 + 5


def test_a_measurement_that_fails_does_not_affect_the_next_one(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("part", "cpu", True, 10)
    assert report.attempt("first", lambda: [][1]) is None
    assert report.attempt("second", lambda: 2) == 2
    assert report.attempt("third", lambda: 3, gpu=True) == NEEDS_GPU
    assert report.attempt("fourth", lambda: 4, needs=11) == "no time"
    assert report.failed
    assert capsys.readouterr().out == "  first: failed: IndexError: list index out of range\n"


def numbers_of(text: str) -> list[float]:
    return [json.loads(line.removeprefix(NUMBER))["value"] for line in text.splitlines() if line.startswith(NUMBER)]


@pytest.mark.slow
def test_on_the_cpu_parity_with_itself_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("parity", "cpu", True, 60)
    parity.run(report)
    out = capsys.readouterr().out
    assert not report.failed and "FAIL" not in out
    assert out.count("  pass  ") == 2 * len(parity.MODES)
    assert len(found := numbers_of(out)) >= 3 * len(parity.MODES) and all(map(math.isfinite, found))


@pytest.mark.parametrize("part", [slow(step), newton_schulz])
def test_a_rehearsal_gives_finite_numbers(part: object, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("part", "cpu", True, 60)
    part.run(report)  # type: ignore[attr-defined]
    out = capsys.readouterr().out
    assert not report.failed and "failed" not in out
    assert len(found := numbers_of(out)) > 10 and all(map(math.isfinite, found))


def test_a_symmetric_product_by_blocks_is_the_product() -> None:
    left = torch.randn(2, 12, 7, dtype=torch.float64)
    for width in (3, 5, 12):
        torch.testing.assert_close(newton_schulz.by_blocks(left, left.mT, width), left @ left.mT)
