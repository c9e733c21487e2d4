"""Read the YAML file of a sweep, and check all of it before anything runs."""

import hashlib
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import yaml
from scipy.stats import qmc


@dataclass(frozen=True)
class Dimension:
    """Describe a searched option, with a range or a list of choices.

    Args:
        low, high: of a range, ``low < high``.
        log: whether the range is searched on a logarithmic scale, which needs ``low > 0``.
        choices: values instead of a range, each equally likely.

    Raises:
        ValueError: neither a range nor choices, or both, or a range that is empty.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        if self.choices is not None:
            if not self.choices or self.low is not None or self.high is not None or self.log:
                raise ValueError("give either low and high, or a list of choices")
        elif self.low is None or self.high is None or not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"needs low < high, and low > 0 if log, got low {self.low} and high {self.high}")

    def at(self, unit: float) -> Any:
        """Map a point of [0, 1) to a value."""
        if self.choices is not None:
            return self.choices[int(unit * len(self.choices))]
        assert self.low is not None and self.high is not None
        value = self.low * (self.high / self.low) ** unit if self.log else self.low + unit * (self.high - self.low)
        # Rounded to four digits, so that tables show the exact values.
        return float(f"{value:.4g}")


@dataclass(frozen=True)
class OptimizerSpec:
    """Describe one optimizer of a sweep.

    Args:
        configs: of its runs.
        space: the options that are searched.
        options: laid over the configs as a nested mapping.
        family: rows of one family compete, such as one optimizer at several budgets. Only the best of them, by its
            judged trials, runs on the final seeds. ``None`` (default): the row is a family by itself.
    """

    configs: tuple[str, ...]
    space: dict[str, Dimension]
    options: dict[str, Any]
    family: str | None = None


@dataclass(frozen=True)
class Objective:
    """Describe the objective, the cost of a milestone or a value of a metric.

    Args:
        milestone: a milestone of the run's summary; a lower ``cost`` is better, and a run without it is pruned.
        cost: ``gradient_evaluations``, ``optimizer_steps`` or ``epoch``.
        fallback_metric: validation metric that decides the winner of an optimizer of which no trial reached the
            milestone; ``None`` leaves such an optimizer without a winner.
        metric: instead of a milestone, a validation metric of the summary, such as ``val/accuracy``.
        statistic: ``best`` or ``last`` of that metric.
        direction: ``minimize`` or ``maximize`` it.

    Raises:
        ValueError: both or neither of ``milestone`` and ``metric``, ``fallback_metric`` without a milestone, or a value
            that is not one of those named.
    """

    milestone: str | None = None
    cost: str = "gradient_evaluations"
    fallback_metric: str | None = None
    metric: str | None = None
    statistic: str = "best"
    direction: Literal["minimize", "maximize"] = "minimize"

    def __post_init__(self) -> None:
        if (self.milestone is None) == (self.metric is None):
            raise ValueError("objective needs either a milestone or a metric")
        for name, allowed in (
            ("cost", ("gradient_evaluations", "optimizer_steps", "epoch")),
            ("statistic", ("best", "last")),
            ("direction", ("minimize", "maximize")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"objective: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.milestone is not None and self.direction != "minimize":
            raise ValueError("objective: the cost of a milestone is minimized")
        if self.fallback_metric is not None and self.milestone is None:
            raise ValueError("objective: fallback_metric needs a milestone")

    def value(self, summary: dict[str, Any]) -> float | None:
        """Return the objective's value; ``None`` if the milestone was not reached.

        Raises:
            KeyError: the run has no such milestone or metric. The message lists those it has.
        """
        if self.milestone:
            return self._read(summary, "milestones", self.milestone, self.cost)
        return self._read(summary, "metrics", str(self.metric), self.statistic)

    def fallback_value(self, summary: dict[str, Any]) -> float | None:
        """Return the fallback metric, negated if a lower value is better.

        It is ``None`` without a ``fallback_metric``, and for a run that diverged, whose summary is empty.

        Raises:
            KeyError: as :meth:`value`.
        """
        if self.fallback_metric is None or not summary:
            return None
        found = self._read(summary, "metrics", self.fallback_metric, "best")
        entry = summary["metrics"][self.fallback_metric]
        # Older summaries do not say it.
        lower = entry.get("lower_is_better", self.fallback_metric.endswith(("loss", "perplexity", "bits_per_byte")))
        return -found if found is not None and lower else found

    @staticmethod
    def _read(summary: dict[str, Any], part: str, name: str, field: str) -> float | None:
        if name not in summary.get(part, {}):
            raise KeyError(f"the run has no {part[:-1]} {name}: it has {', '.join(summary.get(part, {})) or 'none'}")
        found = summary[part][name][field]
        return None if found is None else float(found)

    def __str__(self) -> str:
        if self.milestone:
            return f"{self.cost.replace('_', ' ')} to {self.milestone}"
        return f"{self.statistic} {self.metric}"


@dataclass(frozen=True)
class Sweep:
    """Specify a sweep.

    Args:
        name: of the sweep, a folder's name.
        trials: for every optimizer, at least 1; a power of two keeps the points balanced.
        sequence_seed: of the scrambled Sobol sequence that every optimizer takes its points from.
        own_sequences: whether every optimizer has a sequence of its own, seeded by ``sequence_seed`` and its name. One
            lucky point of a shared sequence (default) can decide several rows at once.
        trial_seed: the seed of every trial's run.
        final_seeds: fresh seeds that each winner is run with.
        rejudged: number of each optimizer's best trials that run again on the ``rejudge_seeds``. The best mean of the
            objective over all these seeds wins. 0 (default): the best trial wins.
        rejudge_seeds: seeds for them.
        seeded: the options that take a run's seed.
        objective: how trials are ranked.
        optimizers: the specifications by name.
        common: options of every run as a config, nested; rules that stop a run early belong here.
        final: additional options of the winners' runs, nested, such as a larger budget.
        early_stop_factor: a trial ends in the epoch in which it has spent this many times the gradient evaluations
            of the best trial of its optimizer so far; at least 1, so that no winner is lost. ``None`` (default): only
            ``common`` ends a trial.

    Raises:
        ValueError: a name is not valid for a folder, ``trials`` is below 1, a seed is below 0, a final seed is one of
            the trials, only one of ``rejudged`` and ``rejudge_seeds`` is given, or ``early_stop_factor`` is below 1 or
            lacks a milestone counted in gradient evaluations.
    """

    name: str
    trials: int
    sequence_seed: int
    trial_seed: int
    final_seeds: tuple[int, ...]
    seeded: tuple[str, ...]
    objective: Objective
    optimizers: dict[str, OptimizerSpec]
    common: dict[str, Any]
    final: dict[str, Any]
    early_stop_factor: float | None = None
    own_sequences: bool = False
    rejudged: int = 0
    rejudge_seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (self.name, *self.optimizers):
            if not re.fullmatch(r"[^\s/\\][^/\\]*", name) or name in (".", ".."):
                raise ValueError(f"the name of a sweep or optimizer must be valid for a folder, got {name!r}")
        if self.trials < 1:
            raise ValueError(f"trials must be an integer of at least 1, got {self.trials}")
        if min(self.sequence_seed, self.trial_seed, *self.final_seeds, *self.rejudge_seeds) < 0:
            raise ValueError("sequence_seed, trial_seed, rejudge_seeds and final_seeds must be at least 0")
        if (self.rejudged > 0) != bool(self.rejudge_seeds) or self.rejudged < 0:
            raise ValueError("give rejudged, at least 1, together with rejudge_seeds")
        if self.trial_seed in self.rejudge_seeds:
            raise ValueError(f"rejudge_seeds must differ from the seed of the trials, {self.trial_seed}")
        if used := {self.trial_seed, *self.rejudge_seeds} & {*self.final_seeds}:
            raise ValueError(f"final_seeds must be fresh, but {min(used)} is a seed of the trials")
        if self.early_stop_factor is not None:
            if self.objective.milestone is None or self.objective.cost != "gradient_evaluations":
                raise ValueError("early_stop_factor needs an objective of gradient_evaluations to a milestone")
            if self.early_stop_factor < 1:
                raise ValueError(f"early_stop_factor must be at least 1, got {self.early_stop_factor}")

    def points(self, optimizer: str) -> list[dict[str, Any]]:
        """Return the options of the trials of ``optimizer``, in order.

        Its first searched option takes the first coordinate of the sequence, and so on.
        """
        space, seed = self.optimizers[optimizer].space, self.sequence_seed
        dimensions = max(len(spec.space) for spec in self.optimizers.values())
        if self.own_sequences:
            # Independent of the other rows, so that a row can be added to a sweep that has begun.
            seed = int.from_bytes(hashlib.sha256(f"{seed} {optimizer}".encode()).digest()[:8])
            dimensions = len(space)
        sequence = qmc.Sobol(dimensions, scramble=True, rng=seed)
        units = sequence.random_base2((self.trials - 1).bit_length())[: self.trials]
        return [{name: d.at(u) for (name, d), u in zip(space.items(), unit, strict=False)} for unit in units]


# Keys of earlier sweep files.
_FORMER_KEYS = {"otherwise": "fallback_metric", "give_up_at": "early_stop_factor"}
_NAMES = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string", dict: "a mapping"}


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value has the type of a dataclass field."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is UnionType:
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _named(kind: Any) -> str:
    """Return the name of a type for error messages."""
    if get_origin(kind) is UnionType:
        return " or ".join(_named(one) for one in get_args(kind) if one is not type(None))
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return "a list" if item is Any else f"a list, each {_named(item)}"
    return _NAMES.get(get_origin(kind) or kind, "another value")


def _converted(value: Any, kind: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and float in get_args(kind) and re.fullmatch(r"[-+.\d]+[eE][-+]?\d+", value):
        return float(value)  # YAML 1.1 reads 1e-4 as text, and only 1.0e-4 as a number
    return value


def _build(kind: type, content: Any, where: str) -> Any:
    """Build a dataclass from a mapping, with errors that name the key."""
    if isinstance(content, dict):
        content = {_FORMER_KEYS.get(key, key): value for key, value in content.items()}
    types = {field.name: field.type for field in fields(kind)}
    allowed = list(types)
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a mapping with the keys {', '.join(allowed)}, got {content!r}")
    if unknown := set(content) - set(allowed):
        raise ValueError(f"{where}: unknown key {min(unknown, key=str)!r}; valid keys are {', '.join(allowed)}")
    values = {key: _converted(value, types[key]) for key, value in content.items()}
    for key, value in values.items():
        if not _fits(value, types[key]):
            shown = "null" if value is None else repr(content[key])
            raise ValueError(f"{where}: {key} must be {_named(types[key])}, got {shown}")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        text = str(error).partition("__init__() ")[2] or str(error)
        raise ValueError(f"{where}: {text}") from error


def read(path: Path) -> Sweep:
    """Read and check a sweep's file.

    Raises:
        ValueError: the file is invalid. The message names the place.
        OSError: the file cannot be read.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("optimizers"), dict) or not content["optimizers"]:
        raise ValueError(f"{path}: a sweep needs 'optimizers', a mapping from names to their configs and space")
    specs = {}
    for name, item in content["optimizers"].items():
        where = f"{path}: optimizers.{name}"
        if not isinstance(item, dict) or not isinstance(item.get("space"), dict) or not item["space"]:
            raise ValueError(f"{where} needs 'space', a mapping from options to their ranges or choices")
        space = {key: _build(Dimension, d, f"{where}.space.{key}") for key, d in item["space"].items()}
        specs[name] = _build(OptimizerSpec, {"options": {}, **item, "space": space}, where)
        for config in specs[name].configs:
            if not Path(config).is_file():
                raise ValueError(f"{where}: there is no config {config}")
    objective = _build(Objective, content.get("objective"), f"{path}: objective")
    defaults: dict[str, Any] = {"sequence_seed": 0, "trial_seed": 1000, "final_seeds": [], "common": {}, "final": {}}
    defaults["seeded"] = ["seed_everything"]
    complete = {**defaults, **content, "optimizers": specs, "objective": objective}
    sweep: Sweep = _build(Sweep, complete, str(path))
    return sweep
