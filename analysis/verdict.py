"""Say in words which row is best, by how much and how sure."""

from collections.abc import Iterator

import numpy as np

from analysis.comparison import FEWEST_SEEDS, LEVEL, against, common_seeds, settled
from analysis.results import is_share, metric_mean, metric_text
from analysis.rows import Group, Measure, Row
from analysis.runs import AXES
from analysis.statistics import scaled
from analysis.tables import mean_text, median_text, number
from analysis.times import Race
from experiment.quantities import count

# Rows with fewer seeds settle nothing.
FEWEST = 3
# Rows that a sentence names; of more it gives the number.
_NAMED = 3


def sentence(group: Group, reference: Row | None) -> str:
    """State which row is best, against the reference, by how much, and how sure that is."""
    if not group.rows:
        return "There are only trials of searches, and no row."
    measure, (best, *others) = group.measure, group.rows
    value = _value(measure, best)
    if value is None:
        return f"No run has a finite {measure}."
    if not others:
        return f"{best.label} is the only row. {_sentence_case(str(measure))}: {value}."
    if reference is None or reference is best:
        other, name = others[0], f"the next row, {others[0].label}"
    else:
        other, name = reference, f"the baseline, {reference.label}"
    text = f"{best.label} {_what(measure)}: {value}"
    few = max(len(row.runs) for row in group.rows)
    if few < FEWEST:
        return f"{text}. At most {count(few, 'seed')} a row: nothing here is settled."
    return f"{text}. {_against(group, measure, best, other, name)}.{_rest(group, other)}"


def _what(measure: Measure) -> str:
    if measure.target is not None:
        return f"needs the fewest {AXES[measure.column]} to {measure.target}"
    extreme = "lowest" if measure.lower else "highest"
    return f"{'has' if measure.column.startswith('test/') else 'reaches'} the {extreme} {measure.column}"


def _value(measure: Measure, row: Row) -> str | None:
    if measure.target is not None:
        median = row.median(measure.target, measure.column)
        if median is None:
            return None
        reached = f", reached by {median.reached} of {median.n}" if median.reached < median.n else ""
        return f"{median_text(median)}, {_of('median', median.n)}{reached}"
    mean = metric_mean(measure.column, measure.values(row))
    return None if np.isnan(mean.mean) else f"{metric_text(measure.column, mean)}, {_of('mean', mean.n)}"


def _of(kind: str, seeds: int) -> str:
    return f"{kind} of {seeds} seeds" if seeds > 1 else "from one seed"


def _sentence_case(text: str) -> str:
    return text if "/" in text.split()[0] else f"{text[0].upper()}{text[1:]}"


def _against(group: Group, measure: Measure, row: Row, other: Row, name: str) -> str:
    """Return the comparison of two rows in a sentence, with p adjusted for all rows."""
    one = against(group, measure, other).get(row.label)
    if one is None:
        few = common_seeds(row, other) < 2
        return f"It has too few seeds in common with {name}" if few else f"It is not tested against {name}"
    about = f"({count(one.n, 'common seed')}, p {number(one.adjusted, 2)} after Holm)"
    if isinstance(one.found, Race):
        if one.found.ratio is None:
            p = "" if np.isnan(one.adjusted) else f" (p {number(one.adjusted, 2)} after Holm)"
            return f"It was first on {one.found.first} of {count(one.n, 'common seed')} with {name}{p}"
        kind, value, unit = "ratio", one.found.ratio, ""
        text = f"That is {mean_text(value, 3)} times those of {name} {about}"
    else:
        kind, unit = "difference", " points" if is_share(measure.column) else ""
        value = scaled(one.found.difference, 100 if unit else 1)
        size = mean_text(scaled(value, np.sign(value.mean) or 1), 3)
        text = f"That is {size}{unit} {'less' if value.mean < 0 else 'more'} than {name} {about}"
    if np.isnan(one.adjusted):
        return f"The {kind} to {name} is {number(value.mean, 3)}{unit} on all of {count(one.n, 'common seed')}"
    return text if one.adjusted < LEVEL else _alike(name, kind, f"{mean_text(value, 3)}{unit}", about)


def _alike(name: str, kind: str, value: str, about: str) -> str:
    return f"It cannot be distinguished from {name}: the {kind} is {value} {about}"


def _rest(group: Group, other: Row) -> str:
    """Return which rows the best one is not settled to be ahead of, apart from one that was named before."""
    sign, tested = settled(group)
    if not tested:
        rows = group.rows
        most = max(common_seeds(one, another) for i, one in enumerate(rows) for another in rows[:i])
        return " Rows have too few common seeds to be tested in pairs." if most < FEWEST_SEEDS else ""
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
    times = {row.label: row.times(measure.target, measure.column).values() for row in group.rows}
    missed = [label for label, found in times.items() if found and all(time.reached is None for time in found)]
    if missed:
        yield f"Never {measure.target}: {'; '.join(missed)}."
