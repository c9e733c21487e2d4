import re
from pathlib import Path

import lightning.pytorch as L
import pytest
import rich
from rich.console import Console

from callbacks import progress_bar
from callbacks.progress_bar import folded
from tests.callbacks.fits import data, module
from tests.callbacks.fits import fit as trained
from tests.helpers.commands import AGA, TINY, call, fit


def set_width(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Let the console, which an earlier test may have made, have a width."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(rich, "_console", None)


def lines(*arguments: object) -> list[str]:
    """Return the progress lines of a run of six epochs without a terminal."""
    result = call("fit", *AGA, *TINY, "--trainer.max_epochs", 6, *arguments)
    assert result.code == 0
    return [line for line in result.out.splitlines() if line.startswith("epoch ")]


def test_lines_are_rare(tmp_path: Path) -> None:
    # Six epochs take less than the ten seconds between two lines.
    assert lines("--runs", tmp_path) == []


def test_a_line_has_metrics_rate_and_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_width(monkeypatch, 200)
    monkeypatch.setattr(progress_bar, "_SECONDS_BETWEEN_LINES", 0.0)
    shown = lines("--runs", tmp_path)
    assert [line.split(",")[0] for line in shown] == [f"epoch {number}" for number in range(1, 7)]
    number = r"\d+(\.\d+)?(e-?\d+)?"
    metrics = "".join(rf".*{name} {number}" for name in ("val/loss", "val/accuracy", "train/loss", "train/accuracy"))
    for line in shown[:-1]:
        assert re.search(rf"{metrics}, .*{number} epochs/s, at most [\d.]+ s left$", line), line


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
    set_width(monkeypatch, 200)
    folder = fit(tmp_path, *AGA, *TINY, "--trainer.max_epochs", 4)
    monkeypatch.setattr(progress_bar, "_SECONDS_BETWEEN_LINES", 0.0)
    now = iter(range(10**9))
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: float(next(now)))
    shown = lines("--runs", tmp_path, "--ckpt_path", folder / "checkpoints/last.ckpt")
    assert [line.split(",")[0] for line in shown] == ["epoch 5", "epoch 6"]
    # One epoch took a few of these seconds. Four that were not seen would have made that a fifth.
    left = re.search(r"at most ([\d.]+) s left", shown[0])
    rate = re.search(r"([\d.]+) epochs/s", shown[0])
    assert left is not None
    assert rate is not None
    assert abs(float(left[1]) - 1 / float(rate[1])) <= 1.5


NAMES = ("loss", "accuracy", "perplexity", "word_perplexity", "bits_per_byte")
LONG = "val/mean_absolute_percentage_error_of_the_second_output_head_by_day"


class LogsEveryMetric(L.Callback):
    """Log what the three tasks log, and what a user's task might."""

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name in (*(f"{stage}/{name}" for stage in ("train", "val") for name in NAMES[2:]), LONG):
            pl_module.log(name, 1234.5678, prog_bar=True)


def screens(written: str) -> list[str]:
    """Return each written line of a terminal, without control sequences."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", written))


@pytest.mark.parametrize("width", [60, 80])
def test_the_bar_and_its_metrics_fit_the_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(rich, "_console", Console())
    bar = progress_bar.ProgressBar()
    drawn = []

    class Draws(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert bar.progress is not None
            bar.get_metrics(trainer, pl_module)
            with rich.get_console().capture() as capture:
                rich.get_console().print(bar.progress.get_renderable())
            drawn.append(screens(capture.get()))

    trained(module(), data(), [LogsEveryMetric(), bar, Draws()], None, 1200, enable_progress_bar=True, max_steps=8)
    first, *metrics = [line.rstrip() for line in drawn[-1] if line.strip()]
    assert re.fullmatch(r"Epoch 2/1200 ━*[╸╺]?━* 4/4 \d:\d\d:\d\d • \d:\d\d:\d\d( [\d.]+it/s)?", first), first
    assert max(map(len, [first, *metrics])) <= width
    text = re.sub(",? +", " ", " ".join(metrics))
    for name in (f"{stage}/{name}" for stage in ("train", "val") for name in NAMES):
        assert re.search(rf"{name} \d", text), (name, text)
    assert LONG in "".join(line.strip() for line in metrics)
    assert max(map(len, screens(capsys.readouterr().out))) <= width


@pytest.mark.parametrize("width", [60, 80])
def test_lines_without_a_terminal_fit_too(width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_bar, "_SECONDS_BETWEEN_LINES", 0.0)
    set_width(monkeypatch, width)
    logs = "tests.callbacks.test_progress_bar.LogsEveryMetric"
    result = call("fit", *AGA, *TINY, "--trainer.callbacks+", logs, "--runs", tmp_path)
    assert result.code == 0, result.err
    written = re.findall(r"^epoch \d.*\n(?:  .*\n)*", result.out, re.M)
    assert len(written) == 2
    assert max(len(line) for lines in written for line in lines.splitlines()) <= width
    assert all(f"val/{name} " in lines for lines in written for name in NAMES)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", result.out)


def test_a_folded_line_breaks_between_items_alone() -> None:
    assert folded(["epoch 1", "val/loss 0.5", "1 epochs/s"], 24) == ["epoch 1, val/loss 0.5,", "  1 epochs/s"]


def test_progress_can_be_turned_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the summary alone, which has the number of epochs."""
    monkeypatch.setattr(progress_bar, "_SECONDS_BETWEEN_LINES", 0.0)
    for more in ([], ["--trainer.enable_progress_bar", "false"]):
        result = call("fit", *AGA, *TINY, *more, "--runs", tmp_path)
        assert result.code == 0, result.err
        assert bool(re.search("^epoch |epochs/s|it/s", result.out, re.M)) == (not more)
        assert "Run finished after 2 epochs" in result.out and result.err == ""


def test_progress_can_be_turned_off_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    for shown in (True, False):
        monkeypatch.setattr(rich, "_console", Console())
        result = call("fit", *AGA, *TINY, "--trainer.enable_progress_bar", shown, "--runs", tmp_path)
        assert ("Epoch 1" in result.out, "━" in result.out) == (shown, shown)
