"""The command line makes run folders and checkpoints, resumes and predicts."""

import ast
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torchmetrics
import yaml

from analysis.runs import Run
from experiment.folders import RunFolder
from experiment.identity import RunIdentity
from launch import cli, console
from modules.grokking_transformer import GrokkingTransformer
from tests.helpers.commands import ADAMW, AGA, NETWORK, ROOT, TINY, call, fit, folders, metrics
from tests.helpers.marks import slow

LAST = "checkpoints/last.ckpt"
# Enough for a network of this size to know its training sums by heart.
LEARN = ["--model.optimizer.lr", "0.02", "--model.optimizer.weight_decay", "0.0", "--trainer.max_epochs", "60"]


def test_fit_writes_everything_into_one_folder(tmp_path: Path) -> None:
    folder = fit(tmp_path, *AGA, *TINY)
    assert folder.parent == tmp_path / "grok_aga"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-seed42", folder.name)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert {"metrics.csv", "config.yaml", "summary.json"} <= {path.name for path in folder.iterdir()}
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["epochs"], summary["run_folder"]) == ("finished", 2, str(folder))
    assert [row["epoch"] for row in metrics(folder) if "train/loss" in row] == ["0", "1"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]["width"] == 8


def test_a_users_module_is_trained_counted_and_recorded(tmp_path: Path) -> None:
    model = ("--model", "tests.modules.users.Sums", "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", 0.1)
    data = ("--data", "datamodules.modular_addition.ModularAdditionData", "--data.p", 7, "--data.batch_size", 8)
    folder = fit(tmp_path, *model, *data, "--trainer.max_epochs", 2, "--wandb", "false")
    summary = json.loads((folder / "summary.json").read_text())
    # 14 sums to train on, in two batches: 2 x 14 gradients of products of 3 by 7, at 2 operations forward and 2 back.
    costs = {"optimizer_steps": 4, "gradient_evaluations": 4, "examples": 28, "flops": 2 * 14 * 3 * 7 * 4}
    assert summary["status"] == "finished"
    assert costs.items() <= summary["costs"].items()
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["class_path"] == "tests.modules.users.Sums"
    assert [row["epoch"] for row in metrics(folder) if "train/loss" in row] == ["0", "1"]


def test_late_second_passes_are_an_option_of_a_config(tmp_path: Path) -> None:
    late = (
        "--model.optimizer.mode",
        "late",
        "--model.optimizer.total_steps",
        "4",
        "--model.optimizer.late_start",
        "0.5",
    )
    folder = fit(tmp_path, "--config", "configs/grok_sync.yaml", *TINY, *late)
    costs = json.loads((folder / "summary.json").read_text())["costs"]
    assert (costs["optimizer_steps"], costs["gradient_evaluations"]) == (4, 6)


def test_late_without_the_number_of_steps_is_one_line(tmp_path: Path) -> None:
    late = ("--model.optimizer.mode", "late", "--runs", tmp_path)
    result = call("fit", "--config", "configs/grok_sync.yaml", *TINY, *late)
    assert 'mode "late" needs total_steps, the number of optimizer steps' in result.error


def test_the_progress_bar_and_checkpoints_can_be_turned_off(tmp_path: Path) -> None:
    options = ("--trainer.enable_progress_bar", "false", "--trainer.enable_checkpointing", "false")
    folder = fit(tmp_path, *AGA, *TINY, *options)
    assert not (folder / "checkpoints").exists()
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], "last_checkpoint" in summary) == ("finished", False)
    assert len(metrics(folder)) == 4


def test_the_trainers_options_of_an_update_go_to_the_model(tmp_path: Path) -> None:
    options = {"gradient_clip_val": 1, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 2}
    by_trainer, by_model = (
        fit(tmp_path, *AGA, *TINY, *(part for key, value in options.items() for part in (f"--{whose}.{key}", value)))
        for whose in ("model", "trainer")
    )
    assert metrics(by_trainer) == metrics(by_model)
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in (by_trainer, by_model)]
    assert configs[0]["model"] == configs[1]["model"] and configs[0]["trainer"] == configs[1]["trainer"]
    assert options.items() <= configs[1]["model"]["init_args"].items()
    assert RunIdentity(configs[0]).setting_digest == RunIdentity(configs[1]).setting_digest


