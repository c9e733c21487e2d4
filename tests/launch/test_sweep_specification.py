import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.config_guard import check_overlays
from launch.search import merged
from launch.sweep_specification import Dimension, Objective, read
from tests.helpers.commands import ROOT

SMALL: dict[str, Any] = {
    "name": "small",
    "trials": 8,
    "final_seeds": [0, 1],
    "objective": {"metric": "val/accuracy", "direction": "maximize"},
    "optimizers": {
        "adamw": {
            "configs": ["configs/grok_adamw.yaml"],
            "space": {
                "model.optimizer.lr": {"low": 1e-4, "high": 1e-1, "log": True},
                "model.optimizer.betas": {"choices": [[0.9, 0.95], [0.9, 0.98]]},
            },
        },
        "sync": {
            "configs": ["configs/grok_sync.yaml"],
            "space": {
                "model.optimizer.lr": {"low": 1e-4, "high": 1e-1, "log": True},
                "model.optimizer.weight_decay": {"low": 0.0, "high": 2.0},
                "model.optimizer.rho": {"low": 0.01, "high": 1.0, "log": True},
            },
        },
    },
}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return path


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_every_optimizer_reads_the_same_sequence(tmp_path: Path) -> None:
    sweep = read(write(tmp_path))
    adamw, sync = sweep.points("adamw"), sweep.points("sync")
    assert len(adamw) == len(sync) == 8
    # The same range for the first option of both, so the same values.
    assert [point["model.optimizer.lr"] for point in adamw] == [point["model.optimizer.lr"] for point in sync]
    assert sweep.points("adamw") == adamw
    assert read(write(tmp_path, sequence_seed=1)).points("adamw") != adamw


def test_own_sequences_give_every_optimizer_other_points_whatever_rows_there_are(tmp_path: Path) -> None:
    sweep = read(write(tmp_path, own_sequences=True))
    adamw, sync = sweep.points("adamw"), sweep.points("sync")
    assert not {point["model.optimizer.lr"] for point in adamw} & {point["model.optimizer.lr"] for point in sync}
    alone = read(write(tmp_path, own_sequences=True, optimizers={"adamw": SMALL["optimizers"]["adamw"]}))
    assert alone.points("adamw") == adamw
    assert read(write(tmp_path, own_sequences=True, sequence_seed=1)).points("adamw") != adamw


def test_a_power_of_two_of_points_is_balanced_in_every_option(tmp_path: Path) -> None:
    points = read(write(tmp_path)).points("sync")
    for option, middle in (("lr", 10**-2.5), ("weight_decay", 1.0), ("rho", 0.1)):
        values = [point[f"model.optimizer.{option}"] for point in points]
        assert sum(value < middle for value in values) == 4, option
    betas = [point["model.optimizer.betas"] for point in read(write(tmp_path)).points("adamw")]
    assert betas.count([0.9, 0.95]) == betas.count([0.9, 0.98]) == 4


def test_a_dimension_maps_the_unit_interval_onto_its_range() -> None:
    logarithmic = Dimension(low=1e-4, high=1e-2, log=True)
    assert [logarithmic.at(unit) for unit in (0.0, 0.5, 1.0)] == [1e-4, 1e-3, 1e-2]
    assert Dimension(low=1.0, high=3.0).at(0.25) == 1.5
    assert [Dimension(choices=("a", "b")).at(unit) for unit in (0.0, 0.49, 0.5, 0.99)] == ["a", "a", "b", "b"]


def test_the_cost_of_a_milestone_is_the_objective_and_a_miss_is_none() -> None:
    objective = Objective(milestone="full", cost="optimizer_steps")
    reached = {"epoch": 3, "optimizer_steps": 24, "gradient_evaluations": 48}
    missed = dict.fromkeys(reached)
    assert objective.value({"milestones": {"full": reached}}) == 24.0
    assert objective.value({"milestones": {"full": missed}}) is None
    with pytest.raises(KeyError, match="no milestone full: it has grok"):
        objective.value({"milestones": {"grok": reached}})


