"""Say in words which row is best, by how much and how sure."""

from collections.abc import Iterator

import numpy as np

from analysis.comparison import FEWEST_SEEDS, LEVEL, against, common_seeds, order_text, settled
from analysis.results import is_share, metric_mean, metric_text
from analysis.rows import Group, Measure, Row
from analysis.runs import AXES
from analysis.statistics import scaled
from analysis.tables import mean_text, median_text, number, p_text
from analysis.times import Race
from experiment.quantities import count

# With fewer seeds a row, nothing is compared.
FEWEST = 3
# Rows that a sentence names; of more it gives the number.
_NAMED = 3


def sentence(group: Group, reference: Row | None) -> str:
    """State which row is best, by how much, and how sure that is."""
    if not group.rows:
        return "There are only trials of searches, and no row."
    measure, (best, *others) = group.measure, group.rows
    value = _value(measure, best)
    if value is None:
        return f"No run has a finite {measure}."
    if not others:
        return f"{best.label} is the only row. {_sentence_case(str(measure))}: {value}."
    few = max(len(row.runs) for row in group.rows)
    median = None if measure.target is None else best.median(measure.target, measure.column)
    if median is not None and median.median is None:
        most = f"{best.label} did on {median.reached} of {median.n} seeds"
        return f"No row reached {measure.target} on half of its seeds; {most}."
    text = f"{best.label} {_what(measure, few)}: {value}"
    if few < FEWEST:
        return f"{text}. At most {count(few, 'seed')} a row: nothing here is settled."
    if reference is None or reference is best:
        other, comparison = (
            others[0],
            _against(group, measure, others[0], best, f"The next row, {others[0].label},", "it"),
        )
    else:
        other = reference
        comparison = _against(group, measure, best, reference, "It", f"the baseline, {reference.label}")
    return f"{text}. {comparison}.{_rest(group, other)}"


def _what(measure: Measure, seeds: int) -> str:
    if measure.target is not None:
        least = "has the lowest median of" if seeds > 1 else "needs the fewest"
        return f"{least} {AXES[measure.column]} to {measure.target}"
    return f"has the {'lowest' if measure.lower else 'highest'} {'mean of ' if seeds > 1 else ''}{measure.title}"


def _value(measure: Measure, row: Row) -> str | None:
    if measure.target is not None:
        median = row.median(measure.target, measure.column)
        if median is None:
            return None
        reached = f", reached by {median.reached} of {median.n}" if median.reached < median.n else ""
        return f"{median_text(median)}, {_over(median.n)}{reached}"
    mean = metric_mean(measure.column, measure.values(row))
    return None if np.isnan(mean.mean) else f"{metric_text(measure.column, mean)}, {_over(mean.n)}"


def _over(seeds: int) -> str:
    return f"over {seeds} seeds" if seeds > 1 else "from one seed"


def _sentence_case(text: str) -> str:
    return text if "/" in text.split()[0] else f"{text[0].upper()}{text[1:]}"


def _against(group: Group, measure: Measure, row: Row, other: Row, subject: str, name: str) -> str:
    """Return the comparison of two rows in a sentence.

    Its p is adjusted for all rows that are compared with ``other``.
    """
    one = against(group, measure, other).get(row.label)
    if one is None:
        few = common_seeds(row, other) < 2
        return (
            f"{subject} has too few seeds in common with {name}" if few else f"{subject} is not tested against {name}"
        )
    seeds = count(one.n, "common seed")
    about = f"({seeds})" if np.isnan(one.adjusted) else f"({seeds}, p {p_text(one.adjusted)} after Holm)"
    if isinstance(one.found, Race):
        if one.found.ratio is None:
            p = "" if np.isnan(one.adjusted) else f" (p {p_text(one.adjusted)} after Holm)"
            return f"{subject} was {order_text(one.found)} common seeds with {name}{p}"
        kind, value, unit = "mean ratio", one.found.ratio, ""
        cost = AXES[measure.column]
        effect = f"needs {mean_text(value, 3)} times {f'its {cost}' if name == 'it' else f'the {cost} of {name}'}"
    else:
        kind, unit = "difference", " points" if is_share(measure.column) else ""
        value = scaled(one.found.difference, 100 if unit else 1)
        size = mean_text(scaled(value, np.sign(value.mean) or 1), 3)
        effect = f"has {size}{unit} {'less' if value.mean < 0 else 'more'} than {name}"
    if np.isnan(one.adjusted):
        if isinstance(one.found, Race):
            return f"{subject} needed as many {AXES[measure.column]} as {name} on each of {seeds}"
        if value.mean == 0:
            return f"{subject} has the same value as {name} on each of {seeds}"
        return f"{subject} differs from {name} by {number(value.mean, 3)}{unit} on each of {seeds}"
    if one.adjusted < LEVEL:
        return f"{subject} {effect} {about}"
    return f"{subject} cannot be distinguished from {name}: the {kind} is {mean_text(value, 3)}{unit} {about}"


def _rest(group: Group, other: Row) -> str:
    """Return over which rows the lead of the best one is not settled.

    ``other`` was named before.
    """
    sign, tested = settled(group)
    if not tested:
        rows = group.rows
        most = max(common_seeds(one, another) for i, one in enumerate(rows) for another in rows[:i])
        return f" With {count(most, 'common seed')}, no lead counts as settled." if most < FEWEST_SEEDS else ""
    found = dict(zip((row.label for row in group.rows), sign[0], strict=True))
    others = [row.label for row in group.rows[1:]]
    unsettled = [label for label in others if found[label] == 0]
    behind = [label for label in others if found[label] < 0]
    if behind:
        return f" On common seeds it is behind {_list(behind, len(others))}."
    if len(others) < 2:
        return ""
    if not unsettled:
        return f" {group.rows[0].label} is ahead of each of the {len(others)} other rows."
    if len(unsettled) == len(others):
        return " No lead over another row is settled."
    if unsettled == [other.label]:
        return f" {group.rows[0].label} is ahead of the {count(len(others) - 1, 'further row')}."
    if len(unsettled) == 1:
        return f" The lead over {unsettled[0]} is not settled."
    return f" The lead is not settled over {_list(unsettled, len(others))}."


def _list(labels: list[str], of: int) -> str:
    """Return labels, which may have commas themselves, or their number."""
    return f"{len(labels)} of the {of} other rows" if len(labels) > _NAMED else "; ".join(labels)


def headlines(group: Group, reference: Row | None) -> Iterator[str]:
    """Yield the result in words, and the rows that never reached the target."""
    yield sentence(group, reference)
    measure = group.measure
    if measure.target is None:
        if group.goal is not None and not group.borrowed and not measure.tested:
            yield f"No run reached {group.goal}."
        return
    times = {row.label: row.times(measure.target, measure.column).values() for row in group.rows}
    missed = [label for label, found in times.items() if found and all(time.reached is None for time in found)]
    if missed:
        yield f"No run of these rows reached {measure.target}: {'; '.join(missed)}."