def test_the_folder_has_the_names_given(tmp_path: Path) -> None:
    folder = fit(tmp_path, *AGA, *TINY, "--experiment", "mine", "--seed_everything", 7)
    assert folder.parent == tmp_path / "mine"
    assert folder.name.endswith("-seed7")


def test_two_runs_of_one_second_have_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.time, "strftime", lambda _: "now")
    first, second = fit(tmp_path, *AGA, *TINY), fit(tmp_path, *AGA, *TINY)
    assert (first.name, second.name) == ("now-seed42", "now-seed42-1")
    assert metrics(first) == metrics(second)
    # A process that the run started takes part in it.
    monkeypatch.setenv("ARS2_RUN_FOLDER", str(first))
    assert RunFolder.current() == RunFolder(first)


@pytest.mark.parametrize("config", [slow("grok_adamw"), "grok_aga", slow("grok_muon")])
def test_the_saved_config_repeats_the_run(config: str, tmp_path: Path) -> None:
    first = fit(tmp_path / "first", "--config", f"configs/{config}.yaml", *TINY, "--seed_everything", 3)
    again = fit(tmp_path / "again", "--config", first / "config.yaml")
    assert metrics(again) == metrics(first)
    other = fit(tmp_path / "other", "--config", first / "config.yaml", "--seed_everything", 4)
    assert metrics(other) != metrics(first)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / LAST, weights_only=True)["state_dict"]
    return state


@pytest.mark.slow
@pytest.mark.parametrize("config", [slow("grok_adamw"), "grok_aga", slow("grok_muon")])
def test_a_resumed_run_equals_an_uninterrupted_one(config: str, tmp_path: Path) -> None:
    chosen = ("--config", f"configs/{config}.yaml", *TINY)
    uninterrupted = fit(tmp_path / "uninterrupted", *chosen, "--trainer.max_epochs", 5)
    start = fit(tmp_path / "parts", *chosen, "--trainer.max_epochs", 3)
    rest = fit(tmp_path / "parts", *chosen, "--trainer.max_epochs", 5, "--ckpt_path", start / LAST)
    assert metrics(start) == metrics(uninterrupted)[: len(metrics(start))]
    assert len(metrics(rest)) == 4  # validation and training
    assert metrics(rest) == metrics(uninterrupted)[len(metrics(start)) :]
    assert {row["epoch"] for row in metrics(rest)} == {"3", "4"}
    for name, tensor in weights(uninterrupted).items():
        assert torch.equal(tensor, weights(rest)[name]), name


def printed(*arguments: object) -> dict[str, Any]:
    result = call("fit", *arguments, "--print_config")
    assert result.code == 0
    config: dict[str, Any] = yaml.safe_load(result.out)
    return config


def test_print_config_resolves_and_runs_nothing(tmp_path: Path) -> None:
    config = printed(*AGA, *TINY, "--runs", tmp_path / "runs", "--model.optimizer.lr", 0.5)
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.5
    assert config["model"]["init_args"]["optimizer"]["init_args"]["phi_lambda"] == 0.1
    assert not (tmp_path / "runs").exists()


