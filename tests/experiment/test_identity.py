"""The config determines the identity of a run.

Digests change with options that matter and with nothing else.
"""

import importlib
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import yaml

from callbacks.save_config import SaveConfig
from experiment import identity as identity_module
from experiment.identity import RunIdentity, digest, flatten
from experiment.wandb_log import init_arguments, nested
from tests.helpers.commands import ADAMW, AGA, TINY, call, fit
from tests.helpers.marks import slow


def resolved(*arguments: object) -> dict[str, Any]:
    """Return the config of a run as it would be saved."""
    result = call("fit", *arguments, "--print_config")
    assert result.code == 0, result.err
    config: dict[str, Any] = yaml.safe_load(result.out)
    return config


@pytest.fixture(scope="module")
def aga() -> RunIdentity:
    return RunIdentity(resolved(*AGA))


def test_names(aga: RunIdentity) -> None:
    assert (aga.task, aga.optimizer, aga.seed, aga.experiment) == ("modular_addition", "ars2_aga", "42", "grok_aga")
    assert (aga.row, aga.name) == ("grok_aga", "grok_aga, seed 42")
    assert aga.group == f"{aga.row} ({aga.setting_digest})"
    adamw = RunIdentity(resolved(*ADAMW, "--seed_everything", "3"))
    # The data has a separate seed.
    assert adamw.name == "grok_adamw, seed 3.42"


def test_a_run_of_a_search_has_the_name_of_its_row_there(aga: RunIdentity) -> None:
    sweep = ("--sweep.name", "grok", "--sweep.optimizer", "aga_all")
    winner, trial = (RunIdentity(resolved(*AGA, *sweep, *more)) for more in ((), ("--sweep.trial", "3")))
    assert (winner.row, winner.name) == ("aga_all of grok", "aga_all of grok, seed 42")
    assert trial.name == "aga_all of grok, trial 3, seed 42"


def test_a_trailing_number_is_not_part_of_a_tasks_name() -> None:
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "modules.image_classification.Net",
            "init_args": {"optimizer": {"class_path": "ars2.ARS2Neo", "init_args": {"mode": "sync"}}},
        },
        "data": {"class_path": "datamodules.cifar10.Data", "init_args": {"seed": 0}},
    }
    assert RunIdentity(config).task == "cifar"


def test_a_switch_is_named_where_it_is_off_and_runs_from_before_there_was_one_are_repeats() -> None:
    def config(**switches: bool | str) -> dict[str, Any]:
        optimizer = {"class_path": "ars2.ARS2Neo", "init_args": {"mode": "sync", **switches}}
        model = {"class_path": "modules.image_classification.Net", "init_args": {"optimizer": optimizer}}
        return {"model": model, "data": {"class_path": "datamodules.cifar10.Data", "init_args": {"seed": 0}}}

    before, complete = RunIdentity(config()), RunIdentity(config(energy=True, geometry=True))
    assert before.setting_digest == complete.setting_digest and before.optimizer == complete.optimizer == "ars2_sync"
    sam, neither = RunIdentity(config(geometry=False)), RunIdentity(config(energy=False, geometry=False))
    assert (sam.optimizer, neither.optimizer) == ("ars2_sync_no_geometry", "ars2_sync_no_energy_no_geometry")
    scalar = RunIdentity(config(energy="scalar"))
    assert scalar.optimizer == "ars2_sync_energy_scalar"
    assert len({identity.setting_digest for identity in (complete, sam, neither, scalar)}) == 4


def test_options_that_came_later_do_not_separate_older_runs() -> None:
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


OPTIMIZER = {"class_path": "ars2.ARS2Neo", "init_args": {"mode": "sync"}}


def config_of(
    model: dict[str, Any] | None = None, optimizer: dict[str, Any] | None = None, **trainer: Any
) -> dict[str, Any]:
    options = {**OPTIMIZER, "init_args": {"mode": "sync", **(optimizer or {})}}
    return {
        "model": {"class_path": "modules.nets.Net", "init_args": {**(model or {}), "optimizer": options}},
        "data": {"class_path": "datamodules.cifar10.Data", "init_args": {"seed": 0}},
        "trainer": trainer,
    }


def digests(config: dict[str, Any]) -> tuple[str, str]:
    identity = RunIdentity(config)
    return identity.protocol_digest, identity.setting_digest


