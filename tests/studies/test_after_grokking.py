"""A row is its winner without a limit, and the measure counts what comes after the first 99 %."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from analysis.runs import Run
from studies import after_grokking
from studies.after_grokking import ROWS, config_of, kept, picture, table
from studies.newton_schulz_steps import winner
from tests.helpers.commands import ROOT


def run(accuracy: list[float], row: str = "base_all") -> Any:
    made = Run.__new__(Run)
    made.log = {"epoch": 5.0 * np.arange(1, len(accuracy) + 1), "val/accuracy": np.array(accuracy)}
    made._curves, made.diverged = {}, False
    made.identity = SimpleNamespace(experiment=row)  # type: ignore[assignment]
    return made


def test_only_validations_after_the_first_of_99_percent_count() -> None:
    single = float(np.float32(0.99))  # is below the double 0.99, and reaches it
    found = kept(run([0.2, single, 1.0, 0.5, single, 0.98, 0.98]))
    assert found is not None and (found.epoch, found.below, found.longest) == (10, 0.6, 2)
    assert (found.lowest, found.last) == pytest.approx((0.5, 0.98))
    assert kept(run([0.2, 0.98])) is None
    last = kept(run([0.2, 1.0]))
    assert last is not None and last.epoch == 10 and np.isnan([last.below, last.lowest, last.last]).all()


def test_the_table_has_medians_and_ranges_over_seeds() -> None:
    lost, kept_it, never = run([1.0, 0.5, 1.0]), run([0.1, 1.0, 1.0]), run([0.1, 0.1, 0.1], "muon_hidden")
    lines = table([lost, kept_it, never]).splitlines()
    base = ["2", "2", "7.5 (5 to 10)", "25 % (0 to 50)", "0.5 (0 to 1)", "75 % (50 to 100)", "100 % (100 to 100)"]
    assert lines[2] == f"| ARS2-Neo Base, all | {' | '.join(base)} |"
    assert lines[7] == "| Muon, hidden | 1 | 0 | - | - | - | - | - |"


def test_the_picture_has_a_panel_for_each_row_with_its_runs() -> None:
    panels = picture([run([1.0, 0.5]), run([0.1, 1.0]), run([0.1, 0.1], "muon_hidden")]).axes
    assert [axes.get_title("left") for axes in panels] == list(ROWS.values())
    assert [len(axes.lines) for axes in panels] == [2, 0, 0, 0, 0, 1]
    assert list(panels[0].lines[0].get_ydata()) == [100, 50]


def test_the_report_reads_the_committed_runs_and_draws_beside_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # restores what the command sets
    shutil.copy(ROOT / "results/after_grokking/runs.zip", tmp_path)
    with patch.object(sys, "argv", ["after_grokking", "report", "--folder", str(tmp_path)]):
        assert after_grokking.main() == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[:3] for line in lines[2:]] == [[f"| {label}", "5", "5"] for label in ROWS.values()]
    assert (tmp_path / "accuracy.svg").read_text(encoding="utf-8").count("<svg") == 1


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_the_committed_winner_without_a_limit(row: str, tmp_path: Path) -> None:
    found, expected = config_of(row, tmp_path), winner("grok_tuned", row)
    (milestones,) = found["trainer"].pop("callbacks")
    assert milestones["init_args"] == {"stop_at": None}
    assert found["trainer"].pop("max_epochs") % found["trainer"].pop("check_val_every_n_epoch") == 0
    assert (found.pop("experiment"), found.pop("runs")) == (row, str(tmp_path))
    for key in ("max_epochs", "check_val_every_n_epoch", "callbacks"):
        del expected["trainer"][key]
    assert found == {key: value for key, value in expected.items() if key not in ("experiment", "runs")}
