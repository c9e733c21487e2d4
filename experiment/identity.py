"""Identify a run by its task, optimizer, seed, setting and protocol.

Runs of one *setting* differ only in their seeds and are repeats of each other. Runs of one *protocol* share the data,
the network and the rules of evaluation, and may be compared in one table.
"""

import ast
import functools
import hashlib
import json
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

# Signatures are parsed from source files, so that a report does not import torch.
ROOT = Path(__file__).parents[1]

CONTENTS = "contents."  # prefix of the protocol's keys that describe the data itself
# Short names of optimizers; others use their class name.
_SHORT = {"ARS2Neo": "ars2"}
# Options of the data that change the speed or source of batches, and never their values.
_LOGISTICS = {
    "num_workers",
    "pin_memory",
    "persistent_workers",
    "prefetch_factor",
    "download",
    "on_device",
    # Inputs of predict.
    "questions",
    "images",
    "prompts",
}
# Suffixes of the options that are locations, for runs that did not record which options are.
_PLACES = ("root", "dir", "directory", "folder", "path", "cache", "file")
# The options of this class describe training, not the network. So do those of other modules in the set.
_TRAINING = "modules.two_pass.TwoPassModule"
_ALSO_TRAINING = {"second_loss"}
_OURS = {"ars2.ARS2Neo": "ars2.ars2_neo.ARS2Neo", "ars2.Muon": "ars2.muon.Muon"}
# Options of the first version. Every config states them, and they are part of the setting at any value. A later option
# is part of it only where it differs from its default, so that earlier runs keep their setting.
_VERSION_ONE = {
    "optimizer",
    "scheduler",
    "scheduler_interval",
    "policy",
    "matrix",
    "vector",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "accumulate_grad_batches",
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "momentum",
    "nesterov",
    "rho",
    "mode",
    "k",
    "alpha",
    "probability",
    "seed",
    "phi_beta",
    "phi_lambda",
    "phi_gamma",
    "ns_steps",
    "ns_coefficients",
    "ns_dtype",
}
# Lightning's callbacks that do not affect training. Any other callback is assumed to affect it, unless its class
# sets ``changes_training`` to ``False`` or to the name of the option that makes it affect training.
_WATCHING = {
    "DeviceStatsMonitor",
    "LearningRateMonitor",
    "ThroughputMonitor",
    "ModelSummary",
    "RichModelSummary",
    "ProgressBar",
    "RichProgressBar",
    "TQDMProgressBar",
    "Checkpoint",
    "ModelCheckpoint",
    "OnExceptionCheckpoint",
    "BasePredictionWriter",
}
_EVALUATION = (
    "limit_train_batches",
    "limit_val_batches",
    "overfit_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
)
_SWITCHES = ("model.optimizer.energy", "model.optimizer.geometry")
# Options that change results by rounding only.
_ROUNDING_ONLY = ("model.optimizer.ns_algorithm", "model.compile", "model.channels_last")
# Values at which later options, and torch's implementation choices, change nothing.
_NEUTRAL = {
    "model.optimizer.compile": False,
    "model.optimizer.capturable": False,
    "model.second_loss": "same",
    "data.train_fraction": 1.0,  # of WikiText2Data; no other task here allows 1
    "data.fraction_seed": 0,
    "callbacks.evaluation_budget.EvaluationBudget.finish_epoch": True,
}
_DURATION = ("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time")
_TRAINER = (*_EVALUATION, *_DURATION, "precision", "devices", "num_nodes", "callbacks")


@dataclass(frozen=True)
class Sweep:
    """Mark a run as part of a search over settings.

    Args:
        name: of the search.
        optimizer: the row of the search whose tuning budget the run counts towards.
        trial: number of the trial; ``None`` for a run of the winning setting.
    """

    name: str
    optimizer: str
    trial: int | None = None