@pytest.mark.parametrize(
    ("file", "last", "section"),
    [
        ("modules/two_pass.py", 'gather: Literal["exact", "bfloat16"] = "exact",', "model"),
        ("ars2/ars2_neo.py", "capturable: bool = False,", "optimizer"),
    ],
)
def test_an_option_added_at_its_default_leaves_old_digests_unchanged(
    file: str, last: str, section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digests(config_of())
    for name in ("modules/two_pass.py", "ars2/ars2_neo.py"):
        source = (identity_module.ROOT / name).read_text()
        assert name != file or last in source
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(source.replace(last, f"{last} *, warm_up: int = 0,") if name == file else source)
    monkeypatch.setattr(identity_module, "ROOT", tmp_path)
    assert digests(config_of()) == before
    assert digests(config_of(**{section: {"warm_up": 0}})) == before
    protocol, setting = digests(config_of(**{section: {"warm_up": 5}}))
    assert protocol == before[0] and setting != before[1]


def test_a_fraction_of_the_training_text_makes_another_protocol_and_older_runs_keep_theirs() -> None:
    def protocol_of(**options: object) -> str:
        data = {"class_path": "datamodules.wikitext2.WikiText2Data", "init_args": options}
        return RunIdentity(config_of() | {"data": data}).protocol_digest

    assert protocol_of(train_fraction=1.0, fraction_seed=0, seed=3) == protocol_of()
    fractions = [{"train_fraction": 0.2}, {"train_fraction": 0.5}, {"train_fraction": 0.2, "fraction_seed": 1}]
    assert len({protocol_of(), *(protocol_of(**options) for options in fractions)}) == 4
    assert protocol_of(train_fraction=0.2, seed=3) == protocol_of(train_fraction=0.2, seed=4)


def test_the_loss_of_the_second_pass_is_another_setting_of_the_same_protocol() -> None:
    assert digests(config_of(model={"second_loss": "same"})) == digests(config_of())
    protocol, setting = digests(config_of(model={"second_loss": "functional"}))
    assert protocol == digests(config_of())[0] and setting != digests(config_of())[1]


def test_an_option_of_a_network_makes_another_protocol() -> None:
    assert digests(config_of(model={"depth": 3}))[0] != digests(config_of())[0]


WATCHING: list[Any] = [
    {"class_path": "callbacks.flatness_probe.FlatnessProbe", "init_args": {"epochs": 2}},
    {"class_path": "callbacks.text_samples.TextSamples"},
    {"class_path": "callbacks.optimizer_internals.OptimizerInternals", "init_args": {"every_n_steps": 1}},
    {"class_path": "callbacks.milestones.GrokkingMilestones", "init_args": {"stop_at": None}},
    {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor", "init_args": {"logging_interval": "step"}},
    {"class_path": "lightning.pytorch.callbacks.lr_monitor.LearningRateMonitor"},
    {"class_path": "lightning.pytorch.callbacks.ModelSummary", "init_args": {"max_depth": 2}},
    {"class_path": "lightning.pytorch.callbacks.DeviceStatsMonitor"},
]
CHANGING: list[Any] = [
    {"class_path": "callbacks.milestones.GrokkingMilestones", "init_args": {"stop_at": "full"}},
    {"class_path": "callbacks.milestones.GrokkingMilestones"},
    {"class_path": "callbacks.evaluation_budget.EvaluationBudget", "init_args": {"gradient_evaluations": 9}},
    {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss"}},
    {"class_path": "lightning.pytorch.callbacks.WeightAveraging"},
    {"class_path": "mine.of_unknown_effect.Callback"},
]


@pytest.mark.parametrize("callback", WATCHING, ids=lambda callback: callback["class_path"])
def test_a_callback_that_only_watches_makes_no_other_setting(callback: dict[str, Any]) -> None:
    assert digests(config_of(callbacks=[callback])) == digests(config_of())
    assert digests(config_of(callbacks=[CHANGING[0], callback])) == digests(config_of(callbacks=[CHANGING[0]]))
    # What reads its options still finds them.
    assert RunIdentity(config_of(callbacks=[callback])).options["trainer.callbacks"] == [callback]


@pytest.mark.parametrize("callback", CHANGING, ids=lambda callback: callback["class_path"])
def test_a_callback_that_changes_training_makes_another_setting(callback: dict[str, Any]) -> None:
    protocol, setting = digests(config_of(callbacks=[callback]))
    assert (protocol, setting != digests(config_of())[1]) == (digests(config_of())[0], True)
    # Lightning takes a single one without a list, too.
    assert digests(config_of(callbacks=callback)) == (protocol, setting)


def test_a_users_callback_may_declare_that_it_only_watches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_watch.py").write_text(
        "import torch\n\nclass Watch:\n    changes_training: bool = False\n\nclass Stop:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert digests(config_of(callbacks=[{"class_path": "my_watch.Watch"}])) == digests(config_of())
    assert digests(config_of(callbacks=[{"class_path": "my_watch.Stop"}])) != digests(config_of())


def test_every_callback_here_declares_whether_it_changes_training() -> None:
    names = [f"callbacks.{path.stem}" for path in (identity_module.ROOT / "callbacks").glob("*.py")]
    classes = [
        kind for name in names for kind in vars(importlib.import_module(name)).values() if isinstance(kind, type)
    ]
    here = {kind for kind in classes if issubclass(kind, L.Callback) and kind.__module__ in names} - {SaveConfig}
    assert len(here) > 10
    assert [kind for kind in here if "changes_training" not in vars(kind)] == []


def test_a_task_has_the_name_that_it_is_given_wherever_its_file_is() -> None:
    assert RunIdentity(config_of()).task == "cifar"  # a run of a version without task names
    assert RunIdentity(config_of() | {"task": "photographs"}).task == "photographs"


@pytest.mark.parametrize(
    "path",
    [
        "datamodules.modular_addition.ModularAdditionData",
        "datamodules.cifar10.CIFAR10Data",
        "datamodules.wikitext2.WikiText2Data",
    ],
)
def test_the_tasks_here_keep_the_names_that_their_files_gave_them(path: str) -> None:
    module, _, name = path.rpartition(".")
    config = config_of() | {"data": {"class_path": path}}
    assert getattr(importlib.import_module(module), name).task == RunIdentity(config).task


def test_flatten_puts_a_class_at_a_separate_key() -> None:
    config = {"a": {"class_path": "x.Y", "init_args": {"b": {"class_path": "z", "init_args": {"c": 1}}}}, "d": None}
    assert dict(flatten(config)) == {"a": "x.Y", "a.b": "z", "a.b.c": 1, "d": None}
    assert nested(config) == {"a": {"class": "x.Y", "b": {"class": "z", "c": 1}}, "d": None}


# Options that change nothing, that make another setting of the same protocol, and that make another protocol.
REPEATS = [
    ("--seed_everything", "7"),
    ("--data.seed", "7"),
    ("--experiment", "mine"),
    ("--runs", "elsewhere"),
    ("--task", "mine"),
    ("--trainer.callbacks+=callbacks.text_samples.TextSamples",),
    ("--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor",),
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


# All at once, and one by one with the slow tests.
EVERY_REPEAT = tuple(part for change in REPEATS for part in change)


@pytest.mark.parametrize("change", [EVERY_REPEAT, *map(slow, REPEATS)], ids=lambda change: change[0])
def test_seeds_places_and_names_make_no_difference(change: tuple[str, ...], aga: RunIdentity) -> None:
    changed = RunIdentity(resolved(*AGA, *change))
    assert changed.setting_digest == aga.setting_digest
    assert changed.protocol_digest == aga.protocol_digest


@pytest.mark.parametrize("change", [*SETTINGS[:2], *map(slow, SETTINGS[2:])], ids=lambda change: change[0])
def test_a_training_option_is_another_setting_of_the_same_protocol(change: tuple[str, ...], aga: RunIdentity) -> None:
    changed = RunIdentity(resolved(*AGA, *change))
    assert changed.setting_digest != aga.setting_digest
    assert changed.protocol_digest == aga.protocol_digest


@pytest.mark.parametrize("change", [*PROTOCOLS[:2], *map(slow, PROTOCOLS[2:])], ids=lambda change: change[0])
def test_data_network_and_evaluation_make_another_protocol(change: tuple[str, ...], aga: RunIdentity) -> None:
    changed = RunIdentity(resolved(*AGA, *change))
    assert changed.protocol_digest != aga.protocol_digest
    assert changed.setting_digest != aga.setting_digest


def test_optimizers_on_one_task_share_a_protocol(aga: RunIdentity) -> None:
    assert RunIdentity(resolved(*ADAMW)).protocol_digest == aga.protocol_digest


def test_a_digest_ignores_order_and_nulls() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "c": None, "a": 1}) != digest({"a": 1, "b": [3]})


@pytest.mark.parametrize("missing", ["model", "data"])
def test_a_config_without_its_classes_is_refused(missing: str) -> None:
    config = config_of()
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
    assert config["task"] == identity.task == "modular_addition"
    assert (config["sweep"], identity.sweep and identity.sweep.trial) == (
        {"name": "search", "optimizer": "aga", "trial": 3},
        3,
    )


def test_weights_and_biases_gets_the_same_identity() -> None:
    sweep = ("--sweep.name", "search", "--sweep.optimizer", "aga", "--sweep.trial", "3")
    config = resolved(*AGA, *sweep)
    identity, arguments = RunIdentity(config), init_arguments(config)
    assert (arguments["name"], arguments["group"]) == (identity.name, identity.group)
    tags = ["modular_addition", "ars2_aga", f"protocol {identity.protocol_digest}", "sweep search"]
    assert arguments["tags"] == tags
    assert arguments["config"]["model"]["optimizer"]["lr"] == 1e-3
    assert arguments["config"]["model"]["optimizer"]["class"] == "ars2.ARS2Neo"
    assert arguments["config"]["data"]["p"] == 113
    assert (arguments["config"]["task"], arguments["config"]["optimizer"]) == ("modular_addition", "ars2_aga")
