"""Compare rows with each other on common seeds."""

from collections.abc import Sequence

import numpy as np

from analysis.labels import nearest
from analysis.rows import Group, Measure, Row
from analysis.statistics import Paired, holm, paired
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


def compare_times(measure: Measure, row: Row, other: Row) -> Race:
    """Return which of two rows needed less for the target of ``measure``."""
    assert measure.target is not None
    return race(row.times(measure.target, measure.column), other.times(measure.target, measure.column))


def compare_values(group: Group, measure: Measure, row: Row, other: Row) -> Paired | None:
    """Return the differences of a metric between two rows.

    ``None`` is returned for fewer than two common seeds, and where runs were stopped at a level of it.
    """
    if any(group.stopped_on(one, measure.column) for one in (row, other)):
        return None
    return paired(measure.values(row), measure.values(other))


def chance_text(found: Race) -> str:
    """Return the probability of being faster; a dash where no pair of runs is decided."""
    return "-" if (found.pairs == 0.5).all() else percent_text(found.ahead)


def common_seeds(row: Row, other: Row) -> int:
    """Return the number of seeds that both rows have."""
    return len(row.runs.keys() & other.runs.keys())


def settled(group: Group) -> tuple[np.ndarray, int]:
    """Return for each pair of rows 1 if the first is ahead on the group's measure, -1 if behind, 0 if not settled.

    A pair is settled if it has at least five common seeds and p is below 5 % after Holm's adjustment for all such
    pairs. For times p is that of :attr:`analysis.times.Race.p`, and for a metric that of the paired t-test.

    The second value is the number of pairs that could be tested.
    """
    rows, measure = group.rows, group.measure
    found = {
        (i, j): _tested(group, measure, rows[i], rows[j])
        for i in range(len(rows))
        for j in range(i)
        if common_seeds(rows[i], rows[j]) >= FEWEST_SEEDS
    }
    sign = np.zeros((len(rows), len(rows)), dtype=int)
    adjusted = holm([p for p, _ in found.values()])
    for ((i, j), (_, ahead)), p in zip(found.items(), adjusted, strict=True):
        if p < LEVEL:
            sign[i, j], sign[j, i] = (1, -1) if ahead else (-1, 1)
    return sign, int(np.isfinite(adjusted).sum())


def _tested(group: Group, measure: Measure, row: Row, other: Row) -> tuple[float, bool]:
    """Return the p-value of a pair, and whether the first row is ahead."""
    if measure.target is not None:
        found = compare_times(measure, row, other)
        return found.p, found.ratio.mean < 1 if found.ratio is not None else found.first > found.second
    pair = compare_values(group, measure, row, other)
    return (np.nan, False) if pair is None else (pair.p, (pair.difference.mean < 0) == measure.lower)


def who_is_ahead(group: Group) -> Table | None:
    """Return which rows each row is ahead of; ``None`` where no pair of rows can be tested."""
    rows, measure = group.rows, group.measure
    sign, tested = settled(group)
    if not tested:
        return None
    lines = []
    for i, row in enumerate(rows):
        places = [[j + 1 for j in range(len(rows)) if j != i and sign[i, j] == kind] for kind in (1, -1, 0)]
        lines.append([row.label, str(i + 1), *(_places(found) for found in places)])
    rule = "the paired t-test of the logarithms of the ratios, or the sign test where a run missed the target"
    notes = [
        f"By {measure}; numbers are those of the second column. A pair of rows is settled if it has at least "
        f"{FEWEST_SEEDS} common seeds and p is below 5 % after Holm's adjustment for all {tested} such pairs. "
        f"The test is {rule if measure.target is not None else 'the paired t-test'}. Rows that are not settled may "
        "still differ: with few seeds the sign test cannot settle a pair, whatever its runs did."
    ]
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
