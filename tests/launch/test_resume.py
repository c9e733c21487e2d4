"""A run resumed by the same command equals an uninterrupted one to the bit."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.datamodules.tiny_cifar10 import accept, write
from tests.helpers.commands import AGA, TINY
from tests.helpers.marks import slow
from tests.helpers.resuming import assert_same_run, fit, only_folder
from tests.helpers.text import SMALL_TEXT, write_corpus

NOISE = ("--trainer.callbacks+=tests.helpers.resuming.Noise", "--internals.every_n_steps", "3", "--wandb", "false")
SCHEDULED = (
    *("--model.scheduler", "torch.optim.lr_scheduler.CosineAnnealingLR", "--model.scheduler.T_max", "40"),
    *("--model.scheduler_interval", "step"),
)
# Each is four batches an epoch, the last one short, and three epochs.
GROKKING = (*AGA, *TINY, *SCHEDULED, "--data.train_fraction", "0.6", *NOISE, "--trainer.max_epochs", "3")
CIFAR = (
    *("--config", "configs/cifar_mini_aga.yaml", "--model.width", "2", "--data.train_examples", "null"),
    *("--data.batch_size", "60", *NOISE, "--trainer.max_epochs", "3"),
)
WIKITEXT2 = (
    *("--config", "configs/wikitext2_nano_aga.yaml", *SMALL_TEXT, *SCHEDULED, "--data.batch_size", "32"),
    *("--trainer.limit_train_batches", "1.0", *NOISE, "--trainer.max_epochs", "3"),
)
TASKS: dict[str, tuple[str, ...]] = {"grokking": GROKKING, "cifar": CIFAR, "wikitext2": WIKITEXT2}
MODES = {
    "base": ("--model.optimizer.mode", "base", "--model.optimizer.k", "0"),
    "sync": ("--model.optimizer.mode", "sync", "--model.optimizer.k", "1"),
    "aga": ("--model.optimizer.phi_lambda", "0.5", "--model.optimizer.k", "3"),
    "periodic": ("--model.optimizer.mode", "periodic", "--model.optimizer.k", "3"),
    "random": ("--model.optimizer.mode", "random", "--model.optimizer.probability", "0.4", "--model.optimizer.k", "0"),
    "late": ("--model.optimizer.mode", "late", "--model.optimizer.total_steps", "12", "--model.optimizer.k", "0"),
}
# The second and the last batch of the second epoch: in its middle, and at its end.
STOPS = {"middle": "SIGTERM:6", "end": "SIGINT:8"}


# The mode with the most state is in every run of the tests.
QUICK = [("grokking", "aga")]
CASES = [
    pytest.param((task, mode), id=f"{task}-{mode}", marks=() if (task, mode) in QUICK else pytest.mark.slow)
    for task in TASKS
    for mode in MODES
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[str, ...]]]:
    """Return each task's data as options.

    The files of the larger tasks are small ones of the same format.
    """
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        accept(write(folder / "cifar10"), patch)
        text = write_corpus(folder / "text", articles=10)
        yield {
            "grokking": (),
            "cifar": ("--data.root", str(folder / "cifar10")),
            "wikitext2": ("--data.root", str(text), "--data.cache", str(folder / "cache")),
        }


@pytest.fixture(scope="module", params=CASES)
def uninterrupted(
    request: pytest.FixtureRequest, data: dict[str, tuple[str, ...]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[tuple[str, ...], Path]:
    """Return the options of a run, and the folder of an uninterrupted one."""
    task, mode = request.param
    options, runs = (*TASKS[task], *MODES[mode], *data[task]), tmp_path_factory.mktemp("uninterrupted")
    result = fit(runs, *options)
    assert result.code == 0, result.err
    return options, only_folder(runs)


@pytest.mark.parametrize("stop", ["middle", slow("end")])
def test_a_stopped_run_resumes_exactly(uninterrupted: tuple[tuple[str, ...], Path], stop: str, tmp_path: Path) -> None:
    options, folder = uninterrupted
    again = (*options, "--ckpt_path", "last")
    # There is no run to resume yet: the same command begins one.
    stopped = fit(tmp_path, *again, stop=STOPS[stop])
    assert stopped.code == {"middle": 143, "end": 130}[stop], stopped.err
    assert stopped.out.splitlines()[-1].startswith(f"resume with: python train.py fit --config {options[1]}")
    unfinished = json.loads((only_folder(tmp_path) / "summary.json").read_text())
    assert unfinished["status"] == "interrupted"
    resumed = fit(tmp_path, *again)
    assert resumed.code == 0, resumed.err
    assert f"resuming {only_folder(tmp_path)}" in resumed.out
    assert_same_run(only_folder(tmp_path), folder)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (only_folder(tmp_path), folder)]
    for key in ("status", "epochs", "metrics", "milestones"):
        assert summaries[0].get(key) == summaries[1].get(key)


def test_a_finished_run_is_not_resumed(tmp_path: Path) -> None:
    again = (*GROKKING, "--ckpt_path", "last")
    assert fit(tmp_path, *again).code == 0
    assert "starting a new one" in fit(tmp_path, *again, stop="SIGTERM:1").out


@pytest.mark.slow
@pytest.mark.parametrize("steps", [(5,), slow(range(1, 10))], ids=["some", "all"])
def test_stopping_in_every_step_changes_nothing(steps: Iterable[int], tmp_path: Path) -> None:
    options = (*GROKKING, *MODES["aga"], "--trainer.max_epochs", 5, "--model.accumulate_grad_batches", 3)
    assert fit(tmp_path / "uninterrupted", *options).code == 0
    for step in steps:
        assert fit(tmp_path / "parts", *options, "--ckpt_path", "last", stop=f"SIGTERM:{step}").code == 143
    assert fit(tmp_path / "parts", *options, "--ckpt_path", "last").code == 0
    assert_same_run(only_folder(tmp_path / "parts"), only_folder(tmp_path / "uninterrupted"))


@pytest.mark.slow
def test_rows_after_the_last_checkpoint_are_dropped(data: dict[str, tuple[str, ...]], tmp_path: Path) -> None:
    options = (*WIKITEXT2, *data["wikitext2"], "--last_checkpoint.every_n_epochs", 2)
    options = (*options, "--trainer.max_epochs", 4)
    assert fit(tmp_path / "uninterrupted", *options).code == 0
    # The run stops after an epoch without a checkpoint: first there is none, then one of the epoch before.
    for step in (6, 14):
        assert fit(tmp_path / "parts", *options, "--ckpt_path", "last", stop=f"FAILURE:{step}").code == 1
        assert (only_folder(tmp_path / "parts") / "samples.txt").read_text().count("---") == step // 4
    assert fit(tmp_path / "parts", *options, "--ckpt_path", "last").code == 0
    assert_same_run(only_folder(tmp_path / "parts"), only_folder(tmp_path / "uninterrupted"))


BASELINES = [
    pytest.param(
        task,
        f"configs/{config}_{row}.yaml",
        id=f"{task}-{row}",
        marks=() if (task, row) == ("grokking", "muon") else pytest.mark.slow,
    )
    for task, config in (("grokking", "grok"), ("cifar", "cifar_mini"), ("wikitext2", "wikitext2_nano"))
    for row in ("adamw", "muon")
]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "config"), BASELINES)
def test_the_baselines_resume_exactly_too(
    task: str, config: str, data: dict[str, tuple[str, ...]], tmp_path: Path
) -> None:
    options = ("--config", config, *TASKS[task][2:], *data[task])
    assert fit(tmp_path / "uninterrupted", *options).code == 0
    for step in (6,):
        assert fit(tmp_path / "parts", *options, "--ckpt_path", "last", stop=f"SIGTERM:{step}").code == 143
    assert fit(tmp_path / "parts", *options, "--ckpt_path", "last").code == 0
    assert_same_run(only_folder(tmp_path / "parts"), only_folder(tmp_path / "uninterrupted"))
