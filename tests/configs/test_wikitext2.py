"""The WikiText-2 task works as a person uses it.

Configs are as published; training, prompts and errors are checked.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.commands import ROOT, Result, call, changed_by, fit
from tests.helpers.marks import slow
from tests.helpers.text import FILES, SMALL_TEXT, write_corpus

ROWS = ("adamw", "muon", "base", "sync", "aga")
NEO = {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}
NEO_VECTOR = {"betas": [0.9, 0.999], "weight_decay": 0.01}
AGA: dict[str, Any] = {"k": 1, "alpha": 0.0, "phi_lambda": 0.5, "phi_beta": 0.9, "phi_gamma": 2.0}
# As published: the optimizer's options, policy, options of the vector track, epochs.
PUBLISHED: dict[str, tuple[dict[str, Any], str, dict[str, Any], int]] = {
    "adamw": ({"lr": 5e-4, "betas": [0.9, 0.95], "weight_decay": 0.1}, "all", {}, 20),
    "muon": ({"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0, "betas": [0.9, 0.95]}, "hidden", {"lr": 3e-4}, 20),
    "base": ({**NEO, "mode": "base"}, "all", NEO_VECTOR, 20),
    "sync": ({**NEO, "mode": "sync", "rho": 0.3}, "all", NEO_VECTOR, 10),
    "aga": ({**NEO, "mode": "aga", "rho": 0.3, **AGA}, "all", NEO_VECTOR, 10),
}
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "": (
        {"vocabulary": 40_479, "context": 255, "layers": 3, "width": 512, "heads": 4, "head_dim": 128},
        {"protocol": "packed", "batch_size": 8},
    ),
    "mini_": (
        {"vocabulary": 40_479, "context": 128, "layers": 2, "width": 128, "heads": 4, "head_dim": 128},
        {"protocol": "packed", "batch_size": 16},
    ),
    "nano_": ({"vocabulary": 2048, "context": 64, "layers": 2, "width": 32}, {"protocol": "contiguous"}),
}
NANO = ("--config", "configs/wikitext2_nano_base.yaml", *SMALL_TEXT, "--wandb", "false", "--trainer.max_epochs", "2")
LAST = "checkpoints/last.ckpt"


def model_and_data(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    config = yaml.safe_load((ROOT / f"configs/wikitext2_{name}.yaml").read_text())
    return config["model"]["init_args"], config["data"]["init_args"], config


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("row", ROWS)
def test_settings_are_as_published(row: str, size: str) -> None:
    options, policy, vector, epochs = PUBLISHED[row]
    model, data, config = model_and_data(size + row)
    stated = model["optimizer"]["init_args"]
    assert {key: stated.get(key) for key in options} == options and "eps" in stated
    assert {key: model.get("vector", {}).get(key) for key in vector} == vector
    # A table of 40,479 rows is a vector by its size; the small one has to be by its role.
    assert model["policy"] == ("hidden" if size == "nano_" and row != "adamw" else policy)
    assert config["trainer"]["max_epochs"] == {"": epochs, "mini_": 10, "nano_": 4}[size]
    for found, wanted in zip((model, data), SIZES[size], strict=True):
        assert {key: found[key] for key in wanted} == wanted
    assert (data["vocabulary"], data["context"]) == (model["vocabulary"], model["context"])
    assert model["key_value_heads"] == model["heads"] and model["rope_theta"] == 10_000 and model["tied_embeddings"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run folder of two epochs on the small text.

    The text is beside it.
    """
    folder = tmp_path_factory.mktemp("wikitext2")
    return fit(folder / "runs", *NANO, *where(write_corpus(folder / "text")))


def where(text: Path) -> tuple[object, ...]:
    return "--data.root", text, "--data.cache", text.parent / "cache"


def text_of(trained: Path) -> Path:
    return trained.parents[2] / "text"


def ask(trained: Path, *options: object) -> Result:
    return call("predict", *NANO, *where(text_of(trained)), "--ckpt_path", trained / LAST, *options)


