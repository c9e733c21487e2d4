"""Tabulate the comparisons with one row on common seeds, by several tests."""

from collections.abc import Iterator, Sequence

from analysis.comparison import against, chance_text, common_seeds, compare
from analysis.results import GRAIN, is_share
from analysis.rows import AXIS, Group, Measure, Row
from analysis.runs import AXES
from analysis.statistics import Paired, scaled
from analysis.tables import Table, mean_text, number, p_text
from analysis.times import Race

_SIGNS = (
    "The permutation test of signs assumes no normal distribution. Neither it nor the sign test can give less than "
    "0.0625 with five seeds. With more than 13 seeds it makes 9,999 random changes of signs, and cannot give less than "
    "0.0002. "
)
_UNADJUSTED = (
    "p is adjusted for the number of rows by Holm's rule, as in the first table. The columns after it are not, and "
    "neither are the intervals. "
)
_CHANCE = (
    "all pairs of runs. A tie, or a pair that both missed, counts one half. Its interval is of the bootstrap, and at "
    "least that of as many pairs of different runs as there are seeds."
)


def pairs(group: Group, reference: Row) -> Iterator[Table]:
    """Yield the comparisons with one row on common seeds.

    One is of values of the metric, the other of the order in which rows reached the goal. Nothing is yielded where no
    row has two seeds in common with it.
    """
    others = [row for row in group.rows if row is not reference]
    if max((common_seeds(row, reference) for row in others), default=0) < 2:
        return
    measure = group.measure
    valued = measure if measure.target is None else Measure(None, group.metric, group.lower)
    table = _values_table(group, valued, others, reference)
    if any(line[2] != "-" for line in table.rows):
        yield table
    goal = group.goal
    if goal is not None and AXIS in group.axes:
        yield _times_table(group, Measure(goal, AXIS, True), others, reference)


def _values_table(group: Group, measure: Measure, others: Sequence[Row], reference: Row) -> Table:
    scale, unit = (100, " (points)") if is_share(measure.column) else (1, "")
    compared = against(group, measure, reference)
    lines = []
    for row in others:
        one = compared.get(row.label)
        if one is None or not isinstance(one.found, Paired):
            lines.append([row.label, str(common_seeds(row, reference)), *["-"] * 6])
            continue
        pair = one.found
        cells = [str(one.n), mean_text(scaled(pair.difference, scale), 3)]
        cells += [p_text(p) for p in (one.adjusted, one.p, pair.p_permutation)]
        cells += [chance_text(measure, pair, row, reference), number(scale * pair.detectable, 3)]
        lines.append([row.label, *cells])
    tests = ["t-test", "permutation test"]
    last = ["probability of being better", f"smallest detectable{unit}"]
    which = measure.title
    notes = [
        f"The {which} minus that of {reference.label}, paired by seed: mean, 95 % interval and p-values. {_UNADJUSTED}"
        f"{_SIGNS}The probability that a run of the row is better than one of the baseline is over {_CHANCE} The last "
        "column is the true difference that this many seeds, with the scatter seen here, would detect in 80 % of "
        "repetitions at the unadjusted 5 % level. A dash marks fewer than two common seeds, seeds without scatter, or "
        "runs that were stopped when a validation metric had reached a level, so that its final value is unknown."
    ]
    heads = ["row", "common seeds", f"difference{unit}", "p", *tests, *last]
    return Table(f"Paired seeds against {reference.label}: {which}", heads, lines, notes, optional={*tests, last[-1]})


def _times_table(group: Group, measure: Measure, others: Sequence[Row], reference: Row) -> Table:
    compared = against(group, measure, reference)
    further = [axis for axis in ("cost/optimizer_steps", "cost/training_seconds") if axis in group.axes]
    lines = []
    for row in others:
        one = compared.get(row.label)
        if one is None or not isinstance(one.found, Race):
            lines.append([row.label, *["-"] * (7 + len(further))])
            continue
        found = one.found
        cells = [f"{found.first} / {found.second} / {found.undecided}", _ratio(found)]
        cells += [p_text(p) for p in (one.adjusted, found.p_ratio, found.p_permutation, found.p_sign)]
        cells.append(chance_text(measure, found, row, reference))
        for axis in further:
            other = compare(group, Measure(measure.target, axis, True), row, reference)
            cells.append("-" if other is None else _ratio(other.found))
        lines.append([row.label, *cells])
    tests, ratios = ["t-test", "permutation test", "sign test"], [f"ratio of {AXES[axis]}" for axis in further]
    heads = ["row", "first / second / undecided", "ratio of evaluations", "p", *tests, "probability of being faster"]
    notes = [
        f"Gradient evaluations to {measure.target} against {reference.label}, paired by seed: how often the row was "
        "first, and the geometric mean of the ratios with its 95 % interval. Below 1 the row needs less. p is of the "
        f"t-test, or of the sign test where a run missed the target or all ratios are equal. {_UNADJUSTED}The t-test "
        "and the permutation test are of the logarithms of the ratios, the sign test of how often the row was first. "
        f"{_SIGNS}Ratios are shown only if both rows reached the target on every common seed. The probability that a "
        f"run of the row is faster than one of the baseline is over {_CHANCE} {GRAIN}"
    ]
    title = f"Paired seeds against {reference.label}: {measure.target}"
    return Table(title, [*heads, *ratios], lines, notes, optional={*tests, *ratios})


def _ratio(found: Race | Paired) -> str:
    return "-" if isinstance(found, Paired) or found.ratio is None else mean_text(found.ratio, 3)
