"""Compare rows with each other on common seeds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from analysis.labels import nearest
from analysis.rows import Group, Measure, Row
from analysis.statistics import Paired, holm, improvement, paired, pairs_ahead
from analysis.tables import Table, percent_text
from analysis.times import Race, race
from experiment.target import Target

# Rows with fewer common seeds are left unsettled.
FEWEST_SEEDS = 5
LEVEL = 0.05


def check_names(groups: Sequence[Group], wanted: str | None, targets: Sequence[Target]) -> None:
    """Refuse an unknown baseline, and a target whose metric no run has logged.

    Raises:
        ValueError: such a name, with the nearest valid one.
    """
    rows = [row for entry in groups for row in entry.rows]
    names = {name for row in rows for name in row.names}
    if wanted is not None and wanted not in names:
        raise ValueError(f"no row or optimizer is named {wanted}, the --baseline{nearest(wanted, names)}")
    metrics = {str(column) for row in rows for run in row.runs.values() for column in run.log}
    for target in targets:
        if target.metric not in metrics:
            raise ValueError(
                f"no run logged {target.metric}, the metric of a --target{nearest(target.metric, metrics)}"
            )


def baseline(group: Group, wanted: str | None) -> Row | None:
    """Return the row that others are compared with.

    Without a wanted one it is the best AdamW, or else the best row. ``None`` is returned where the wanted one is not in
    this group, or where there is nothing to compare.
    """
    if len(group.rows) < 2:
        return None
    if wanted is not None:
        return next((row for row in group.rows if wanted in row.names), None)
    return next((row for row in group.rows if row.optimizer == "adamw"), group.rows[0])


@dataclass(frozen=True)
class Comparison:
    """How a row compares with another one on their common seeds.

    Attributes:
        n: number of common seeds that both have a value for.
        found: which was first on each, for times, or the differences of a metric.
        ahead: whether the row is the better one on average.
        p: of the paired t-test of differences or of logarithms of ratios, or of the sign test where a run missed the
            target or all ratios are equal; NaN where differences do not scatter.
        adjusted: p after Holm's adjustment for all rows that are compared with the same one.
    """

    n: int
    found: Race | Paired
    ahead: bool
    p: float
    adjusted: float = np.nan


def compare(group: Group, measure: Measure, row: Row, other: Row) -> Comparison | None:
    """Compare two rows by a measure.

    ``None`` is returned for fewer than two common seeds, and where runs were stopped at a level of the metric.
    """
    if measure.target is not None:
        times = row.times(measure.target, measure.column), other.times(measure.target, measure.column)
        found = race(*times)
        ahead = found.ratio.mean < 1 if found.ratio is not None else found.first > found.second
        return Comparison(found.n, found, ahead, found.p) if found.n > 1 else None
    if any(group.stopped_on(one, measure.column) for one in (row, other)):
        return None
    pair = paired(measure.values(row), measure.values(other))
    if pair is None:
        return None
    return Comparison(pair.difference.n, pair, (pair.difference.mean < 0) == measure.lower, pair.p)


def against(group: Group, measure: Measure, reference: Row) -> dict[str, Comparison]:
    """Return the comparisons of all other rows with one, by their labels.

    Rows that cannot be compared are left out.
    """
    rows = [row for row in group.rows if row is not reference]
    found = {row.label: one for row in rows if (one := compare(group, measure, row, reference)) is not None}
    adjusted = holm([one.p for one in found.values()])
    return {label: replace(one, adjusted=p) for (label, one), p in zip(found.items(), adjusted, strict=True)}


def chance_text(measure: Measure, found: Race | Paired, row: Row, other: Row) -> str:
    """Return the probability that a run of a row is ahead of one of another.

    It is a dash where no pair is decided.
    """
    if isinstance(found, Race):
        pairs = found.pairs
    else:
        values, others = (list(measure.values(one).values()) for one in (row, other))
        pairs = pairs_ahead(values, others, measure.lower)
    return "-" if (pairs == 0.5).all() else percent_text(improvement(pairs))


def order_text(found: Race) -> str:
    """Return on how many seeds a row was first, second or neither, of all of them."""
    undecided = f", undecided on {found.undecided}" if found.undecided else ""
    return f"first on {found.first}, second on {found.second}{undecided} of {found.n}"


def common_seeds(row: Row, other: Row) -> int:
    """Return the number of seeds that both rows have."""
    return len(row.runs.keys() & other.runs.keys())


def settled(group: Group) -> tuple[np.ndarray, int]:
    """Return which pairs of rows are settled on the group's measure.

    An entry is 1 if the first row is ahead, -1 if it is behind, and 0 if the pair is not settled.
    A pair is settled if it has at least five common seeds and :attr:`Comparison.p` is below 5 % after Holm's adjustment
    for all such pairs. The second value is the number of pairs that could be tested.
    """
    rows, measure = group.rows, group.measure
    every = {(i, j): compare(group, measure, rows[i], rows[j]) for i in range(len(rows)) for j in range(i)}
    found = {place: one for place, one in every.items() if one is not None and one.n >= FEWEST_SEEDS}
    sign = np.zeros((len(rows), len(rows)), dtype=int)
    adjusted = holm([one.p for one in found.values()])
    for ((i, j), one), p in zip(found.items(), adjusted, strict=True):
        if p < LEVEL:
            sign[i, j], sign[j, i] = (1, -1) if one.ahead else (-1, 1)
    return sign, int(np.isfinite(adjusted).sum())


def who_is_ahead(group: Group) -> Table | None:
    """Return which rows each row is ahead of.

    ``None`` is returned where no pair of rows can be tested.
    """
    rows, measure = group.rows, group.measure
    sign, tested = settled(group)
    if not tested:
        return None
    lines = []
    for i, row in enumerate(rows):
        places = [[j + 1 for j in range(len(rows)) if j != i and sign[i, j] == kind] for kind in (1, -1, 0)]
        lines.append([row.label, str(i + 1), *(_places(found) for found in places)])
    rule = "the paired t-test"
    if measure.target is not None:
        rule += (
            " of the logarithms of the ratios, or the sign test where a run missed the target or all ratios are equal"
        )
    notes = [
        f"By {measure}; numbers are those of the second column. A pair of rows is settled if it has at least "
        f"{FEWEST_SEEDS} common seeds and p is below 5 % after Holm's adjustment for the {tested} pairs that could be "
        f"tested. The test is {rule}. Rows that are not settled may still differ."
    ]
    if measure.target is not None:
        notes[0] += " With few seeds the sign test cannot settle a pair, whatever its runs did."
    return Table("Which row is ahead of which", ["row", "no.", "ahead of", "behind", "not settled"], lines, notes)


def _places(numbers: Sequence[int]) -> str:
    """Return numbers as ranges, such as "1, 3 to 5"."""
    ranges: list[list[int]] = []
    for n in numbers:
        if ranges and n == ranges[-1][-1] + 1:
            ranges[-1].append(n)
        else:
            ranges.append([n])
    words = [str(r[0]) if len(r) == 1 else f"{r[0]}, {r[1]}" if len(r) == 2 else f"{r[0]} to {r[-1]}" for r in ranges]
    return ", ".join(words) or "-"
