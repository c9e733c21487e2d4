"""Run the search command as a person does, on networks that train at once."""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any
from unittest.mock import patch

import optuna
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

import sweep as sweep_command
from launch import sweep_progress
from launch.search import Search, StatedOptions, suggest
from launch.sweep_specification import Dimension, read
from launch.trial import Outcome
from tests.helpers.commands import NETWORK, Result, captured, clean_environment, fit
from tests.helpers.processes import Running, server, wait_until

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
    return ["sweep.py", str(sweep_file(folder, sweep)), "--folder", str(folder / "runs"), *arguments]


def run(folder: Path, sweep: dict[str, Any], *arguments: str) -> Result:
    """Run the command in this process.

    Its trials are forked from the server of the tests.
    """
    server()
    with patch("sys.argv", command(folder, sweep, *arguments)):
        return captured(sweep_command.main)


class FakeRunner:
    """End each trial at once with the summary that follows from its options.

    Args:
        summarize: returns the summary of a run by its options; ``None`` for one that diverged.
    """

    def __init__(self, summarize: Callable[[dict[str, str]], dict[str, Any] | None]) -> None:
        self.summarize = summarize
        self.commands: list[dict[str, str]] = []
        self._lock = threading.Lock()

    def __call__(self, context: Any, arguments: Sequence[str], log: Path) -> Outcome:
        pairs = list(zip(arguments[1::2], arguments[2::2], strict=True))
        options = {name.removeprefix("--"): value for name, value in pairs}
        folder = Path(options["runs"]) / options["experiment"] / log.stem
        with self._lock:
            self.commands.append(options)
        folder.mkdir(parents=True)
        model = {name: value for name, value in options.items() if name.startswith("model.")}
        (folder / "config.yaml").write_text(yaml.safe_dump({"model": model}))
        summary = self.summarize(options)
        if summary is not None:
            (folder / "summary.json").write_text(json.dumps(summary))
        return Outcome(0 if summary is not None else 1, str(folder), summary or {})


def run_fake(folder: Path, sweep: dict[str, Any], runner: Any) -> dict[str, list[optuna.trial.FrozenTrial]]:
    """Run a sweep of fake runs, one after the other; return its trials."""
    sweep_progress.run(read(sweep_file(folder, sweep)), folder / "runs", 1, runner)
    return trials(folder)


def lr(options: dict[str, str]) -> float:
    return float(options["model.optimizer.lr"])


def accuracy(options: dict[str, str]) -> dict[str, Any]:
    """Return the summary of a run that improves with the learning rate."""
    return {"metrics": {"val/accuracy": {"best": lr(options), "last": lr(options)}}}


def trials(folder: Path) -> dict[str, list[optuna.trial.FrozenTrial]]:
    """Return the trials that ended, by study, in the order of their points."""
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


REAL = {**SWEEP, "trials": 2, "final_seeds": [0]}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("sweep")
    return folder, run(folder, REAL)


