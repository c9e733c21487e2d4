import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from launch.config_guard import check_overlays
from tests.configs.test_configs import TINY_CIFAR
from tests.datamodules.tiny_cifar10 import tiny_cifar10, tiny_files  # noqa: F401
from tests.helpers import text
from tests.helpers.commands import ADAMW, AGA, ROOT, TINY, call, fit, folders, metrics, train_py
from tests.helpers.marks import slow

SGD = "torch.optim.SGD"
COMPLETE = {"lr": 0.1, "weight_decay": 0.0}
Overlay = Callable[[object], str]


@pytest.fixture
def overlay(tmp_path: Path) -> Overlay:
    """Return a function that writes a config from the model's options."""

    def write(model: object) -> str:
        path = tmp_path / "overlay.yaml"
        path.write_text(yaml.safe_dump({"model": {"init_args": model}}))
        return str(path)

    return write


def optimizer(class_path: str, **options: object) -> dict[str, object]:
    return {"optimizer": {"class_path": class_path, "init_args": options}}


def refused(*arguments: str) -> list[str]:
    """Return the names that would be inherited.

    The message also names the source and both classes.
    """
    with pytest.raises(ValueError, match="switches the optimizer from") as error:
        check_overlays(["fit", *arguments])
    found = re.search(r"would inherit (.*?): state every one", str(error.value))
    assert found is not None
    return found[1].split(", ")


def test_switching_alone_names_both_classes_and_every_option(overlay: Overlay) -> None:
    path = overlay({"optimizer": {"class_path": SGD}})
    result = call("fit", *AGA, "--config", path, *TINY)
    assert path in result.error
    assert f"from ars2.ARS2Neo to {SGD}" in result.error
    # SGD has momentum and the like; it does not have betas and rho.
    assert "would inherit lr, vector, weight_decay:" in result.error


def test_restated_options_are_not_inherited(overlay: Overlay) -> None:
    assert refused(*AGA, "--config", overlay(optimizer(SGD, lr=0.1))) == ["vector", "weight_decay"]
    assert refused(*AGA, "--config", overlay({**optimizer(SGD, **COMPLETE)})) == ["vector"]


@pytest.mark.parametrize("vector", [slow(None), {"weight_decay": 0.5}])
def test_an_overlay_that_states_all_is_fine(overlay: Overlay, vector: object, tmp_path: Path) -> None:
    folder = fit(tmp_path, *AGA, "--config", overlay({**optimizer(SGD, **COMPLETE), "vector": vector}), *TINY)
    saved = yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]
    assert saved["optimizer"]["class_path"] == SGD
    assert {key: saved["optimizer"]["init_args"][key] for key in COMPLETE} == COMPLETE
    assert saved["vector"] == vector


def test_a_complete_config_over_another_is_refused_only_for_missing_options() -> None:
    assert refused(*AGA, *ADAMW) == ["vector"]
    check_overlays(["fit", *AGA, *ADAMW, "--model.vector", "null"])
    # The same class again is no switch, and neither are options before it.
    check_overlays(["fit", *AGA, "--config", "configs/grok_sync.yaml"])


def test_matrix_options_are_inherited_too(overlay: Overlay) -> None:
    path = overlay({"matrix": {"lr": 1.0}, "vector": None})
    assert refused(*AGA, "--config", path, *ADAMW) == ["matrix"]


def test_one_key_of_a_track_leaves_the_others_inherited() -> None:
    assert refused(*AGA, *ADAMW, "--model.vector.lr", "0.1") == ["vector"]


def test_two_switches_inherit_only_options_of_the_class_between(overlay: Overlay) -> None:
    # SGD has dropped betas, so there are none to inherit when AdamW comes.
    switches = ("--config", overlay({**optimizer(SGD, **COMPLETE), "vector": None}), "--model.optimizer", "AdamW")
    assert refused(*AGA, *switches) == ["lr", "weight_decay"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model.optimizer", SGD),
        (f"--model.optimizer={SGD}",),
        ("--model.optimizer", "SGD"),
        ("--model.optimizer.class_path", SGD),
        ("--model.init_args.optimizer.class_path", SGD),
        ("--model.optimizer", f"{{class_path: {SGD}}}"),
        ("--model", f"{{init_args: {{optimizer: {SGD}}}}}"),
        ("--config", f"{{model: {{optimizer: {SGD}}}}}"),
        (f"--config={{model: {{init_args: {{optimizer: {{class_path: {SGD}}}}}}}}}",),
        ("-c", f"model.init_args.optimizer.class_path: {SGD}"),
    ],
)
def test_every_way_to_switch_is_seen(arguments: tuple[str, ...]) -> None:
    assert refused(*AGA, *arguments) == ["lr", "vector", "weight_decay"]


@pytest.mark.parametrize("key", ["model", "model.optimizer"])
def test_a_file_given_for_a_part_is_read(key: str, tmp_path: Path) -> None:
    part = tmp_path / "part.yaml"
    complete = optimizer(SGD, lr=1.0)
    part.write_text(yaml.safe_dump({"init_args": complete} if key == "model" else complete["optimizer"]))
    assert refused(*AGA, f"--{key}", str(part)) == ["vector", "weight_decay"]


