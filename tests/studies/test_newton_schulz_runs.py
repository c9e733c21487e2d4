"""The protocol states valid rows, and a row is judged by its limit towards the worse."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from studies.newton_schulz_runs import FOLDER, Protocol, Task, config_of, ended, report
from studies.newton_schulz_steps import winner

ROOT = Path(__file__).parents[2]
TASK = Task("s", {"base": "b"}, [1, 2, 3], "full", missed=100, lower=True, ratio=True, margin=1.2)


def reached(evaluations: float | None) -> Mapping[str, Any]:
    return {"milestones": {"full": {"gradient_evaluations": evaluations}}}


def test_a_run_that_missed_the_milestone_or_diverged_has_the_value_of_one_that_missed() -> None:
    accuracy = replace(TASK, metric="val/accuracy", missed=0.1)
    assert [TASK.value(one) for one in (reached(40), reached(None), {})] == [40, 100, 100]
    assert [accuracy.value(one) for one in ({"metrics": {"val/accuracy": {"best": 0.5, "last": 0.4}}}, {})] == [
        0.5,
        0.1,
    ]


def test_ratios_are_geometric_and_paired_by_seed() -> None:
    found = TASK.compared({1: 20, 2: 8, 3: 7}, {1: 10, 2: 16, 9: 5})
    assert found.n == 2 and found.mean == pytest.approx(1.0)
    # The t quantile of a one-sided 95 % limit with one degree of freedom is 6.314, the standard error log 2.
    assert found.high == pytest.approx(2**6.3138, rel=1e-3) and found.low == pytest.approx(2**-6.3138, rel=1e-3)


@pytest.mark.parametrize(
    ("values", "margin", "lower", "verdict"),
    [
        ([1.0, 1.1, 0.9], 0.3, True, True),  # the upper limit is 0.17
        ([1.0, 1.1, 0.9], 0.1, True, False),
        ([1.0, 1.1, 0.9], -0.3, False, True),
        ([1.0, 1.1, 0.9], -0.1, False, False),
        ([2.0, 2.1, 1.9], 0.3, True, False),
        ([2.0, 2.1, 1.9], -0.1, False, True),
    ],
)
def test_a_row_is_not_inferior_if_the_limit_towards_the_worse_is_within_the_margin(
    values: list[float], margin: float, lower: bool, verdict: bool
) -> None:
    task = replace(TASK, ratio=False, margin=margin, lower=lower)
    found = task.compared(dict(enumerate(values)), dict.fromkeys(range(3), 1.0))
    assert task.not_inferior(found) is verdict


def test_one_seed_decides_nothing() -> None:
    assert not TASK.not_inferior(TASK.compared({1: 1.0}, {1: 1.0}))


def test_an_interrupted_run_is_deleted_and_an_ended_one_kept(tmp_path: Path) -> None:
    whole, part = tmp_path / "t-seed1", tmp_path / "t-seed2"
    for folder in (whole, part):
        folder.mkdir()
        (folder / "config.yaml").touch()
    (whole / "summary.json").touch()
    assert [ended(tmp_path, seed) for seed in (1, 2, 3)] == [True, False, False]
    assert whole.is_dir() and not part.exists()


def test_a_row_is_its_winner_with_other_newton_schulz_options(tmp_path: Path) -> None:
    protocol = Protocol.read()
    assert protocol.reference == "jordan_5"
    for name, task in protocol.tasks.items():
        for mode, row in task.winners.items():
            expected, found = winner(task.study, row), config_of(protocol, name, mode, "made_2", tmp_path)
            options = found["model"]["init_args"]["optimizer"]["init_args"]
            assert options["ns_steps"] == 2 and options["mode"] == mode
            options.update(ns_steps=5, ns_coefficients="jordan")
            assert found == {**expected, "experiment": f"{mode}_made_2", "runs": str(tmp_path / name)}


def test_the_tables_shown_are_those_of_the_committed_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / FOLDER / "README.md").read_text(encoding="utf-8")
    assert report(Protocol.read(), FOLDER).strip() in text