def test_runs_that_missed_the_milestone_are_judged_by_the_fallback_metric() -> None:
    summary = {
        "milestones": {"full": {"epoch": None}},
        "metrics": {"val/accuracy": {"best": 0.4}, "val/loss": {"best": 2.0}},
    }
    assert Objective(milestone="full", fallback_metric="val/accuracy").fallback_value(summary) == 0.4
    assert Objective(milestone="full", fallback_metric="val/loss").fallback_value(summary) == -2.0
    summary["metrics"]["val/mae"] = {"best": 3.0, "lower_is_better": True}
    assert Objective(milestone="full", fallback_metric="val/mae").fallback_value(summary) == -3.0
    del summary["metrics"]["val/mae"]
    assert Objective(milestone="full").fallback_value(summary) is None
    assert Objective(milestone="full", fallback_metric="val/loss").fallback_value({}) is None
    with pytest.raises(KeyError, match="no metric val/perplexity: it has val/accuracy, val/loss"):
        Objective(milestone="full", fallback_metric="val/perplexity").fallback_value(summary)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_sweep_can_be_read_and_its_layers_fit_together(path: Path, tmp_path: Path) -> None:
    sweep = read(path)
    layer, final = tmp_path / "row.yaml", tmp_path / "final.yaml"
    final.write_text(yaml.safe_dump(sweep.final))
    for name, spec in sweep.optimizers.items():
        assert len(sweep.points(name)) == sweep.trials
        layer.write_text(yaml.safe_dump(merged(spec.options, sweep.common)))
        check_overlays(
            ["fit", *(part for config in (*spec.configs, layer, final) for part in ("--config", str(config)))]
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": None}, "name must be a string, got null"),
        ({"name": ""}, "must be valid for a folder"),
        ({"name": "../x"}, "must be valid for a folder"),
        ({"name": 3}, "name must be a string, got 3"),
        ({"trials": "8"}, "trials must be an integer, got '8'"),
        ({"trials": True}, "trials must be an integer, got True"),
        ({"final_seeds": 2}, "final_seeds must be a list, each an integer, got 2"),
        ({"final_seeds": [0, "1"]}, "final_seeds must be a list, each an integer, got [0, '1']"),
        ({"seeded": "data.seed"}, "seeded must be a list, each a string, got 'data.seed'"),
        ({"common": None}, "common must be a mapping, got null"),
        ({"early_stop_factor": "often"}, "early_stop_factor must be a finite number, got 'often'"),
        ({"objective": None}, "objective must be a mapping with the keys milestone"),
        ({"objective": {"metric": ["val/loss"]}}, "objective: metric must be a string, got ['val/loss']"),
        (
            {"optimizers": {"a": {"configs": "x.yaml", "space": {"x": {"low": 0, "high": 1}}}}},
            "a: configs must be a li",
        ),
        ({"optimizers": {1: {"configs": [], "space": {"x": {"low": 0, "high": 1}}}}}, "optimizers must be a mapping"),
        (
            {"optimizers": {"a": {"configs": [], "space": {"x": {"low": "a", "high": 1}}}}},
            "low must be a finite number",
        ),
        (
            {"optimizers": {"a": {"configs": [], "space": {"x": {"low": 0, "high": float("inf")}}}}},
            "high must be a fin",
        ),
        ({"optimizers": {"a": {"configs": [], "space": {"x": {"choices": "ab"}}}}}, "choices must be a list, got 'ab'"),
        (
            {"optimizers": {"a": {"space": {"x": {"low": 0, "high": 1}}}}},
            "missing 1 required positional argument: 'con",
        ),
        ({"trials": 0}, "trials must be an integer of at least 1, got 0"),
        ({"trails": 3}, "unknown key 'trails'; valid keys are name, trials"),
        ({"trial_seed": 1}, "final_seeds must be fresh, but 1 is a seed of the trials"),
        ({"rejudged": 2}, "give rejudged, at least 1, together with rejudge_seeds"),
        ({"rejudge_seeds": [7]}, "give rejudged, at least 1, together with rejudge_seeds"),
        ({"rejudged": 2, "rejudge_seeds": [1]}, "final_seeds must be fresh, but 1 is a seed of the trials"),
        ({"rejudged": 2, "rejudge_seeds": [1000]}, "must differ from the seed of the trials, 1000"),
        ({"optimizers": {}}, "needs 'optimizers'"),
        ({"objective": {}}, "objective needs either a milestone or a metric"),
        ({"objective": {"metric": "val/loss", "statistic": "mean"}}, "statistic must be one of best, last, got 'mean'"),
        ({"objective": {"metric": "val/loss", "fallback_metric": "val/loss"}}, "fallback_metric needs a milestone"),
        ({"optimizers": {"a": {"configs": [], "space": {}}}}, "optimizers.a needs 'space'"),
        ({"optimizers": {"a": {"configs": ["no.yaml"], "space": {"x": {"low": 0, "high": 1}}}}}, "no config no.yaml"),
        ({"optimizers": {"a": {"configs": [], "space": {"x": {"low": 2, "high": 1}}}}}, "space.x: needs low < high"),
        ({"optimizers": {"a": {"configs": [], "space": {"x": {"low": 0, "high": 1, "log": True}}}}}, "low > 0 if log"),
        ({"optimizers": {"a": {"configs": [], "space": {"x": {"choices": [1], "low": 1}}}}}, "either low and high, or"),
    ],
)
def test_a_wrong_sweep_is_refused_in_one_sentence(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sweep") as caught:
        read(write(tmp_path, **changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


VALUES: list[Any] = [None, "", "text", 2, -1, 1.5, float("nan"), True, [], [1], [None], {}, {"a": 1}, {1: 2}, [[]]]


def places(content: Any) -> Iterator[list[Any]]:
    """Return the path of every value in nested mappings and lists."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield [key]
        if isinstance(value, (dict, list)):
            yield from ([key, *path] for path in places(value))


def test_any_sweep_is_read_or_refused_in_one_sentence(tmp_path: Path) -> None:
    full = {**SMALL, "sequence_seed": 0, "trial_seed": 9, "seeded": ["seed_everything"], "common": {}, "final": {}}
    for path in places(full):
        for value in VALUES:
            content = copy.deepcopy(full)
            inner: Any = content
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            try:
                sweep = read(write(tmp_path, **content))
            except ValueError as error:
                assert "\n" not in str(error) and str(tmp_path) in str(error)
            else:
                assert all(sweep.points(name) for name in sweep.optimizers)


def test_a_number_without_a_point_is_a_number(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text().replace("0.0001", "1e-4"))
    assert read(path).optimizers["adamw"].space["model.optimizer.lr"].low == 1e-4
