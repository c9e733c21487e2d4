"""Every error is one line, has a non-zero exit code, and leaves no files."""

import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.helpers.commands import ADAMW, AGA, TINY, call, fit, folders
from tests.helpers.marks import slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a good checkpoint; the tests damage copies."""
    return fit(tmp_path_factory.mktemp("runs"), *AGA, *TINY) / "checkpoints/last.ckpt"


def refused(runs: Path, subcommand: str, *arguments: object, config: tuple[str, ...] = AGA) -> str:
    """Return the error line of a command that must stop before it trains.

    It leaves no run folder.
    """
    result = call(subcommand, *config, *TINY, "--runs", runs, *arguments)
    assert folders(runs) == []
    return result.error


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model.widht", "8"], ["widht", "did you mean width?"]),
        slow(["--model.optimizer.weight_decai", "1"], ["weight_decai", "did you mean weight_decay?"]),
        slow(["--trainer.max_epoch", "1"], ["max_epoch", "did you mean trainer.max_epochs?"]),
        slow(["--checkpoint.moniter", "x"], ["moniter", "did you mean checkpoint.monitor?"]),
        (["--trainer.max_epochs", "many"], ["max_epochs", "int", "many"]),
        slow(["--data.train_fraction", "half"], ["train_fraction", "float", "half"]),
        (["--model.optimizer.mode", "agga"], ["mode", "agga", "did you mean aga?"]),
        (["--model.optimizer.lr", "-1"], ["lr", "-1", "[0, inf)"]),
        (["--model.vector", "{weight_decai: 1}"], ["vector", "weight_decai", "weight_decay"]),
        slow(["--model.accumulate_grad_batches", "0"], ["accumulate_grad_batches", "0", "at least 1"]),
        (["--model.heads", "3"], ["heads=3", "width=8"]),
        slow(["--data.p", "2"], ["p must be at least 3", "2"]),
        (["--data.p", "11"], ["p = 7", "p = 11"]),
        slow(["--data.train_fraction", "1.5"], ["train_fraction", "1.5"]),
        (["--internals.every_n_steps", "0"], ["every_n_steps", "0"]),
        (["--model.optimizer", "ars2.ARS2Ne"], ["ARS2Ne", "did you mean ARS2Neo?"]),
        slow(["--model", "modules.modular_additon.ModularAddition"], ["did you mean modular_addition?"]),
        (["--model", "modules.modular_addition.ModularAdition"], ["did you mean ModularAddition?"]),
        (["--config", "configs/nope.yaml"], ["configs/nope.yaml", "not exist"]),
        (["--trainer.accelerator", "gpuu"], ["gpuu", "cpu"]),
        (["--trainer.gradient_clip_algorithm", "nrom"], ["gradient_clip_algorithm must be 'norm' or 'value'", "nrom"]),
        (
            ["--trainer.gradient_clip_val", "1", "--model.gradient_clip_val", "2"],
            ["trainer.gradient_clip_val is 1.0 and model.gradient_clip_val is 2.0", "two names of one option"],
        ),
        (
            ["--trainer.accumulate_grad_batches", "2", "--model.accumulate_grad_batches", "3"],
            ["trainer.accumulate_grad_batches is 2 and model.accumulate_grad_batches is 3"],
        ),
        (["--ckpt_path", "best"], ["from the last checkpoint, not the best one", "--ckpt_path last"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_a_wrong_option_is_named(arguments: list[str], named: list[str], tmp_path: Path) -> None:
    line = refused(tmp_path / "runs", "fit", *arguments)
    for word in named:
        assert word in line


@pytest.mark.parametrize(
    ("accelerator", "precision"), [("cpu", "16-mixed"), ("auto", "16"), slow("cpu", "16"), slow("auto", "16-mixed")]
)
def test_a_precision_that_would_be_another_one_is_refused(accelerator: str, precision: str, tmp_path: Path) -> None:
    if accelerator == "auto" and torch.cuda.is_available():
        pytest.skip("there is a GPU, which has it")
    options = ("--trainer.accelerator", accelerator, "--trainer.precision", precision)
    assert refused(tmp_path / "runs", "fit", *options) == (
        "error: trainer.precision 16-mixed is not available on a CPU, where Lightning would use bf16-mixed:"
        " give --trainer.precision bf16-mixed, or 32-true"
    )


@pytest.mark.parametrize("precision", ["bf16", slow("bf16-true"), slow("16-true"), "64", slow("32")])
def test_a_supported_precision_is_recorded_as_given(precision: str, tmp_path: Path) -> None:
    options = ("--trainer.accelerator", "cpu", "--trainer.precision", precision, "--trainer.max_epochs", "1")
    folder = fit(tmp_path, "--config", "configs/grok_base.yaml", *TINY, *options)
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["precision"] == yaml.safe_load(precision)


def test_a_wrong_key_in_a_config_is_named(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {init_args: {optimizer: {init_args: {weight_decai: 1}}}}\n")
    assert "did you mean weight_decay?" in refused(tmp_path / "runs", "fit", "--config", overlay)
    overlay.write_text("trainr: {max_epochs: 1}\n")
    assert "did you mean trainer.max_epochs?" in refused(tmp_path / "runs", "fit", "--config", overlay)
    overlay.write_text("model: [1, 2\n")
    assert str(overlay) in refused(tmp_path / "runs", "fit", "--config", overlay)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{experiment: }", "experiment must be a string, got null"),
        slow("{runs: }", "runs must be a string, got null"),
        ("{sweep: {name: , optimizer: x}}", "name"),
        ("{checkpoint: 2}", "checkpoint must be a mapping from options to values, got 2"),
        slow("{last_checkpoint: [1]}", "last_checkpoint must be a mapping from options to values, got [1]"),
        slow("{internals: }", "internals must be a mapping from options to values, got null"),
        ("{checkpoint: {save_top_k: }}", "checkpoint.save_top_k needs a value"),
        slow("{trainer: {num_nodes: }}", "trainer.num_nodes needs a value"),
        ("{model: {init_args: {width: }}}", "model.width needs a value, but is empty (null)"),
        slow("{model: {init_args: {policy: }}}", "model.policy needs a value, but is empty (null)"),
        ("{data: {init_args: {batch_size: }}}", "data.batch_size needs a value, but is empty (null)"),
    ],
)
def test_an_empty_or_wrong_entry_of_a_config_is_named(config: str, message: str, tmp_path: Path) -> None:
    result = call("fit", *AGA, *TINY[:2], "--runs", tmp_path, "--wandb", "false", "--config", config)
    assert message in result.error
    assert "TypeError" not in result.error


def test_a_missing_subcommand_is_an_error() -> None:
    assert "{fit,validate,test,predict}" in call().error
    assert "fit.model" in call("fit").error


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_an_untrained_network_is_not_evaluated(subcommand: str, tmp_path: Path) -> None:
    assert f"{subcommand} needs a trained network: add --ckpt_path" in refused(tmp_path / "runs", subcommand)


@pytest.mark.parametrize("word", ["last", "best"])
def test_where_no_run_was_found_is_named(word: str, tmp_path: Path) -> None:
    line = refused(tmp_path / "runs", "test", "--ckpt_path", word)
    assert f"{tmp_path / 'runs' / 'grok_aga'} has no run with a {word} checkpoint" in line


@pytest.mark.parametrize("question", ["9+1", slow("1-1"), "one+two", slow("")])
def test_a_question_out_of_range_is_quoted(question: str, checkpoint: Path, tmp_path: Path) -> None:
    line = refused(
        tmp_path / "runs", "predict", "--ckpt_path", checkpoint, "--data.questions", f"['1+2', '{question}']"
    )
    assert f"'{question}'" in line
    assert "p = 7" in line


@pytest.mark.parametrize("subcommand", ["fit", slow("validate"), slow("test"), "predict"])
def test_a_missing_checkpoint_is_named(subcommand: str, tmp_path: Path) -> None:
    assert "nope.ckpt" in refused(tmp_path / "runs", subcommand, "--ckpt_path", tmp_path / "nope.ckpt")
    assert str(tmp_path) in refused(tmp_path / "runs", subcommand, "--ckpt_path", tmp_path)


@pytest.mark.parametrize(
    ("subcommand", "size"),
    [("fit", 0), ("fit", -1), ("predict", 3000), *(slow(*case) for case in (("fit", 3000), ("predict", 0)))],
)
def test_a_truncated_checkpoint_is_refused(subcommand: str, size: int, checkpoint: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(checkpoint.read_bytes()[:size])
    line = refused(tmp_path / "runs", subcommand, "--ckpt_path", damaged)
    assert f"{damaged} cannot be read as a checkpoint" in line


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.ckpt"
    foreign.write_text("experiment: mine\n")
    assert str(foreign) in refused(tmp_path / "runs", "fit", "--ckpt_path", foreign)
    for content in ({"weights": torch.zeros(3)}, torch.zeros(3), [1, 2]):
        torch.save(content, foreign)
        assert f"{foreign} is not a checkpoint of a training run" in refused(
            tmp_path / "runs", "predict", "--ckpt_path", foreign
        )


class Trap:
    """Make a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    ("subcommand", "packed"),
    [
        ("fit", "checkpoint"),
        ("test", "torch"),
        ("predict", "pickle"),
        *(slow("fit", packed) for packed in ("torch", "pickle")),
        *(slow("predict", packed) for packed in ("torch", "checkpoint")),
    ],
)
def test_code_in_a_checkpoint_does_not_run(subcommand: str, packed: str, checkpoint: Path, tmp_path: Path) -> None:
    sprung, trap = tmp_path / "sprung", tmp_path / "trap.ckpt"
    if packed == "pickle":
        trap.write_bytes(pickle.dumps(Trap(sprung)))
    else:
        good = torch.load(checkpoint, weights_only=True) if packed == "checkpoint" else {}
        torch.save({**good, "callbacks": Trap(sprung)}, trap)
    assert str(trap) in refused(tmp_path / "runs", subcommand, "--ckpt_path", trap)
    assert not sprung.exists()
    # The trap works: a loader that trusts the file springs it.
    if packed == "pickle":
        pickle.loads(trap.read_bytes())
    else:
        torch.load(trap, weights_only=False)
    assert sprung.exists()


