"""Describe a protocol in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from analysis.labels import short_names
from analysis.rows import AXIS, Group
from experiment.quantities import count

# Options of samples that a language model writes, which no table has.
_SAMPLES = {"model.temperature", "model.top_k", "model.sample_tokens", "model.sample_seed"}


def protocol_words(group: Group) -> str:
    """Return the protocol in sentences.

    They have the network, data, validation, lengths of runs, seeds and tuning.
    """
    protocol = {key: value for key, value in group.protocol.items() if key not in _SAMPLES}
    parts = [f"Every run trains {_object(protocol, 'model')} on {_object(protocol, 'data')}.", _validation(protocol)]
    if group.rows:
        parts += [_lengths(group), _effort(group)]
    return " ".join(parts)


def _validation(protocol: Mapping[str, Any]) -> str:
    """Return how often a run is validated, and on how much."""
    interval, every = protocol.get("trainer.val_check_interval"), protocol.get("trainer.check_val_every_n_epoch", 1)
    often = "epoch" if every == 1 else f"{every} epochs"
    if isinstance(interval, float) and interval != 1.0:
        often = f"{interval:g} epochs"
    elif isinstance(interval, int):
        often = _batches(interval)
    # A float is a share, and an integer a number of batches.
    parts = [
        f"{text} {_batches(value) if isinstance(value, int) else f'{100 * value:g} % of all batches'}"
        for key, text in (("train", "an epoch has"), ("val", "a validation has"))
        if (value := protocol.get(f"trainer.limit_{key}_batches", 1.0)) != 1.0 or isinstance(value, int)
    ]
    limits = f"; {' and '.join(parts)}" if parts else ""
    return f"It is validated every {often}{limits}."


def _batches(number: int) -> str:
    return "1 batch" if number == 1 else f"{number:,} batches"


def _object(protocol: dict[str, object], kind: str) -> str:
    """Return a class with its options."""
    keys = [key for key in protocol if key.startswith(f"{kind}.") and protocol[key] not in (False, 0, 0.0)]
    if protocol.get("data.validation") == "test":
        keys = [key for key in keys if key != "data.holdout_examples"]  # none are held out
    names = short_names(keys)
    options = ", ".join(f"{names[key].replace('_', ' ')} {_plain(protocol[key])}" for key in keys)
    name = str(protocol.get(kind, kind)).rpartition(".")[2]
    return f"{name} ({options})" if options else name


def _plain(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _lengths(group: Group) -> str:
    """Return how long runs last, what ends them, and what is tested."""
    runs = [run for row in group.rows for run in row.runs.values()]
    budgets: dict[str, list[str]] = {}
    for budget in sorted({run.budget for run in runs}, key=lambda text: (len(text), text)):
        number, unit = budget.split(" ", 1)
        budgets.setdefault(unit.removesuffix("s"), []).append(number)
    spans = [
        f"{found[0]} to {found[-1]} {unit}s" if len(found) > 1 else f"{found[0]} {unit}{'' if found[0] == '1' else 's'}"
        for unit, found in budgets.items()
    ]
    length = " or ".join(spans) + (", by row" if sum(map(len, budgets.values())) > 1 else "")
    stops = {run.stopped_at for run in runs} - {None}
    targets = {target.name: str(target) for target in group.targets}
    until = " or ".join(sorted(targets.get(str(stop), str(stop)) for stop in stops))
    text = f"It lasts at most {length}{f', and ends when it reaches {until}' if until else ''}"
    made = [end for run in runs if (end := run.at_end(AXIS)) is not None]
    if made:
        few, many = min(made), max(made)
        text += f". Runs made {f'{few:,.0f}' if few == many else f'{few:,.0f} to {many:,.0f}'} gradient evaluations"
    if group.measure.tested:
        text += f". The checkpoint with the best {group.metric} was tested"
    return f"{text}."


def _effort(group: Group) -> str:
    """Return the number of seeds and trials of the rows."""
    seeds = sorted({len(row.runs) for row in group.rows})
    trials = sorted({row.trials or 0 for row in group.rows if row.trials != 1}) or [0]
    text = f"Rows have {_range(seeds, 'seed')}"
    if trials == [0]:
        return f"{text}, and settings that were not searched here."
    return f"{text}, and settings from {_range(trials, 'trial')} each."


def _range(numbers: Sequence[int], noun: str) -> str:
    return count(numbers[0], noun) if len(numbers) == 1 else f"{numbers[0]} to {count(numbers[-1], noun)}"
