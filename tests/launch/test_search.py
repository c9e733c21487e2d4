"""The command as a person uses it, on networks that train in a moment."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from launch.search import Search, StatedOptions, suggest
from launch.sweep_specification import Dimension, read
from tests.helpers.commands import NETWORK, ROOT, clean_environment, fit

COMMON = {
    "model": {"init_args": NETWORK},
    "data": {"init_args": {"p": 7, "batch_size": 8}},
    "trainer": {"max_epochs": 2},
}
LR = {"low": 1e-3, "high": 3e-2, "log": True}
SWEEP = {
    "name": "small",
    "trials": 4,
    "trial_seed": 7,
    "final_seeds": [0, 1],
    "seeded": ["seed_everything", "data.seed"],
    "objective": {"metric": "val/accuracy", "direction": "maximize"},
    "common": COMMON,
    "optimizers": {
        "adamw": {"configs": ["configs/grok_adamw.yaml"], "space": {"model.optimizer.lr": LR}},
        "sync": {
            "configs": ["configs/grok_sync.yaml"],
            "options": {"model": {"init_args": {"policy": "hidden"}}},
            "space": {"model.optimizer.lr": LR, "model.vector.lr": LR},
        },
    },
}


def sweep_file(folder: Path, sweep: dict[str, Any]) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep, sort_keys=False))
    return path


def command(folder: Path, sweep: dict[str, Any], *arguments: str) -> list[str]:
    return [sys.executable, "sweep.py", str(sweep_file(folder, sweep)), "--folder", str(folder / "runs"), *arguments]


def run(folder: Path, sweep: dict[str, Any], *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = clean_environment(folder)
    return subprocess.run(
        command(folder, sweep, *arguments), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def trials(folder: Path) -> dict[str, list[optuna.trial.FrozenTrial]]:
    """The trials that ended, by study, in the order of their points."""
    storage = JournalStorage(JournalFileBackend(str(folder / "runs/trials.journal")))
    ended = (TrialState.COMPLETE, TrialState.PRUNED)
    found = {}
    for name in optuna.get_all_study_names(storage):
        study = optuna.load_study(study_name=name, storage=storage)
        found[name] = sorted(study.get_trials(states=ended), key=lambda one: one.user_attrs["index"])
    return found


def saved(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((Path(trial.user_attrs["folder"]) / "config.yaml").read_text())
    return config


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, "subprocess.CompletedProcess[str]"]:
    folder = tmp_path_factory.mktemp("sweep")
    return folder, run(folder, SWEEP)


def test_every_optimizer_gets_its_trials_and_the_winner_fresh_seeds(done: tuple[Path, Any]) -> None:
    folder, process = done
    assert process.returncode == 0, process.stderr
    found = trials(folder)
    assert {name: len(of_study) for name, of_study in found.items()} == {
        **{"adamw": 4, "sync": 4},
        **{"adamw-final": 2, "sync-final": 2},
    }
    points = read(folder / "sweep.yaml").points("sync")
    for trial, point in zip(found["sync"], points, strict=True):
        config = saved(trial)
        assert config["sweep"] == {"name": "small", "optimizer": "sync", "trial": trial.user_attrs["index"]}
        assert config["seed_everything"] == config["data"]["init_args"]["seed"] == 7
        model = config["model"]["init_args"]
        assert model["policy"] == "hidden" and model["p"] == 7
        assert model["optimizer"]["init_args"]["lr"] == point["model.optimizer.lr"]
        assert model["vector"]["lr"] == point["model.vector.lr"]
    best = max(found["sync"], key=lambda trial: trial.value or 0.0)
    for seed, trial in enumerate(found["sync-final"]):
        config = saved(trial)
        assert config["sweep"] == {"name": "small", "optimizer": "sync", "trial": None}
        assert config["seed_everything"] == config["data"]["init_args"]["seed"] == seed
        assert config["model"] == saved(best)["model"]
    assert "sweep folder:" in process.stdout and "best val/accuracy" in process.stdout


def test_optunas_own_tools_see_every_trials_options(done: tuple[Path, Any]) -> None:
    folder, _ = done
    found = trials(folder)
    points = read(folder / "sweep.yaml").points("sync")
    assert [trial.params for trial in found["sync"]] == points
    best = max(found["sync"], key=lambda trial: trial.value or 0.0)
    assert [trial.params for trial in found["sync-final"]] == [best.params] * 2
    storage = JournalStorage(JournalFileBackend(str(folder / "runs/trials.journal")))
    study = optuna.load_study(study_name="sync", storage=storage)
    assert set(study.trials[0].distributions) == {"model.optimizer.lr", "model.vector.lr"}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    assert set(optuna.importance.get_param_importances(study, evaluator=evaluator)) == set(points[0])


def test_a_trial_that_was_enqueued_before_parameters_were_kept_runs_with_its_options(tmp_path: Path) -> None:
    sweep = read(sweep_file(tmp_path, {**SWEEP, "final_seeds": []}))
    folder = tmp_path / "runs"
    folder.mkdir()
    storage = JournalStorage(JournalFileBackend(str(folder / "trials.journal")))
    old = optuna.create_study(storage=storage, study_name="adamw", direction="maximize")
    points = sweep.points("adamw")
    for index, point in enumerate(points):
        options = {key: json.dumps(value) for key, value in point.items()}
        old.enqueue_trial({}, user_attrs={"index": index, "options": options})
    ended = old.ask()
    ended.set_user_attr("folder", str(tmp_path))
    old.tell(ended.number, 0.5)
    study = Search(sweep, folder, None, print).studies["adamw"]
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, *[TrialState.WAITING] * 3]
    for point in points[1:]:
        asked = study.ask()
        suggest(asked, sweep.optimizers["adamw"].space)
        assert asked.params == point


def test_every_kind_of_option_is_a_parameter_of_the_trial() -> None:
    space = {
        "betas": Dimension(choices=((0.9, 0.95), (0.9, 0.98))),
        "mode": Dimension(choices=("sync", "aga")),
        "k": Dimension(choices=(1, 10)),
        "lr": Dimension(low=1.23456e-3, high=9.87654e-1, log=True),
        "rho": Dimension(low=0.0, high=0.123456),
    }
    study = optuna.create_study(sampler=StatedOptions())
    for unit in (0.0, 0.5, 0.999999):
        point = {name: dimension.at(unit) for name, dimension in space.items()}
        study.enqueue_trial({}, user_attrs={"options": {name: json.dumps(value) for name, value in point.items()}})
        asked = study.ask()
        suggest(asked, space)
        assert {name: point[name] for name in ("mode", "lr", "rho")}.items() <= asked.params.items()
        assert (json.loads(asked.params["betas"]), asked.params["k"]) == (list(point["betas"]), str(point["k"]))


def test_a_winner_is_a_config_to_lay_over_the_others(done: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = done
    configs = ["configs/grok_sync.yaml", folder / "runs/sync.yaml", folder / "runs/sync-winner.yaml"]
    again = fit(tmp_path, *(part for config in configs for part in ("--config", config)), "--wandb", "false")
    found = trials(folder)
    best = max(found["sync"], key=lambda trial: trial.value or 0.0)
    assert yaml.safe_load((again / "config.yaml").read_text())["model"] == saved(best)["model"]


def test_a_sweep_that_is_done_runs_nothing_more(done: tuple[Path, Any]) -> None:
    folder, _ = done
    before = sorted((folder / "runs").glob("*/*/summary.json"))
    assert run(folder, SWEEP).returncode == 0
    assert sorted((folder / "runs").glob("*/*/summary.json")) == before


def test_another_search_space_in_the_same_folder_is_refused(done: tuple[Path, Any]) -> None:
    folder, _ = done
    process = run(folder, {**SWEEP, "sequence_seed": 5})
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert "holds a sweep with other points for adamw: name another folder" in line


def test_a_killed_sweep_goes_on_and_leaves_no_process_behind(tmp_path: Path) -> None:
    sweep = {**SWEEP, "common": {**COMMON, "trainer": {"max_epochs": 30}}, "final_seeds": []}
    with subprocess.Popen(
        command(tmp_path, sweep), cwd=ROOT, env=clean_environment(tmp_path), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()  # the first trial has ended
        process.send_signal(signal.SIGKILL)
    finished = {name: len(of_study) for name, of_study in trials(tmp_path).items()}
    assert 1 <= sum(finished.values()) < 8
    time.sleep(1)  # to see that it is gone takes a run a moment, on a machine under load
    logs = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/*/metrics.csv")}
    time.sleep(2)
    assert logs == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/*/metrics.csv")}
    assert run(tmp_path, sweep).returncode == 0
    for of_study in trials(tmp_path).values():
        assert [trial.user_attrs["index"] for trial in of_study] == [0, 1, 2, 3]


def test_a_trial_gives_up_at_a_multiple_of_what_the_best_so_far_needed(tmp_path: Path) -> None:
    """With two epochs of one step, a milestone reached in the first one makes the second superfluous."""
    sweep = {
        **{**SWEEP, "final_seeds": [], "give_up_at": 1.0},
        "objective": {"milestone": "val_10", "cost": "gradient_evaluations"},
        "common": {**COMMON, "data": {"init_args": {"p": 7, "batch_size": 64}}, "trainer": {"max_epochs": 40}},
        "optimizers": {"adamw": SWEEP["optimizers"]["adamw"]},  # type: ignore[index]
    }
    process = run(tmp_path, sweep, "--workers", "1")
    assert process.returncode == 0, process.stderr
    best = None
    for trial in sorted(trials(tmp_path)["adamw"], key=lambda one: one.number):
        callbacks = saved(trial)["trainer"]["callbacks"]
        budgets = [one["init_args"] for one in callbacks if one["class_path"].endswith("EvaluationBudget")]
        assert budgets == ([] if best is None else [{"gradient_evaluations": best, "finish_epoch": True}])
        spent = json.loads((Path(trial.user_attrs["folder"]) / "summary.json").read_text())["costs"]
        assert best is None or spent["gradient_evaluations"] <= best
        if trial.value is not None:
            best = min(int(trial.value), best or int(trial.value))
    assert best is not None and best < 40


def test_a_trial_that_diverges_counts_as_a_miss(tmp_path: Path) -> None:
    huge = {"low": 1e30, "high": 1e38, "log": True}
    adamw = {"configs": ["configs/grok_adamw.yaml"], "space": {"model.optimizer.lr": huge}}
    process = run(tmp_path, {**SWEEP, "trials": 2, "optimizers": {"adamw": adamw}})
    assert process.returncode == 0, process.stderr
    assert [trial.state for trial in trials(tmp_path)["adamw"]] == [TrialState.PRUNED] * 2
    assert "adamw 0: ended, see" in process.stdout


def test_options_that_no_run_can_have_end_the_sweep_with_their_error(tmp_path: Path) -> None:
    adamw = {"configs": ["configs/grok_adamw.yaml"], "space": {"model.optimizer.learning": LR}}
    process = run(tmp_path, {**SWEEP, "optimizers": {"adamw": adamw}})
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: adamw") and "could not start" in line and "learning" in line


def test_wandb_sweep_files_search_the_same_space(tmp_path: Path) -> None:
    process = run(tmp_path, SWEEP, "--wandb-files", str(tmp_path / "wandb"))
    assert process.returncode == 0, process.stderr
    content = yaml.safe_load((tmp_path / "wandb/sync.yaml").read_text())
    assert content["run_cap"] == 4 and content["metric"] == {"name": "val/accuracy", "goal": "maximize"}
    assert content["parameters"]["model.vector.lr"] == {"distribution": "log_uniform_values", "min": 1e-3, "max": 3e-2}
    # The command that an agent would run, with one draw of the parameters, trains.
    configs = [part for part in content["command"] if part.endswith(".yaml")]
    draw = [f"--{name}={json.dumps(values['min'])}" for name, values in content["parameters"].items()]
    fit(tmp_path / "once", *(part for config in configs for part in ("--config", config)), *draw, "--wandb", "false")


def test_workers_share_the_machine_as_asked(tmp_path: Path) -> None:
    process = run(tmp_path, SWEEP, "--workers", "0")
    assert process.returncode == 2 and "must be at least 1" in process.stderr
    assert os.listdir(tmp_path) == ["sweep.yaml"]


def test_an_optimizer_that_never_reached_the_milestone_runs_its_best_trial_by_the_fallback_metric(
    tmp_path: Path,
) -> None:
    callbacks = [{"class_path": "callbacks.milestones.GrokkingMilestones"}]
    common = {**COMMON, "trainer": {"max_epochs": 2, "callbacks": callbacks}}
    sweep = {**SWEEP, "common": common, "final_seeds": [0], "objective": {"milestone": "full"}}
    adamw = {"optimizers": {"adamw": SWEEP["optimizers"]["adamw"]}}
    assert run(tmp_path, {**sweep, **adamw}).returncode == 0
    assert trials(tmp_path).keys() == {"adamw"}
    # Said afterwards, it counts for the trials that there are.
    process = run(tmp_path, {**sweep, **adamw, "objective": {"milestone": "full", "otherwise": "val/loss"}})
    assert process.returncode == 0, process.stderr
    found = trials(tmp_path)
    losses = [json.loads((Path(t.user_attrs["folder"]) / "summary.json").read_text()) for t in found["adamw"]]
    merits = [summary["metrics"]["val/loss"]["best"] for summary in losses]
    assert len(merits) == 4 and all(trial.state == TrialState.PRUNED for trial in found["adamw"])
    winner = found["adamw"][merits.index(min(merits))]
    (final,) = found["adamw-final"]
    assert saved(final)["model"] == saved(winner)["model"]