@pytest.mark.parametrize("subcommand", ["fit", slow("test"), "predict"])
def test_a_checkpoint_of_another_network_is_refused(subcommand: str, checkpoint: Path, tmp_path: Path) -> None:
    line = refused(tmp_path / "runs", subcommand, "--ckpt_path", checkpoint, "--model.width", 16)
    if subcommand == "fit":
        assert "is of a run with other options: model.width (8 there, 16 here)" in line
    else:
        assert "different network" in line
        assert "[2, 4, 8] in the checkpoint and [2, 8, 16] in the model" in line


def test_details_of_early_errors_are_in_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("XDG_CACHE_HOME", "TMPDIR"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setattr(tempfile, "tempdir", None)
    for number in ("-1", "-2"):
        line = refused(tmp_path / "runs", "fit", "--trainer.fast_dev_run", number)
        assert line.endswith(f"(details in {tmp_path}/XDG_CACHE_HOME/ars2/error.txt)")
    assert "Traceback" in (tmp_path / "XDG_CACHE_HOME/ars2/error.txt").read_text()
    assert not list((tmp_path / "TMPDIR").iterdir())


def test_a_checkpoint_of_weights_only_cannot_be_resumed(checkpoint: Path, tmp_path: Path) -> None:
    best = checkpoint.with_name("best.ckpt")
    assert f"{best} contains only weights" in refused(tmp_path / "runs", "fit", "--ckpt_path", best)


def test_a_checkpoint_of_another_optimizer_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    result = call("fit", *ADAMW, *TINY, "--runs", tmp_path, "--trainer.max_epochs", 4, "--ckpt_path", checkpoint)
    assert result.error


def test_runs_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    line = call("fit", *AGA, *TINY, "--runs", in_the_way / "runs").error
    assert str(in_the_way) in line
    assert "Not a directory" in line


def test_an_error_does_not_touch_other_runs(tmp_path: Path) -> None:
    existing = fit(tmp_path, *AGA, *TINY)
    before = sorted(path.name for path in existing.rglob("*"))
    assert call("fit", *AGA, *TINY, "--runs", tmp_path, "--model.optimizer.lr", "-1").error
    assert folders(tmp_path) == [existing]
    assert sorted(path.name for path in existing.rglob("*")) == before