def test_the_command_line_may_switch_completely_and_set_single_options(tmp_path: Path) -> None:
    switch = ("--model.optimizer", SGD, "--model.optimizer.lr", "3", "--model.optimizer.weight_decay", "0")
    folder = fit(tmp_path, *AGA, *switch, "--model.vector", "null", *TINY)
    assert (
        yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 3
    )
    folder = fit(tmp_path, *AGA, "--model.optimizer.lr", "3", *TINY)
    saved = yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]["optimizer"]
    assert (saved["class_path"], saved["init_args"]["lr"], saved["init_args"]["rho"]) == ("ars2.ARS2Neo", 3, 0.1)


def test_a_class_that_does_not_exist_is_left_to_the_parser() -> None:
    check_overlays(["fit", *AGA, "--model.optimizer", "torch.optim.SDG"])
    assert "SDG" in call("fit", *AGA, "--model.optimizer", "torch.optim.SDG", *TINY).error


def test_nothing_to_compare_is_fine() -> None:
    check_overlays([])
    check_overlays(["fit", "--config"])
    check_overlays(["fit", "--model.optimizer", SGD])


@pytest.mark.parametrize("content", [slow(b"model: [1, 2"), b"\xff\xfe\x00", slow(b"a: b: c")])
def test_a_config_that_is_no_yaml_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    assert str(path) in call("fit", "--config", path, *TINY).error


PROBE = "callbacks.flatness_probe.FlatnessProbe"


@pytest.mark.parametrize(
    "written",
    [
        {"trainer": {"callbacks": [{"class_path": PROBE}]}},
        {"fit": {"trainer": {"callbacks": PROBE}}},
        slow({"trainer.callbacks": [PROBE]}),
    ],
)
def test_a_list_of_callbacks_does_not_drop_the_milestones(written: object, tmp_path: Path) -> None:
    path = tmp_path / "overlay.yaml"
    path.write_text(yaml.safe_dump(written))
    line = call("fit", *AGA, "--config", path, *TINY).error
    for word in (str(path), "FlatnessProbe", "drops GrokkingMilestones", "callbacks+"):
        assert word in line
    check_overlays(["fit", *AGA, "--config", str(path), "--sweep.name", "search"])


def test_callbacks_can_be_added_named_anew_and_cleared(tmp_path: Path) -> None:
    path = tmp_path / "overlay.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks+": [{"class_path": PROBE}]}}))
    folder = fit(tmp_path / "runs", *AGA, "--config", path, *TINY, "--trainer.limit_val_batches", 0)
    saved = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["callbacks"]
    assert [one["class_path"].rpartition(".")[2] for one in saved] == ["GrokkingMilestones", "FlatnessProbe"]
    with pytest.raises(ValueError, match="drops GrokkingMilestones, FlatnessProbe"):
        check_overlays(["fit", *AGA, "--config", str(path), "--trainer.callbacks=TextSamples"])
    both = f"[{{class_path: callbacks.milestones.GrokkingMilestones}}, {PROBE}]"
    for option in ("null", "[]", both):
        check_overlays(["fit", *AGA, "--trainer.callbacks", option])


SHORT = ("--trainer.max_epochs", "1", "--wandb", "false")


@pytest.fixture
def commands(tmp_path: Path, tiny_cifar10: Path) -> dict[str, tuple[object, ...]]:  # noqa: F811
    """Return for each overlay a config and options that make its task tiny."""
    words = text.write_corpus(tmp_path / "text")
    cpu = ("--trainer.accelerator", "cpu")
    short_text = ("--data.root", words, "--data.cache", tmp_path, "--trainer.limit_train_batches", 2)
    grok = ("--config", "configs/grok_base.yaml", *TINY)
    # For the rows of a small text: the fractions of these overlays would leave none.
    few = ("--data.train_fraction", 0.9, "--trainer.limit_val_batches", 1)
    return {
        "ceiling_cifar": (
            *("--config", "configs/cifar_mini_sync.yaml", *TINY_CIFAR, *cpu),
            *("--data.train_examples", 8, "--data.holdout_examples", 4, "--model.policy", "hidden"),
        ),
        "ceiling_language": ("--config", "configs/wikitext2_nano_sync.yaml", *text.SMALL_TEXT, *short_text, *few, *cpu),
        "cifar_gpu": ("--config", "configs/cifar_sync.yaml", *TINY_CIFAR, *cpu),
        "compiled_optimizer": grok,
        "ema": grok,
        "fsdp": (*grok, *cpu, "--trainer.devices", 2, "--trainer.strategy.data_parallel_size", 2),
        "wikitext2_gpu": ("--config", "configs/wikitext2_sync.yaml", *text.SMALL_TEXT, *short_text, *cpu),
    }


# tests/test_launchers.py runs ddp.
OVERLAYS = sorted({path.stem for path in (ROOT / "configs/overlays").glob("*.yaml")} - {"ddp"})


@pytest.mark.parametrize("name", [slow(name) if name in ("fsdp", "compiled_optimizer") else name for name in OVERLAYS])
def test_every_overlay_trains(name: str, commands: dict[str, tuple[object, ...]], tmp_path: Path) -> None:
    config, *options = commands[name][1:]
    arguments = ("--config", config, "--config", f"configs/overlays/{name}.yaml", *options, *SHORT)
    if name == "fsdp":  # two processes
        result = train_py("fit", *arguments, "--runs", tmp_path / "runs", home=tmp_path)
        assert result.code == 0, result.err
        (folder,) = folders(tmp_path / "runs")
    else:
        folder = fit(tmp_path / "runs", *arguments)
    last = metrics(folder)[-1]
    assert float(last["cost/optimizer_steps"]) >= 1
    assert float(last["cost/flops"]) > 0