def test_every_optimizer_gets_its_trials_and_the_winner_fresh_seeds(done: tuple[Path, Result]) -> None:
    folder, result = done
    assert result.code == 0, result.err
    found = trials(folder)
    assert {name: len(of_study) for name, of_study in found.items()} == {
        **{"adamw": 2, "sync": 2},
        **{"adamw-final": 1, "sync-final": 1},
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
    assert "sweep folder:" in result.out and "best val/accuracy" in result.out
    assert "winners" in result.out and "best trials" not in result.out, "no bar of a part that the sweep lacks"


def test_the_tools_of_optuna_see_every_trials_options(tmp_path: Path) -> None:
    folder, found = tmp_path, run_fake(tmp_path, SWEEP, FakeRunner(accuracy))
    points = read(folder / "sweep.yaml").points("sync")
    assert [trial.params for trial in found["sync"]] == points
    best = max(found["sync"], key=lambda trial: trial.value or 0.0)
    assert [trial.params for trial in found["sync-final"]] == [best.params] * 2
    storage = JournalStorage(JournalFileBackend(str(folder / "runs/trials.journal")))
    study = optuna.load_study(study_name="sync", storage=storage)
    assert set(study.trials[0].distributions) == {"model.optimizer.lr", "model.vector.lr"}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    assert set(optuna.importance.get_param_importances(study, evaluator=evaluator)) == set(points[0])


def test_a_trial_enqueued_by_an_older_version_runs_with_its_options(tmp_path: Path) -> None:
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


def test_a_winner_is_a_config_to_lay_over_the_others(done: tuple[Path, Result], tmp_path: Path) -> None:
    folder, _ = done
    configs = ["configs/grok_sync.yaml", folder / "runs/sync.yaml", folder / "runs/sync-winner.yaml"]
    again = fit(tmp_path, *(part for config in configs for part in ("--config", config)), "--wandb", "false")
    found = trials(folder)
    best = max(found["sync"], key=lambda trial: trial.value or 0.0)
    assert yaml.safe_load((again / "config.yaml").read_text())["model"] == saved(best)["model"]


def test_a_sweep_that_is_done_runs_nothing_more(done: tuple[Path, Result]) -> None:
    folder, _ = done
    before = sorted((folder / "runs").glob("*/*/summary.json"))
    assert run(folder, REAL).code == 0
    assert sorted((folder / "runs").glob("*/*/summary.json")) == before


def test_another_search_space_in_the_same_folder_is_refused(done: tuple[Path, Result]) -> None:
    folder, _ = done
    result = run(folder, {**REAL, "sequence_seed": 5})
    assert result.code == 1
    assert "contains a sweep with other points for adamw: name another folder" in result.error


def test_a_sweep_whose_runs_are_packed_explains_how_to_unpack_them(tmp_path: Path) -> None:
    (tmp_path / "runs.zip").touch()
    with pytest.raises(ValueError, match=r"are packed: unpack them with python -m zipfile -e .*runs.zip"):
        Search(read(sweep_file(tmp_path, SWEEP)), tmp_path, None, print)
    assert not (tmp_path / "trials.journal").exists()


def test_a_second_sweep_in_the_same_folder_is_refused_while_the_first_one_runs(tmp_path: Path) -> None:
    first = "import sys, pathlib, experiment.folders as f; print(f.lock(pathlib.Path(sys.argv[1])), flush=1); input()"
    with Popen([sys.executable, "-c", first, tmp_path], stdin=PIPE, stdout=PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "True\n"
        with pytest.raises(ValueError, match=f"a sweep is running in {tmp_path}: wait for its end"):
            Search(read(sweep_file(tmp_path, SWEEP)), tmp_path, None, print)
        assert not (tmp_path / "trials.journal").exists()
        other.communicate("")
    Search(read(sweep_file(tmp_path, SWEEP)), tmp_path, None, print)


@pytest.mark.slow
def test_a_killed_sweep_resumes_and_leaves_no_process_behind(tmp_path: Path) -> None:
    sweep = {**SWEEP, "common": {**COMMON, "trainer": {"max_epochs": 30}}, "final_seeds": []}
    with Running(command(tmp_path, sweep), clean_environment(tmp_path)) as running:
        wait_until(lambda: list((tmp_path / "runs").glob("*/*/summary.json")), running)
        running.kill()
    finished = {name: len(of_study) for name, of_study in trials(tmp_path).items()}
    assert sum(finished.values()) < 8
    time.sleep(1)  # to see that it is gone takes a run a moment, on a machine under load
    logs = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/*/metrics.csv")}
    time.sleep(2)
    assert logs == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/*/metrics.csv")}
    assert run(tmp_path, sweep).code == 0
    for of_study in trials(tmp_path).values():
        assert [trial.user_attrs["index"] for trial in of_study] == [0, 1, 2, 3]


def test_a_sweep_that_ended_within_a_run_repeats_only_that_run(tmp_path: Path) -> None:
    sweep = {**SWEEP, "final_seeds": []}

    class Ends(FakeRunner):
        def __call__(self, context: Any, arguments: Sequence[str], log: Path) -> Outcome:
            if len(self.commands) == 3:
                raise KeyboardInterrupt
            return super().__call__(context, arguments, log)

    with pytest.raises(KeyboardInterrupt):
        run_fake(tmp_path, sweep, Ends(accuracy))
    assert sum(map(len, trials(tmp_path).values())) == 3
    rest = FakeRunner(accuracy)
    found = run_fake(tmp_path, sweep, rest)
    assert len(rest.commands) == 5
    assert [[trial.user_attrs["index"] for trial in of_study] for of_study in found.values()] == [[0, 1, 2, 3]] * 2


ADAMW_ALONE = {**SWEEP, "optimizers": {"adamw": SWEEP["optimizers"]["adamw"]}}  # type: ignore[index]


def test_a_trial_stops_at_a_multiple_of_the_cost_of_the_best_so_far(tmp_path: Path) -> None:
    def milestone(options: dict[str, str]) -> dict[str, Any]:
        cost = round(100 * lr(options) ** -0.5)
        budget = int(options.get("trainer.callbacks.gradient_evaluations", cost))
        return {"milestones": {"val_10": {"gradient_evaluations": cost if cost <= budget else None}}}

    runner = FakeRunner(milestone)
    run_fake(tmp_path, {**ADAMW_ALONE, "give_up_at": 1.5, "objective": {"milestone": "val_10"}}, runner)
    best: int | None = None
    for options in runner.commands[:4]:
        budget = options.get("trainer.callbacks.gradient_evaluations")
        assert (None if budget is None else int(budget)) == (None if best is None else -(-3 * best // 2))
        assert ("callbacks.evaluation_budget.EvaluationBudget" in options.values()) == (budget is not None)
        cost = milestone(options)["milestones"]["val_10"]["gradient_evaluations"]
        best = best if cost is None else min(cost, best or cost)
    # Runs of the winner have no limit.
    assert [options.get("trainer.callbacks.gradient_evaluations") for options in runner.commands[4:]] == [None] * 2


@pytest.mark.slow
def test_a_run_that_stops_early_makes_no_more_steps(tmp_path: Path) -> None:
    """A milestone reached in the first epoch makes the second superfluous.

    There are two epochs of one step.
    """
    sweep = {
        **{**ADAMW_ALONE, "final_seeds": [], "give_up_at": 1.0},
        "objective": {"milestone": "val_10", "cost": "gradient_evaluations"},
        "common": {**COMMON, "data": {"init_args": {"p": 7, "batch_size": 64}}, "trainer": {"max_epochs": 40}},
    }
    result = run(tmp_path, sweep, "--workers", "1")
    assert result.code == 0, result.err
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


def test_a_trial_that_diverges_counts_as_a_miss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_fake(tmp_path, {**ADAMW_ALONE, "trials": 2}, FakeRunner(lambda _: None))
    assert [trial.state for trial in found["adamw"]] == [TrialState.PRUNED] * 2
    assert "adamw-final" not in found
    assert "adamw 0: ended, see" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_diverges_is_a_miss_of_its_sweep(tmp_path: Path) -> None:
    huge = {"low": 1e30, "high": 1e38, "log": True}
    adamw = {"configs": ["configs/grok_adamw.yaml"], "space": {"model.optimizer.lr": huge}}
    result = run(tmp_path, {**SWEEP, "trials": 2, "optimizers": {"adamw": adamw}})
    assert result.code == 0, result.err
    assert [trial.state for trial in trials(tmp_path)["adamw"]] == [TrialState.PRUNED] * 2


def test_options_that_no_run_can_have_end_the_sweep_with_their_error(tmp_path: Path) -> None:
    adamw = {"configs": ["configs/grok_adamw.yaml"], "space": {"model.optimizer.learning": LR}}
    line = run(tmp_path, {**SWEEP, "trials": 1, "optimizers": {"adamw": adamw}}).error
    assert line.startswith("error: adamw") and "could not start" in line and "learning" in line


def test_wandb_sweep_files_search_the_same_space(tmp_path: Path) -> None:
    result = run(tmp_path, SWEEP, "--wandb-files", str(tmp_path / "wandb"))
    assert result.code == 0, result.err
    content = yaml.safe_load((tmp_path / "wandb/sync.yaml").read_text())
    assert content["run_cap"] == 4 and content["metric"] == {"name": "val/accuracy", "goal": "maximize"}
    assert content["parameters"]["model.vector.lr"] == {"distribution": "log_uniform_values", "min": 1e-3, "max": 3e-2}
    # The command that an agent would run, with one draw of the parameters, trains.
    configs = [part for part in content["command"] if part.endswith(".yaml")]
    draw = [f"--{name}={json.dumps(values['min'])}" for name, values in content["parameters"].items()]
    fit(tmp_path / "once", *(part for config in configs for part in ("--config", config)), *draw, "--wandb", "false")


def test_workers_share_the_machine_as_asked(tmp_path: Path) -> None:
    result = run(tmp_path, SWEEP, "--workers", "0")
    assert result.code == 2 and "must be at least 1" in result.err
    assert os.listdir(tmp_path) == ["sweep.yaml"]


def test_an_optimizer_without_the_milestone_uses_the_fallback_metric(
    tmp_path: Path,
) -> None:
    def missed(options: dict[str, str]) -> dict[str, Any]:
        return {
            "milestones": {"full": {"gradient_evaluations": None}},
            "metrics": {"val/loss": {"best": abs(lr(options) - 0.01)}},
        }

    runner = FakeRunner(missed)
    sweep = {**ADAMW_ALONE, "final_seeds": [0], "objective": {"milestone": "full"}}
    assert run_fake(tmp_path, sweep, runner).keys() == {"adamw"}
    # Added later, it counts for the trials that have ended.
    found = run_fake(tmp_path, {**sweep, "objective": {"milestone": "full", "otherwise": "val/loss"}}, runner)
    assert len(found["adamw"]) == 4 and all(trial.state == TrialState.PRUNED for trial in found["adamw"])
    assert len(runner.commands) == 5
    losses = {lr(options): missed(options)["metrics"]["val/loss"]["best"] for options in runner.commands[:4]}
    assert lr(runner.commands[4]) == min(losses, key=lambda rate: losses[rate])
    (final,) = found["adamw-final"]
    assert saved(final)["model"]["model.optimizer.lr"] == runner.commands[4]["model.optimizer.lr"]


def test_the_best_trials_run_again_and_the_best_mean_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lucky(options: dict[str, str]) -> dict[str, Any]:
        # The best point has its value only on the seed of the trials, and diverges on another.
        luck = lr(options) > 0.01 and options["seed_everything"] != "7"
        if luck and options["seed_everything"] == "9":
            return {"metrics": {"val/accuracy": {"best": None}}}
        value = 0.0 if luck else lr(options) + 0.001 * (options["seed_everything"] == "9")
        return {"metrics": {"val/accuracy": {"best": value}}}

    sweep = {**ADAMW_ALONE, "trials": 4, "trial_seed": 7, "rejudged": 2, "rejudge_seeds": [8, 9], "final_seeds": [0]}
    sweep |= {"objective": {"metric": "val/accuracy", "direction": "maximize"}}
    runner = FakeRunner(lucky)
    found = run_fake(tmp_path, sweep, runner)
    rates = sorted(lr(options) for options in runner.commands[:4])
    assert rates[-1] > 0.01 > rates[-2]
    again = runner.commands[4:8]
    assert sorted((lr(options), options["seed_everything"]) for options in again) == [
        (rate, seed) for rate in rates[-2:] for seed in ("8", "9")
    ]
    # Each is a run of its trial, beside the trial's own.
    numbers = {lr(options): options["sweep.trial"] for options in runner.commands[:4]}
    assert all(options["sweep.trial"] == numbers[lr(options)] for options in again)
    assert {options["experiment"] for options in again} == {"adamw"}
    (final,) = runner.commands[8:]
    assert lr(final) == rates[-2] and "sweep.trial" not in final
    assert f"{rates[-2] + 0.001 / 3:.6g}" in capsys.readouterr().out, "the table has the mean over the seeds"
    assert [len(found[name]) for name in ("adamw", "adamw-rejudged", "adamw-final")] == [4, 4, 1]
    run_fake(tmp_path, sweep, runner)
    assert len(runner.commands) == 9


def test_only_the_best_row_of_a_family_runs_on_the_final_seeds(tmp_path: Path) -> None:
    row = SWEEP["optimizers"]["adamw"]
    high = {"model.optimizer.lr": {"low": 0.1, "high": 0.2}}
    rows = {"long": {**row, "family": "adamw", "space": high}, "short": {**row, "family": "adamw"}, "other": row}
    runner = FakeRunner(accuracy)
    found = run_fake(tmp_path, {**SWEEP, "optimizers": rows}, runner)
    assert {name for name in found if name.endswith("-final")} == {"long-final", "other-final"}


def test_the_progress_has_times_for_people_and_no_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_fake(tmp_path, {**SWEEP, "trials": 2}, FakeRunner(accuracy))
    printed = capsys.readouterr().out
    assert re.search(r"small: trials +━+ +4/4 +\d+ s, 0 s left", printed), printed
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", printed)
