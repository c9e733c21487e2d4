import re
from pathlib import Path

import pytest
import rich
from rich.console import Console

from callbacks import progress_bar
from callbacks.progress_bar import clock
from tests.callbacks.fits import data, module
from tests.callbacks.fits import fit as trained
from tests.helpers.commands import AGA, TINY, call, fit


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (9.4, "0:09"), (59.6, "1:00"), (61, "1:01"), (3599.7, "1:00:00"), (3661, "1:01:01")],
)
def test_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def lines(*arguments: object) -> list[str]:
    """Return the progress lines of a run of six epochs without a terminal."""
    result = call("fit", *AGA, *TINY, "--trainer.max_epochs", 6, *arguments)
    assert result.code == 0
    return [line for line in result.out.splitlines() if line.startswith("epoch ")]


def test_lines_are_rare(tmp_path: Path) -> None:
    # Six epochs take less than the ten seconds between two lines.
    assert lines("--runs", tmp_path) == []


def test_a_line_has_metrics_rate_and_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_bar, "_SECONDS_BETWEEN_LINES", 0.0)
    shown = lines("--runs", tmp_path)
    assert [line.split(",")[0] for line in shown] == [f"epoch {number}" for number in range(1, 7)]
    number = r"\d+(\.\d+)?(e-?\d+)?"
    metrics = "".join(rf".*{name} {number}" for name in ("val/loss", "val/accuracy", "train/loss", "train/accuracy"))
    for line in shown[:-1]:
        assert re.search(rf"{metrics}, .*{number} epochs/s, at most \d+:\d\d left$", line), line


@pytest.mark.parametrize(("epochs", "steps", "total"), [(2, -1, "/2"), (-1, 8, "")])
def test_the_bar_counts_epochs_from_1(
    epochs: int, steps: int, total: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(rich, "_console", Console())
    trained(module(), data(), [progress_bar.ProgressBar()], None, epochs, enable_progress_bar=True, max_steps=steps)
    written = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", capsys.readouterr().out)
    assert set(re.findall(r"Epoch (\S+)", written)) == {f"1{total}", f"2{total}"}


def test_time_left_counts_from_where_the_run_was_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a clock that advances one second at each reading.

    It starts after the resumed epoch.
    """
    folder = fit(tmp_path, *AGA, *TINY, "--trainer.max_epochs", 4)
    monkeypatch.setattr(progress_bar, "_SECONDS_BETWEEN_LINES", 0.0)
    now = iter(range(10**9))
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: float(next(now)))
    shown = lines("--runs", tmp_path, "--ckpt_path", folder / "checkpoints/last.ckpt")
    assert [line.split(",")[0] for line in shown] == ["epoch 5", "epoch 6"]
    # One epoch took a few of these seconds. Four that were not seen would have made that a fifth.
    left = re.search(r"at most 0:(\d\d) left", shown[0])
    rate = re.search(r"([\d.]+) epochs/s", shown[0])
    assert left is not None
    assert rate is not None
    assert abs(int(left[1]) - 1 / float(rate[1])) <= 1.5