def test_later_configs_override_earlier_ones(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("experiment: one\nmodel: {init_args: {optimizer: {init_args: {rho: 0.5, k: 3}}}}\n")
    second.write_text("model: {init_args: {optimizer: {init_args: {k: 4}}}}\n")
    config = printed(*AGA, "--config", first, "--config", second)
    options = config["model"]["init_args"]["optimizer"]["init_args"]
    assert (config["experiment"], options["rho"], options["k"], options["mode"]) == ("one", 0.5, 4, "aga")


def test_a_config_may_state_the_coefficients_as_numbers(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        "model: {init_args: {optimizer: {init_args: {ns_coefficients: [[3, -4, 2.0], [1.5, -0.5, 0]]}}}}"
    )
    named, stated = printed(*AGA, *TINY), printed(*AGA, *TINY, "--config", overlay)
    found = stated["model"]["init_args"]["optimizer"]["init_args"]
    assert found["ns_coefficients"] == [[3.0, -4.0, 2.0], [1.5, -0.5, 0.0]]
    assert RunIdentity(named).setting_digest != RunIdentity(stated).setting_digest
    folder = fit(tmp_path, *AGA, *TINY, "--config", overlay)
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"] == stated["model"]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run folder of a network that knows half of the sums below 7."""
    options = (*ADAMW, *TINY, *LEARN, "--data.train_fraction", 0.5)
    return fit(tmp_path_factory.mktemp("runs"), *options)


def test_evaluating_a_checkpoint_gives_the_numbers_of_its_run(learned: Path, tmp_path: Path) -> None:
    last = [row for row in metrics(learned) if "val/loss" in row][-1]
    for subcommand, stage in (("validate", "val"), ("test", "test")):
        options = (*ADAMW, *TINY, "--data.train_fraction", 0.5, "--ckpt_path", learned / LAST, "--runs", tmp_path)
        result = call(subcommand, *options)
        assert result.code == 0
        (row,) = metrics(folders(tmp_path)[-1])
        for name in ("loss", "accuracy"):
            assert row[f"{stage}/{name}"] == last[f"val/{name}"]
            # Printed too, in a table, and where it is.
            assert f"run folder: {folders(tmp_path)[-1]}" in result.out
            assert f"{stage}/{name}" in result.out
            assert last[f"val/{name}"][:6] in result.out


def test_the_best_checkpoint_can_be_tested_right_after_training(tmp_path: Path) -> None:
    options = (*ADAMW, *TINY, "--trainer.max_epochs", "3", "--model.optimizer.lr", "0.1")
    best = ("--test_best", "true", "--checkpoint.monitor", "val/loss", "--checkpoint.mode", "min")
    folder = fit(tmp_path, *options, *best)
    summary = json.loads((folder / "summary.json").read_text())
    # The loss rises at this learning rate, so the best epoch is not the last one.
    assert summary["metrics"]["val/loss"]["best_epoch"] < 3
    # This task's test data are its validation data.
    assert summary["test"]["test/loss"] == pytest.approx(summary["metrics"]["val/loss"]["best"], rel=1e-6)
    assert Run(folder).epochs == 3 and Run(folder).finished
    result = call("fit", *options, "--test_best", "true", "--checkpoint.monitor", "null", "--runs", tmp_path)
    assert result.error == "error: test_best needs a best checkpoint: set checkpoint.monitor, such as val/loss"


def test_the_best_checkpoint_can_be_evaluated_too(learned: Path, tmp_path: Path) -> None:
    best = max(float(row["val/accuracy"]) for row in metrics(learned) if "val/accuracy" in row)
    options = (*ADAMW, *TINY, "--data.train_fraction", 0.5, "--runs", tmp_path)
    assert call("test", *options, "--ckpt_path", learned / "checkpoints/best.ckpt").code == 0
    assert float(metrics(folders(tmp_path)[-1])[0]["test/accuracy"]) == best


def test_last_and_best_are_those_of_the_newest_run_of_the_config(learned: Path) -> None:
    runs = learned.parent.parent
    other = fit(runs, *ADAMW, *TINY, "--model.optimizer.lr", 0.5)
    options = (*ADAMW, *TINY, *LEARN, "--data.train_fraction", 0.5, "--runs", runs)
    for word in ("last", "best"):
        path = learned / f"checkpoints/{word}.ckpt"
        result = call("test", *options, "--ckpt_path", word)
        assert (result.code, result.err) == (0, "")
        assert f"checkpoint: {path}" in result.out
        answered = call("predict", *options, "--ckpt_path", word)
        assert answered.err == f"checkpoint: {path}\n"
        assert answered.out == call("predict", *options, "--ckpt_path", path).out
    result = call("validate", *ADAMW, *TINY, "--model.optimizer.lr", 0.5, "--runs", runs, "--ckpt_path", "last")
    assert f"checkpoint: {other / LAST}" in result.out


def test_epochs_count_from_0_in_what_lightning_writes_and_from_1_elsewhere(tmp_path: Path) -> None:
    options = (*ADAMW, *TINY, *LEARN, "--data.train_fraction", 0.5, "--checkpoint.filename", "best-{epoch}")
    folder = fit(tmp_path, *options)
    summary = json.loads((folder / "summary.json").read_text())
    rows = [row for row in metrics(folder) if "val/accuracy" in row]
    accuracies = [float(row["val/accuracy"]) for row in rows]
    best = accuracies.index(max(accuracies))
    assert [int(row["epoch"]) for row in rows] == list(range(60))
    assert (folder / f"checkpoints/best-epoch={best}.ckpt").exists()
    assert (summary["epochs"], summary["metrics"]["val/accuracy"]["best_epoch"]) == (60, best + 1)
    (fitted,) = [row for row in metrics(folder) if "milestone/fit" in row]
    assert int(fitted["epoch"]) + 1 == float(fitted["milestone/fit"]) == summary["milestones"]["fit"]["epoch"]
    run = Run(folder)
    assert (run.epochs, run.log["epoch"].min(), run.log["epoch"].max()) == (60, 1, 60)


def test_last_and_best_are_found_in_a_folder_that_was_moved(learned: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved" / learned.parent.name / learned.name
    shutil.copytree(learned, moved)
    config = ("--config", moved / "config.yaml")
    for word in ("last", "best"):
        answered = call("predict", *config, "--runs", tmp_path / "moved", "--ckpt_path", word)
        assert answered.err == f"checkpoint: {moved}/checkpoints/{word}.ckpt\n"
    for subcommand in ("validate", "test", "predict"):
        error = call(subcommand, *config, "--runs", tmp_path / "elsewhere", "--ckpt_path", "best").error
        assert "elsewhere" in error and "or --runs if the runs were moved" in error
    assert f"give a file in {moved / 'checkpoints'}" in call("test", *config, "--ckpt_path", moved).error


def test_predict_answers_as_the_network_does(learned: Path) -> None:
    network = GrokkingTransformer(NETWORK["p"] + 1, width=8, heads=2, mlp_width=16)
    network.load_state_dict({name.removeprefix("network."): tensor for name, tensor in weights(learned).items()})
    pairs = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    guesses = network(torch.cat([pairs, torch.full((49, 1), 7)], dim=1)).argmax(-1)
    expected = []
    for (x, y), guess in zip(pairs.tolist(), guesses.tolist(), strict=True):
        verdict = "right" if guess == (x + y) % 7 else f"wrong, it is {(x + y) % 7}"
        expected.append(f"{x} + {y} = {guess} (mod 7): {verdict}")
    questions = ", ".join(f"{x} + {y}" for x, y in pairs.tolist())
    result = call("predict", *ADAMW, *TINY, "--ckpt_path", learned / LAST, "--data.questions", f"[{questions}]")
    # Nothing but the answers, so that they can be piped.
    assert result.out.splitlines() == expected
    assert (result.code, result.err) == (0, "")
    # It has learned its half of them, so both verdicts are there.
    assert 24 <= sum(line.endswith("right") for line in expected) < 49


def test_predict_without_questions_uses_the_data_and_leaves_no_files(learned: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in ROOT.iterdir())
    result = call("predict", *ADAMW, *TINY, "--ckpt_path", learned / LAST, "--runs", tmp_path / "runs")
    assert len(result.out.splitlines()) == 10
    assert not (tmp_path / "runs").exists()
    assert sorted(path.name for path in ROOT.iterdir()) == before


def messages() -> Iterator[str]:
    """Return every text in the sources of libraries with suppressed messages.

    ``{}`` stands for the parts that are filled in.
    """
    sources = [
        *Path(str(lightning.__file__)).parent.rglob("*.py"),
        Path(torchmetrics.__file__).parent / "aggregation.py",
    ]
    torch_folder = Path(torch.__file__).parent
    sources += [torch_folder / "utils/_cxx_pytree.py", torch_folder / "_weights_only_unpickler.py"]
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


@pytest.mark.slow
def test_every_suppressed_message_exists_in_the_installed_libraries() -> None:
    texts = list(messages())
    for pattern in console.WARNINGS:
        assert any(re.match(pattern, text, re.IGNORECASE) for text in texts), pattern
    for beginning in console.LOG_LINES:
        assert any(text.startswith(beginning) for text in texts), beginning
