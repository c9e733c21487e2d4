"""Say in words which row is best, by how much and how sure, and under which protocol."""

from collections.abc import Iterator, Sequence

import numpy as np

from analysis.comparison import LEVEL, common_seeds, compare_times, compare_values, settled
from analysis.labels import short_names
from analysis.results import is_share, metric_mean, metric_text
from analysis.rows import AXIS, Group, Measure, Row
from analysis.runs import AXES
from analysis.statistics import holm, scaled
from analysis.tables import mean_text, median_text, number
from experiment.quantities import count

# Rows with fewer seeds settle nothing.
FEWEST = 3
# Rows that a sentence names; of more it gives the number.
_NAMED = 3
# Options of a protocol that need no words: at these values they change nothing, or the row's data say more.
_SILENT = {"trainer.overfit_batches": 0.0, "trainer.limit_train_batches": 1.0}
# Those of samples that a language model writes, which no table has.
_SAMPLES = {"model.temperature", "model.top_k", "model.sample_tokens", "model.sample_seed"}


def sentence(group: Group, reference: Row | None) -> str:
    """State which row is best, against the reference, by how much, and how sure that is."""
    if not group.rows:
        return "There are only trials of searches, and no row."
    measure, (best, *others) = group.measure, group.rows
    value = _value(measure, best)
    if value is None:
        return f"No run reached {measure.target}." if measure.target else f"No run has a finite {measure}."
    if not others:
        return f"{best.label} is the only row. {_sentence_case(str(measure))}: {value}."
    if reference is None or reference is best:
        other, against = others[0], "the next row"
    else:
        other, against = reference, "the baseline"
    text = f"{best.label} {_what(measure)}: {value}"
    few = max(len(row.runs) for row in group.rows)
    if few < FEWEST:
        return f"{text}. At most {count(few, 'seed')} a row: nothing here is settled."
    return f"{text}. {_against(group, measure, best, other, against)}.{_rest(group, other)}"


def _what(measure: Measure) -> str:
    if measure.target is not None:
        return f"needs the fewest {AXES[measure.column]} to {measure.target}"
    extreme = "lowest" if measure.lower else "highest"
    return f"{'has' if measure.column.startswith('test/') else 'reaches'} the {extreme} {measure.column}"


def _value(measure: Measure, row: Row) -> str | None:
    if measure.target is not None:
        median = row.median(measure.target, measure.column)
        if median is None or median.median is None:
            return None
        return f"{median_text(median)}, {_of('median', median.n)}"
    mean = metric_mean(measure.column, measure.values(row))
    return None if np.isnan(mean.mean) else f"{metric_text(measure.column, mean)}, {_of('mean', mean.n)}"


def _of(kind: str, seeds: int) -> str:
    return f"{kind} of {seeds} seeds" if seeds > 1 else "from one seed"


def _sentence_case(text: str) -> str:
    return text if "/" in text.split()[0] else f"{text[0].upper()}{text[1:]}"


def _against(group: Group, measure: Measure, row: Row, other: Row, against: str) -> str:
    """Return the comparison of two rows in a sentence, with p adjusted for all rows."""
    seeds, name = count(common_seeds(row, other), "common seed"), f"{against}, {other.label}"
    others = [one for one in group.rows if one is not other]
    if measure.target is not None:
        races = {one.label: compare_times(measure, one, other) for one in others}
        found = races[row.label]
        p = _adjusted({label: each.p for label, each in races.items()}, row.label)
        if found.ratio is None:
            return f"It was first on {found.first} of {seeds} with {name} ({_p_text(p)})"
        ratio, about = mean_text(found.ratio, 3), f"({seeds}, {_p_text(p)})"
        return f"That is {ratio} times those of {name} {about}" if p < LEVEL else _alike(name, "ratio", ratio, about)
    pairs = {one.label: compare_values(group, measure, one, other) for one in others}
    pair = pairs[row.label]
    if pair is None:
        return f"It is not tested against {name}"
    p = _adjusted({label: np.nan if each is None else each.p for label, each in pairs.items()}, row.label)
    scale, unit = (100, " points") if is_share(measure.column) else (1, "")
    difference, about = scaled(pair.difference, scale), f"({seeds}, {_p_text(p)})"
    if not p < LEVEL:
        return _alike(name, "difference", f"{mean_text(difference, 3)}{unit}", about)
    size = mean_text(scaled(difference, np.sign(difference.mean)), 3)
    return f"That is {size}{unit} {'less' if difference.mean < 0 else 'more'} than {name} {about}"


def _alike(name: str, kind: str, value: str, about: str) -> str:
    return f"It cannot be distinguished from {name}: the {kind} is {value} {about}"


def _adjusted(p_values: dict[str, float], label: str) -> float:
    return dict(zip(p_values, holm(list(p_values.values())), strict=True))[label]


def _p_text(p: float) -> str:
    return "p not available" if np.isnan(p) else f"p {number(p, 2)} after Holm"


