"""A run that was stopped and goes on with the same command is the run that was never stopped, to the bit."""

import json
from pathlib import Path

import pytest

from tests.commands import ADAMW, AGA, NETWORK, TINY
from tests.resuming import assert_same_run, fit, only_folder

NOISY = ("--model", "tests.resuming.NoisyAddition", *(f"--model.{key}={value}" for key, value in NETWORK.items()))
SCHEDULED = (
    *("--model.scheduler", "torch.optim.lr_scheduler.CosineAnnealingLR", "--model.scheduler.T_max", "40"),
    *("--model.scheduler_interval", "step"),
)
# Four batches an epoch, five epochs; a task joins with a config and small sizes that make as many.
GROKKING = (*AGA, *TINY, *NOISY, *SCHEDULED, "--data.train_fraction", "0.6", "--internals.every_n_steps", "3")
TASKS: dict[str, tuple[str, ...]] = {"grokking": (*GROKKING, "--trainer.max_epochs", "5")}
MODES = {
    "base": ("--model.optimizer.mode", "base", "--model.optimizer.k", "0"),
    "sync": ("--model.optimizer.mode", "sync", "--model.optimizer.k", "1"),
    "aga": ("--model.optimizer.phi_lambda", "0.5", "--model.optimizer.k", "3"),
    "periodic": ("--model.optimizer.mode", "periodic", "--model.optimizer.k", "3"),
    "random": ("--model.optimizer.mode", "random", "--model.optimizer.probability", "0.4", "--model.optimizer.k", "0"),
}
# The second and the last batch of the second epoch: in its middle, and at its end.
STOPS = {"middle": "SIGTERM:6", "end": "SIGINT:8"}


@pytest.fixture(scope="module", params=[(task, mode) for task in TASKS for mode in MODES], ids="-".join)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[str, ...], Path]:
    """The options of a run, and the folder of one that was never stopped."""
    task, mode = request.param
    options, runs = (*TASKS[task], *MODES[mode]), tmp_path_factory.mktemp("whole")
    result = fit(runs, *options)
    assert result.code == 0, result.err
    return options, only_folder(runs)


@pytest.mark.parametrize("stop", STOPS)
def test_a_stopped_run_goes_on_exactly(whole: tuple[tuple[str, ...], Path], stop: str, tmp_path: Path) -> None:
    options, folder = whole
    again = (*options, "--ckpt_path", "last")
    # There is no run to go on with yet: the very same command begins one.
    stopped = fit(tmp_path, *again, stop=STOPS[stop])
    assert stopped.code == {"middle": 143, "end": 130}[stop], stopped.err
    assert stopped.out.splitlines()[-1].startswith("go on with: python train.py fit --config configs/grok_aga.yaml")
    unfinished = json.loads((only_folder(tmp_path) / "summary.json").read_text())
    assert unfinished["status"] == "interrupted"
    resumed = fit(tmp_path, *again)
    assert resumed.code == 0, resumed.err
    assert f"going on with {only_folder(tmp_path)}" in resumed.out
    assert_same_run(only_folder(tmp_path), folder)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (only_folder(tmp_path), folder)]
    for key in ("status", "epochs", "metrics", "milestones"):
        assert summaries[0][key] == summaries[1][key]
    # And once more, now that it is finished: a new one.
    assert "a new one begins" in fit(tmp_path, *again, "--trainer.max_epochs", 5, stop="SIGTERM:1").out


def test_stopping_in_every_step_changes_nothing(tmp_path: Path) -> None:
    options = (*TASKS["grokking"], *MODES["aga"], "--model.accumulate_grad_batches", 3)
    assert fit(tmp_path / "whole", *options).code == 0
    for step in range(1, 10):
        assert fit(tmp_path / "parts", *options, "--ckpt_path", "last", stop=f"SIGTERM:{step}").code == 143
    assert fit(tmp_path / "parts", *options, "--ckpt_path", "last").code == 0
    assert_same_run(only_folder(tmp_path / "parts"), only_folder(tmp_path / "whole"))


@pytest.mark.parametrize("config", ["configs/grok_adamw.yaml", "configs/grok_muon.yaml"])
def test_the_baselines_go_on_exactly_too(config: str, tmp_path: Path) -> None:
    options = ("--config", config, *TASKS["grokking"][len(ADAMW) :])
    assert fit(tmp_path / "whole", *options).code == 0
    for step in (6, 12):
        assert fit(tmp_path / "parts", *options, "--ckpt_path", "last", stop=f"SIGTERM:{step}").code == 143
    assert fit(tmp_path / "parts", *options, "--ckpt_path", "last").code == 0
    assert_same_run(only_folder(tmp_path / "parts"), only_folder(tmp_path / "whole"))
