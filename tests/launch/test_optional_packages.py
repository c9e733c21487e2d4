"""Training needs neither wandb nor datasets nor optuna.

Commands that need one of them name it in a sentence.
"""

import sys
from pathlib import Path

import pytest

from datamodules.text_corpus import SPLITS
from tests.datamodules.tiny_cifar10 import tiny_cifar10, tiny_files  # noqa: F401
from tests.helpers import text
from tests.helpers.commands import ADAMW, TINY, call, fit, fresh_python

OPTIONAL = ("wandb", "datasets", "optuna")


@pytest.fixture(autouse=True)
def none_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OPTIONAL:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def test_a_language_model_trains_on_a_folder_of_text_files(tmp_path: Path) -> None:
    options = (*text.SMALL_TEXT, "--data.root", text.write_corpus(tmp_path / "text"), "--data.cache", tmp_path)
    folder = fit(tmp_path / "runs", "--config", "configs/wikitext2_nano_base.yaml", *options, "--trainer.max_steps", 1)
    assert (folder / "summary.json").is_file()


def test_an_image_classifier_trains(tmp_path: Path, tiny_cifar10: Path) -> None:  # noqa: F811
    options = ("--model.width", "2", "--data.train_examples", "null", "--trainer.max_epochs", 1)
    folder = fit(tmp_path / "runs", "--config", "configs/cifar_base.yaml", *options)
    assert (folder / "summary.json").is_file()


def test_a_configured_key_is_named_and_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    result = call("fit", *ADAMW, *TINY[: TINY.index("--wandb")], "--runs", tmp_path / "runs")
    assert result.code == 0
    assert "the package wandb is not installed" in result.out


def test_asking_for_wandb_is_an_error_with_the_command_that_installs_it(tmp_path: Path) -> None:
    result = call("fit", *ADAMW, *TINY, "--wandb", "true", "--runs", tmp_path / "runs")
    assert "needs the package wandb: install it (pip install wandb)" in result.error
    assert not list((tmp_path / "runs").rglob("config.yaml"))


def test_parquet_files_are_an_error_that_explains_how_to_read_them(tmp_path: Path) -> None:
    for split in SPLITS:
        (tmp_path / f"{split}.parquet").write_bytes(b"")
    options = (*text.SMALL_TEXT, "--data.root", tmp_path, "--data.cache", tmp_path / "cache")
    result = call("fit", "--config", "configs/wikitext2_nano_base.yaml", *options, "--runs", tmp_path / "runs")
    assert "reading Parquet files needs the package datasets: install it (pip install datasets)" in result.error


def test_a_sweep_is_an_error_that_names_the_package(tmp_path: Path) -> None:
    command = (
        "import runpy, sys; sys.modules['optuna'] = None; sys.argv = ['sweep.py', 'configs/sweeps/grok.yaml'];"
        " runpy.run_path('sweep.py', run_name='__main__')"
    )
    result = fresh_python("-c", command, home=tmp_path, timeout=60)
    assert result.code == 1
    assert result.err == "error: a sweep needs the package optuna: install it (pip install optuna)\n"
