"""Test the specification of the dashboard, made without a network or a key."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from analysis.dashboard import main
from analysis.rows import TITLES
from analysis.runs import AXES
from tests.helpers.commands import ROOT, clean_environment

SPECIFY = """
import sys
from analysis.dashboard import dashboard
print(dashboard("someone", "ars2", sys.argv[1:])._to_model().spec.model_dump_json(by_alias=True))
"""
TASKS = ("modular_addition", "cifar", "wikitext")


@pytest.fixture(scope="module")
def specification(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("home")
    command = [sys.executable, "-c", SPECIFY, *TASKS]
    made = subprocess.run(
        command, cwd=ROOT, env=clean_environment(home), capture_output=True, text=True, timeout=120, check=False
    )
    assert made.returncode == 0, made.stderr
    loaded: dict[str, Any] = json.loads(made.stdout.splitlines()[-1])
    return loaded


def sections(specification: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return each heading with the grid of panels that follows it."""
    found: dict[str, dict[str, Any]] = {}
    for block in specification["blocks"]:
        if block["type"] == "heading":
            heading = block["children"][0]["text"]
        elif block["type"] == "panel-grid":
            found[heading] = block["metadata"]
    return found


def test_every_task_has_one_section_with_its_runs(specification: dict[str, Any]) -> None:
    found = sections(specification)
    assert list(found) == [TITLES[task] for task in TASKS]
    for task, grid in zip(TASKS, found.values(), strict=True):
        (runs,) = grid["runSets"]
        (condition,) = runs["filters"]["filters"]
        assert (condition["key"], condition["op"], condition["value"]) == (
            {"section": "config", "name": "task"},
            "=",
            task,
        )
        # The keys under which the runs' config has them.
        assert [key["name"] for key in runs["grouping"]] == ["row.value", "group.value"]


def test_every_section_draws_its_metric_over_every_cost(specification: dict[str, Any]) -> None:
    metrics = dict(zip(TASKS, ("val/accuracy", "val/accuracy", "val/perplexity"), strict=True))
    for task, grid in zip(TASKS, sections(specification).values(), strict=True):
        panels = grid["panelBankSectionConfig"]["panels"]
        lines = [panel["config"] for panel in panels if panel["viewType"] == "Run History Line Plot"]
        over = {line["xAxis"] for line in lines if line["metrics"] == [metrics[task]]}
        costs = ("flops", "gradient_evaluations", "optimizer_steps", "training_seconds")
        assert over == {"epoch", *(f"cost/{cost}" for cost in costs)}
        assert all(line["groupBy"] == "group.value" for line in lines)
        # The titles are those of a report, and its first axis comes first.
        titles = [line["chartTitle"] for line in lines]
        assert titles[: len(AXES)] == [f"{metrics[task]} over {name}" for name in AXES.values()]
        assert "train/loss over gradient evaluations" in titles
        drawn = {name for line in lines for name in line["metrics"]}
        assert {"train/loss", "val/loss", "flatness/phi", "flatness/trigger_rate", "flatness/hessian_top"} <= drawn
        (best,) = [panel["config"] for panel in panels if panel["viewType"] == "Bar Chart"]
        (media,) = [panel["config"] for panel in panels if panel["viewType"] == "Media Browser"]
        assert {"pictures/curves", "pictures/second_passes", "loss_surface", "test/confusion_matrix"} == set(
            media["mediaKeys"]
        )
        assert best["metrics"] == [f"{metrics[task]}.{'min' if task == 'wikitext' else 'max'}"]


def test_a_missing_key_is_reported_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dashboard", "me/proj"])
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    assert main() == 1
    reason = "there is no key of Weights & Biases: run wandb login, or set WANDB_API_KEY"
    assert capsys.readouterr().err == f"error: the dashboard could not be saved in me/proj: {reason}\n"


def test_an_invalid_destination_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["dashboard", "ars2"])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2
    assert "ENTITY/PROJECT" in capsys.readouterr().err