def _rest(group: Group, other: Row) -> str:
    """Return which rows the best one is not settled to be ahead of, apart from one that was named before."""
    sign, tested = settled(group)
    if not tested:
        return " Rows have too few common seeds to be tested in pairs."
    found = dict(zip((row.label for row in group.rows), sign[0], strict=True))
    others = [row.label for row in group.rows[1:]]
    unsettled = [label for label in others if found[label] == 0]
    further = [label for label in others if label != other.label]
    if not further:
        return ""
    behind = [label for label in others if found[label] < 0]
    if behind:
        return f" On common seeds it is behind: {'; '.join(behind)}."
    if not unsettled:
        return f" It is ahead of each of the {len(others)} other rows."
    if len(unsettled) == len(others):
        return " Its lead is not settled over any other row."
    if unsettled == [other.label]:
        return " It is ahead of all further rows."
    names = "; ".join(unsettled) if len(unsettled) <= _NAMED else f"{len(unsettled)} of the {len(others)} other rows"
    return f" Its lead is not settled over: {names}."


def headlines(group: Group, reference: Row | None) -> Iterator[str]:
    """Yield what the first screen says of a table: the result, and the rows that never reached the target."""
    yield sentence(group, reference)
    measure = group.measure
    if measure.target is None:
        if group.goal is not None and not group.borrowed and not measure.column.startswith("test/"):
            yield f"No run reached {group.goal}."
        return
    missed = [
        row.label
        for row in group.rows
        if all(time.reached is None for time in row.times(measure.target, measure.column).values())
    ]
    if missed and len(missed) < len(group.rows):
        yield f"Never {measure.target}: {'; '.join(missed)}."


def protocol_words(group: Group) -> str:
    """Return the protocol in sentences: network, data, validation, lengths of runs, seeds and tuning."""
    protocol = {
        key: value for key, value in group.protocol.items() if _SILENT.get(key, ()) != value and key not in _SAMPLES
    }
    parts = [f"Every run trains {_object(protocol, 'model')} on {_object(protocol, 'data')}."]
    every = group.protocol.get("trainer.check_val_every_n_epoch", 1)
    batches = [
        f"{count(int(protocol[key]), 'batch').replace('batchs', 'batches')} {of}"
        for key, of in (
            ("trainer.limit_train_batches", "an epoch"),
            ("trainer.limit_val_batches", "of the validation set"),
        )
        if isinstance(protocol.get(key), int)
    ]
    parts.append(f"It is validated every {'epoch' if every == 1 else f'{every} epochs'}{_also(batches)}.")
    if group.rows:
        parts += [_lengths(group), _effort(group)]
    return " ".join(part for part in parts if part)


def _also(batches: Sequence[str]) -> str:
    return f", with {' and '.join(batches)}" if batches else ""


def _object(protocol: dict[str, object], kind: str) -> str:
    """Return a class with its options."""
    keys = [key for key in protocol if key.startswith(f"{kind}.") and protocol[key] not in (False, 0, 0.0)]
    names = short_names(keys)
    options = ", ".join(f"{names[key].replace('_', ' ')} {_plain(protocol[key])}" for key in keys)
    name = str(protocol.get(kind, kind)).rpartition(".")[2]
    return f"{name} ({options})" if options else name


def _plain(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _lengths(group: Group) -> str:
    """Return how long runs last, what ends them, and what is tested."""
    runs = [run for row in group.rows for run in row.runs.values()]
    limits = sorted({run.limit for run in runs}, key=lambda text: (len(text), text))
    length = limits[0] if len(limits) == 1 else f"{limits[0].split()[0]} to {limits[-1]}, by row"
    stops = {run.stopped_at for run in runs} - {None}
    targets = {target.name: str(target) for target in group.targets}
    until = " or ".join(sorted(targets.get(str(stop), str(stop)) for stop in stops))
    text = f"It lasts at most {length}{f', and ends when it reaches {until}' if until else ''}"
    made = [end for run in runs if (end := run.at_end(AXIS)) is not None]
    if made:
        few, many = min(made), max(made)
        text += f". Runs made {f'{few:,.0f}' if few == many else f'{few:,.0f} to {many:,.0f}'} gradient evaluations"
    if group.measure.column.startswith("test/"):
        text += f". The checkpoint with the best {group.metric} was tested"
    return f"{text}."


def _effort(group: Group) -> str:
    """Return the number of seeds and trials of the rows."""
    seeds = sorted({len(row.runs) for row in group.rows})
    trials = sorted({row.trials or 0 for row in group.rows})
    text = f"Rows have {_range(seeds, 'seed')}"
    if trials == [0]:
        return f"{text}, and settings that were not searched here."
    return f"{text}, and settings from {_range(trials, 'trial')} each."


def _range(numbers: Sequence[int], noun: str) -> str:
    return count(numbers[0], noun) if len(numbers) == 1 else f"{numbers[0]} to {count(numbers[-1], noun)}"