def test_a_run_leaves_samples_and_records_corpus_and_protocol(trained: Path) -> None:
    assert (trained / "samples.txt").read_text().count("--- epoch") == 2
    for name in ("summary.json", "hparams.yaml"):
        recorded = (trained / name).read_text()
        assert "tokens version" in recorded and "contiguous" in recorded
    assert yaml.safe_load((trained / "config.yaml").read_text())["data"]["init_args"]["protocol"] == "contiguous"


def test_the_root_from_the_environment_is_not_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARS2_WIKITEXT2_ROOT", str(write_corpus(tmp_path / "text")))
    folder = fit(tmp_path / "runs", *NANO, "--data.cache", tmp_path / "cache", "--trainer.limit_train_batches", 1)
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["init_args"]["root"] is None


def test_prompts_are_continued_in_their_order_and_the_same_each_time(trained: Path) -> None:
    prompts = ("--data.prompts", '["the lobster", "a red claw eats"]')
    first, again = ask(trained, *prompts), ask(trained, *prompts)
    assert first.code == 0, first.err
    assert first.out == again.out
    assert first.out.index("the lobster") < first.out.index("a red claw eats")


@pytest.mark.slow
def test_temperature_and_seed_are_options(trained: Path) -> None:
    prompts = ("--data.prompts", '["the lobster"]', "--model.sample_tokens", 12)
    greedy = [ask(trained, *prompts, "--model.temperature", 0, "--model.sample_seed", seed).out for seed in (1, 2)]
    wild = [
        ask(trained, *prompts, "--model.temperature", 9, "--model.top_k", "null", "--model.sample_seed", seed).out
        for seed in (1, 2)
    ]
    one = ask(trained, *prompts, "--model.temperature", 9, "--model.top_k", 1).out
    assert greedy[0] == greedy[1] == one
    assert len({greedy[0], *wild}) == 3


def test_without_prompts_the_validation_text_is_continued(trained: Path) -> None:
    result = ask(trained)
    assert result.code == 0 and "Article 0" in result.out


def test_a_prompt_longer_than_the_context_is_refused(trained: Path) -> None:
    result = ask(trained, "--data.prompts", f'["{"zq " * 30}"]')
    assert "tokens, and the context allows 1 to 16: use a shorter one" in result.error


def test_a_prompt_of_nothing_is_refused(trained: Path) -> None:
    assert "has 0 tokens" in ask(trained, "--data.prompts", '[""]').error


def test_evaluating_the_checkpoint_gives_the_numbers_of_its_run(trained: Path, tmp_path: Path) -> None:
    result = call(
        *("validate", *NANO, *where(text_of(trained)), "--ckpt_path", trained / LAST, "--runs", tmp_path),
    )
    assert result.code == 0, result.err
    last = (trained / "summary.json").read_text().split('"val/word_perplexity"')[1].split('"last": ')[1].split("\n")[0]
    assert last[:6] in result.out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--data.vocabulary", 9000, "--model.vocabulary", 9000), "too small for more than"),
        (("--data.vocabulary", 100, "--model.vocabulary", 100), "vocabulary must be at least 258"),
        (("--data.context", 8), "set model.context and data.context to the same value"),
        slow(("--data.batch_size", 0), "batch_size must be at least 1"),
        slow(("--data.protocol", "stacked"), "expected one of 'packed', 'contiguous'"),
        (("--data.root", "/nowhere"), "the corpus folder /nowhere is missing"),
        (("--data.protocol", "packed", "--data.batch_size", 5000), "too few for one batch of 5000"),
    ],
)
def test_bad_options_are_one_sentence_and_leave_no_run(options: tuple[object, ...], named: str, tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "text")
    result = call("fit", *NANO, *where(text), "--runs", tmp_path / "runs", *options)
    assert named in result.error
    assert not list((tmp_path / "runs").glob("*/*"))


def test_an_empty_split_is_one_sentence(tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "text")
    (text / FILES["validation"]).write_text("")
    assert "the validation split" in call("fit", *NANO, *where(text), "--runs", tmp_path / "runs").error


def test_the_gpu_overlay_changes_precision_and_devices_only() -> None:
    overlay = ("--config", "configs/overlays/wikitext2_gpu.yaml")
    assert changed_by(overlay, "--config", "configs/wikitext2_aga.yaml") == {
        "on_device: true",
        "accelerator: gpu",
        "devices: 1",
        "precision: bf16-mixed",
    }
