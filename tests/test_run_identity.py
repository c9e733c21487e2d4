"""What a run is, told by its config: digests change with what matters and with nothing else."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from run_identity import RunIdentity, digest, flatten
from tests.commands import ADAMW, AGA, TINY, call, fit
from wandb_naming import init_arguments, nested


def resolved(*arguments: object) -> dict[str, Any]:
    """The config of a run as it would be saved."""
    result = call("fit", *arguments, "--print_config")
    assert result.code == 0, result.err
    config: dict[str, Any] = yaml.safe_load(result.out)
    return config


@pytest.fixture(scope="module")
def aga() -> RunIdentity:
    return RunIdentity(resolved(*AGA))


def test_names(aga: RunIdentity) -> None:
    assert (aga.task, aga.optimizer, aga.seed, aga.experiment) == ("modular_addition", "ars2_aga", "42", "grok_aga")
    assert aga.name == "modular_addition-ars2_aga-s42"
    assert aga.group == f"modular_addition-ars2_aga-{aga.setting_digest}"
    adamw = RunIdentity(resolved(*ADAMW, "--seed_everything", "3"))
    # The data has a seed of its own.
    assert adamw.name == "modular_addition-adamw-s3.42"


def test_a_trailing_number_is_not_part_of_a_tasks_name() -> None:
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "modules.image_classification.Net",
            "init_args": {"optimizer": {"class_path": "ars2.ARS2Neo", "init_args": {"mode": "sync"}}},
        },
        "data": {"class_path": "datamodules.cifar10.Data", "init_args": {"seed": 0}},
    }
    assert RunIdentity(config).name == "cifar-ars2_sync-s0"


def test_a_switch_is_named_where_it_is_off_and_runs_from_before_there_was_one_are_repeats() -> None:
    def config(**switches: bool) -> dict[str, Any]:
        optimizer = {"class_path": "ars2.ARS2Neo", "init_args": {"mode": "sync", **switches}}
        model = {"class_path": "modules.image_classification.Net", "init_args": {"optimizer": optimizer}}
        return {"model": model, "data": {"class_path": "datamodules.cifar10.Data", "init_args": {"seed": 0}}}

    before, whole = RunIdentity(config()), RunIdentity(config(energy=True, geometry=True))
    assert before.setting_digest == whole.setting_digest and before.optimizer == whole.optimizer == "ars2_sync"
    sam, neither = RunIdentity(config(geometry=False)), RunIdentity(config(energy=False, geometry=False))
    assert (sam.optimizer, neither.optimizer) == ("ars2_sync_no_geometry", "ars2_sync_no_energy_no_geometry")
    assert len({identity.setting_digest for identity in (whole, sam, neither)}) == 3


def test_options_that_came_later_do_not_part_runs_from_those_before() -> None:
    budget = {"class_path": "callbacks.evaluation_budget.EvaluationBudget", "init_args": {"gradient_evaluations": 9}}

    def digest_of(model: dict[str, Any], callback: dict[str, Any]) -> tuple[str, str]:
        optimizer = {"class_path": "ars2.ARS2Neo", "init_args": {"mode": "sync", **model.pop("optimizer", {})}}
        config = {
            "model": {"class_path": "modules.nets.Net", "init_args": {**model, "optimizer": optimizer}},
            "data": {"class_path": "datamodules.cifar10.Data", "init_args": {"seed": 0}},
            "trainer": {"callbacks": [{**budget, "init_args": {**budget["init_args"], **callback}}]},  # type: ignore[dict-item]
        }
        identity = RunIdentity(config)
        return identity.protocol_digest, identity.setting_digest

    before = digest_of({}, {})
    neutral: dict[str, Any] = {
        "nonfinite": "stop",
        "gather": "exact",
        "optimizer": {"ns_algorithm": "auto", "compile": False},
    }
    assert digest_of(neutral, {"finish_epoch": True}) == before
    assert digest_of({"compile": True, "channels_last": True}, {}) == before  # equal but for rounding
    assert digest_of({"nonfinite": "skip"}, {})[0] == before[0]  # how it is trained, not on what
    for model, callback in (
        ({"nonfinite": "skip"}, {}),
        ({}, {"finish_epoch": False}),
        ({"optimizer": {"compile": True}}, {}),
    ):
        assert digest_of(model, callback)[1] != before[1]


def test_flatten_puts_a_class_at_its_own_key() -> None:
    config = {"a": {"class_path": "x.Y", "init_args": {"b": {"class_path": "z", "init_args": {"c": 1}}}}, "d": None}
    assert dict(flatten(config)) == {"a": "x.Y", "a.b": "z", "a.b.c": 1, "d": None}
    assert nested(config) == {"a": {"class": "x.Y", "b": {"class": "z", "c": 1}}, "d": None}


# What must not matter, what makes another setting of the same protocol, and what makes another protocol.
REPEATS = [
    ("--seed_everything", "7"),
    ("--data.seed", "7"),
    ("--experiment", "mine"),
    ("--runs", "elsewhere"),
    ("--model.optimizer.seed", "7"),
    ("--data.questions", "[1+1]"),
    ("--internals.every_n_steps", "1"),
    ("--checkpoint.save_top_k", "2"),
    ("--sweep.name", "s", "--sweep.optimizer", "o"),
    ("--model.optimizer.energy", "true"),
    ("--model.optimizer.ns_algorithm", "auto"),
]
SETTINGS = [
    ("--model.optimizer.lr", "0.002"),
    ("--model.policy", "hidden"),
    ("--model.vector.weight_decay", "0.5"),
    ("--model.accumulate_grad_batches", "2"),
    ("--trainer.max_epochs", "9"),
    ("--model.optimizer.geometry", "false"),
    ("--model.nonfinite", "skip"),
    ("--trainer.precision", "bf16-mixed"),
]
PROTOCOLS = [
    ("--data.train_fraction", "0.4"),
    ("--data.batch_size", "64"),
    ("--model.width", "64"),
    ("--trainer.limit_val_batches", "0.5"),
    ("--trainer.check_val_every_n_epoch", "2"),
]


@pytest.mark.parametrize("change", REPEATS, ids=lambda change: change[0])
def test_seeds_places_and_names_make_no_difference(change: tuple[str, ...], aga: RunIdentity) -> None:
    changed = RunIdentity(resolved(*AGA, *change))
    assert changed.setting_digest == aga.setting_digest
    assert changed.protocol_digest == aga.protocol_digest


@pytest.mark.parametrize("change", SETTINGS, ids=lambda change: change[0])
def test_a_training_option_is_another_setting_of_the_same_protocol(change: tuple[str, ...], aga: RunIdentity) -> None:
    changed = RunIdentity(resolved(*AGA, *change))
    assert changed.setting_digest != aga.setting_digest
    assert changed.protocol_digest == aga.protocol_digest


@pytest.mark.parametrize("change", PROTOCOLS, ids=lambda change: change[0])
def test_data_network_and_evaluation_make_another_protocol(change: tuple[str, ...], aga: RunIdentity) -> None:
    changed = RunIdentity(resolved(*AGA, *change))
    assert changed.protocol_digest != aga.protocol_digest
    assert changed.setting_digest != aga.setting_digest


def test_optimizers_on_one_task_share_a_protocol(aga: RunIdentity) -> None:
    assert RunIdentity(resolved(*ADAMW)).protocol_digest == aga.protocol_digest


def test_a_digest_knows_no_order_and_no_nulls() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "c": None, "a": 1}) != digest({"a": 1, "b": [3]})


@pytest.mark.parametrize("missing", ["model", "data"])
def test_a_config_without_its_classes_is_refused(missing: str) -> None:
    config = resolved(*AGA)
    del config[missing]
    with pytest.raises(ValueError, match=f"names no {missing}"):
        RunIdentity(config)


def test_a_run_keeps_the_digest_that_follows_from_its_config(tmp_path: Path) -> None:
    folder = fit(tmp_path, *AGA, *TINY, "--sweep.name", "search", "--sweep.optimizer", "aga", "--sweep.trial", "3")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    protocol = yaml.safe_load((folder / "protocol.yaml").read_text())
    identity = RunIdentity(config)
    assert protocol == {"digest": identity.protocol_digest, "places": [], **identity.protocol}
    assert protocol["data.p"] == 7
    assert (config["sweep"], identity.sweep and identity.sweep.trial) == (
        {"name": "search", "optimizer": "aga", "trial": 3},
        3,
    )


def test_weights_and_biases_is_told_the_same() -> None:
    sweep = ("--sweep.name", "search", "--sweep.optimizer", "aga", "--sweep.trial", "3")
    config = resolved(*AGA, *sweep)
    identity, told = RunIdentity(config), init_arguments(config)
    assert (told["name"], told["group"]) == (identity.name, identity.group)
    tags = ["modular_addition", "ars2_aga", f"protocol {identity.protocol_digest}", "sweep search"]
    assert told["tags"] == tags
    assert told["config"]["model"]["optimizer"]["lr"] == 1e-3
    assert told["config"]["model"]["optimizer"]["class"] == "ars2.ARS2Neo"
    assert told["config"]["data"]["p"] == 113
    assert (told["config"]["task"], told["config"]["optimizer"]) == ("modular_addition", "ars2_aga")