def resolve_config(parser: Any, config: Any) -> dict[str, Any]:
    """Return a parsed config as plain nested mappings, with every default.

    Args:
        parser: of the subcommand.
        config: parsed by it.
    """
    resolved: dict[str, Any] = yaml.safe_load(parser.dump(config, skip_unset=False))
    return resolved


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values, with a class path under its object's key.

    ``{"optimizer": {"class_path": "ars2.Muon", "init_args": {"lr": 0.1}}}`` is ``optimizer = ars2.Muon`` and
    ``optimizer.lr = 0.1``.
    """
    for key, value in config.items():
        name = prefix.rstrip(".") if key == "class_path" else prefix if key == "init_args" else f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, name if key == "init_args" else f"{name}.")
        else:
            yield name, value


def digest(parts: Mapping[str, Any]) -> str:
    """Return eight hexadecimal digits that ignore key order and null values."""
    stated = {key: value for key, value in parts.items() if value is not None}
    return hashlib.sha256(json.dumps(stated, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def contents_of(description: Mapping[str, Any], words: Collection[str] = ()) -> dict[str, Any]:
    """Return a data module's description by dotted key, without ``words``.

    These entries are text for people.
    """
    return dict(flatten({key: value for key, value in description.items() if key not in words}))


@functools.cache
def _definition(path: str, root: Path) -> ast.ClassDef | None:
    """Return the syntax tree of a class; ``None`` if its file is not found."""
    module, _, name = path.rpartition(".")
    for place in (root, *map(Path, sys.path)):
        file = place / f"{module.replace('.', '/')}.py"
        if file.is_file():
            try:
                body = ast.parse(file.read_bytes()).body
            except (SyntaxError, ValueError):
                return None
            return next((node for node in body if isinstance(node, ast.ClassDef) and node.name == name), None)
    return None


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ...  # equals no value of a config


def _signature(path: str) -> dict[str, Any]:
    """Return the options of a class with their defaults, ``...`` without one."""
    definition = _definition(path, ROOT)
    for node in definition.body if definition else ():
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            names = [argument.arg for argument in node.args.args[1:]]
            defaults = [_literal(default) for default in node.args.defaults]
            missing = len(names) - len(defaults)
            named = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            return {
                **dict(zip(names, [*[...] * missing, *defaults], strict=True)),
                **{argument.arg: _literal(default) if default else ... for argument, default in named},
            }
    return {}


def _changes_training(callback: Any) -> bool:
    if not isinstance(callback, dict):
        return True
    path = str(callback.get("class_path"))
    if path.startswith(("lightning.", "pytorch_lightning.")):
        return _last(path) not in _WATCHING
    definition = _definition(path, ROOT)
    for node in definition.body if definition else ():
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "changes_training" for target in targets):
                value = _literal(node.value)
                option = (callback.get("init_args") or {}).get(value, ...) if isinstance(value, str) else value
                return option is not None and option is not False
    return True


def _is_neutral(key: str, value: Any, neutral: Mapping[str, Any]) -> bool:
    return key in _ROUNDING_ONLY or (key in neutral and type(value) is type(neutral[key]) and value == neutral[key])


def _later_options(optimizer: Any) -> dict[str, Any]:
    """Return later options of the training step and optimizer, with defaults."""
    classes = {"model": _TRAINING, "model.optimizer": _OURS.get(optimizer, "")}
    return {
        f"{section}.{name}": default
        for section, path in classes.items()
        for name, default in _signature(path).items()
        if name not in _VERSION_ONE
    }


def _without_neutral(callback: Any) -> Any:
    if not isinstance(callback, dict) or not isinstance(options := callback.get("init_args"), dict):
        return callback
    path = callback["class_path"]
    kept = {key: value for key, value in options.items() if not _is_neutral(f"{path}.{key}", value, _NEUTRAL)}
    return {**callback, "init_args": kept}


class RunIdentity:
    """Identify the run of a resolved config.

    Args:
        config: nested mappings, as ``config.yaml`` has them.
        contents: the recorded description of the data, see :func:`contents_of`; ``None`` if there is none.
        places: dotted keys of the data's options that are locations; ``None`` recognises them by their suffixes.

    Attributes:
        options: the config by dotted key, see :func:`flatten`, without options that change nothing.
        task: its name, such as ``modular_addition`` or ``cifar``; by default the file name of the data module's class
            without a trailing number.
        optimizer: short name, such as ``adamw``, ``muon``, ``ars2_sync`` or ``ars2_sync_no_geometry``.
        seed: of the run, such as ``7``, or ``7.42`` where the data has another seed (42).
        experiment: the name of the experiment.
        sweep: the search that the run is part of, if any.
        contents: the description of the data by dotted key; part of protocol and setting.

    Raises:
        ValueError: the config names no model or data.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        contents: Mapping[str, Any] | None = None,
        places: Collection[str] | None = None,
    ) -> None:
        self.contents, self.places = dict(contents or {}), places
        trainer = config.get("trainer") or {}
        if isinstance(single := trainer.get("callbacks"), Mapping):
            config = {**config, "trainer": {**trainer, "callbacks": [single]}}
        options = dict(flatten(config))
        neutral = _NEUTRAL | _later_options(options.get("model.optimizer"))
        self.options = {key: value for key, value in options.items() if not _is_neutral(key, value, neutral)}
        if isinstance(callbacks := self.options.get("trainer.callbacks"), list):
            self.options["trainer.callbacks"] = [_without_neutral(callback) for callback in callbacks]
        for key in ("model", "data"):
            if not isinstance(self.options.get(key), str):
                raise ValueError(f"the config names no {key} by its class_path")
        # An ordinary LightningModule may make its optimizer from options with the usual names.
        self._makes_optimizer = not isinstance(self.options.get("model.optimizer"), str)
        self.task = str(self.options.get("task") or self.options["data"].split(".")[-2].rstrip("0123456789"))
        section = "model" if self._makes_optimizer else "model.optimizer"
        name, mode = _last(self.options[section]), self.options.get(f"{section}.mode")
        switched = [(_last(key), self.options[key]) for key in _SWITCHES if key in self.options]
        off = [f"_{name}_{value}" if value else f"_no_{name}" for name, value in switched]  # energy may be "scalar"
        self.optimizer = "".join([_SHORT.get(name, name.lower()), f"_{mode}" if mode else "", *off])
        seeds = dict.fromkeys((self.options.get("seed_everything"), self.options.get("data.seed")))
        self.seed = ".".join(str(seed) for seed in seeds if seed is not None)
        self.experiment = str(self.options.get("experiment") or self.optimizer)
        self.sweep = Sweep(**config["sweep"]) if config.get("sweep") else None

    @classmethod
    def recorded(cls, config: Mapping[str, Any], stored: Mapping[str, Any]) -> "RunIdentity":
        """Return a run's identity from its config and its ``protocol.yaml``."""
        contents = {key.removeprefix(CONTENTS): value for key, value in stored.items() if key.startswith(CONTENTS)}
        return cls(config, contents, stored.get("places"))

    @property
    def protocol(self) -> dict[str, Any]:
        """The options and data that comparable runs share, by dotted key."""
        return self.stated_protocol | {f"{CONTENTS}{key}": value for key, value in self.contents.items()}

    @property
    def stated_protocol(self) -> dict[str, Any]:
        """The protocol without the description of the data."""
        return dict(self._protocol())

    @property
    def setting(self) -> dict[str, Any]:
        """Everything that training depends on except seeds, by dotted key."""
        return dict(self._setting())

    def _is_place(self, key: str) -> bool:
        if self.places is None:
            return _last(key).rpartition("_")[2] in _PLACES
        return key in self.places

    def _protocol(self) -> Iterator[tuple[str, Any]]:
        training = {*_signature(_TRAINING), *_ALSO_TRAINING, *(_VERSION_ONE if self._makes_optimizer else ())}
        for key, value in self.options.items():
            section, _, rest = key.partition(".")
            if (
                (section == "data" and _last(key) not in ("seed", *_LOGISTICS) and not self._is_place(key))
                or (section == "model" and rest.partition(".")[0] not in training)
                or (section == "trainer" and rest in _EVALUATION)
            ):
                yield key, value

    def _setting(self) -> Iterator[tuple[str, Any]]:
        yield from self.protocol.items()
        for key, value in self.options.items():
            section, _, rest = key.partition(".")
            if key == "trainer.callbacks" and isinstance(value, list):
                yield key, [callback for callback in value if _changes_training(callback)] or None
            elif _last(key) != "seed" and (section == "model" or (section == "trainer" and rest in _TRAINER)):
                yield key, value

    @property
    def protocol_digest(self) -> str:
        """A digest of the protocol; runs with different digests are not comparable."""
        return digest(self.protocol)

    @property
    def setting_digest(self) -> str:
        """A digest of the setting; runs with the same digest are repeats."""
        return digest(self.setting)

    @property
    def row(self) -> str:
        """Its row in a report, such as ``grok_sync``, or ``sync of grok`` for a run of a search."""
        return self.experiment if self.sweep is None else f"{self.sweep.optimizer} of {self.sweep.name}"

    @property
    def group(self) -> str:
        """Row and setting digest, such as ``grok_sync (1a2b3c4d)``."""
        return f"{self.row} ({self.setting_digest})"

    @property
    def name(self) -> str:
        """Row, trial and seed, such as ``grok_sync, seed 0`` or ``sync of grok, trial 3, seed 0``."""
        trial = None if self.sweep is None else self.sweep.trial
        return f"{self.row}{'' if trial is None else f', trial {trial}'}, seed {self.seed}"
