"""Tabulate what rows are ranked by, against the baseline."""

from collections.abc import Mapping

from analysis.comparison import Comparison, against, chance_text, order_text
from analysis.results import GRAIN, is_share, metric_mean, metric_text
from analysis.rows import Group, Measure, Row
from analysis.statistics import Paired, scaled
from analysis.tables import Table, mean_text, median_text, p_text

# With so few seeds the notes say what a p-value rests on.
_FEW = 6


def at_a_glance(group: Group, reference: Row | None) -> Table:
    """Return the measure of every row, and its comparison with the reference."""
    measure = group.measure
    compared = {} if reference is None else against(group, measure, reference)
    lines = []
    for row in group.rows:
        cells = ["-"] * 3
        if reference is not None and (one := compared.get(row.label)) is not None:
            chance = chance_text(measure, one.found, row, reference)
            cells = [_effect(measure, one), p_text(one.adjusted), chance]
        elif row is reference:
            cells = ["baseline", "-", "-"]
        lines.append([row.label, _text(measure, row), *cells, row.seeds, row.tuning])
    if reference is None:
        lines = [[*line[:2], *line[-2:]] for line in lines]
        heads = ["row", measure.title, "seeds", "trials"]
        return Table("At a glance", heads, lines, _note(measure, compared, reference), optional={"trials"})
    kind = "ratio to" if measure.target is not None else "difference to"
    unit = " (points)" if measure.target is None and is_share(measure.column) else ""
    which = "faster" if measure.target is not None else "better"
    heads = [
        "row",
        measure.title,
        f"{kind} {reference.label}{unit}",
        "p",
        f"probability of being {which}",
        "seeds",
        "trials",
    ]
    return Table("At a glance", heads, lines, _note(measure, compared, reference), optional={"trials"})


def _text(measure: Measure, row: Row) -> str:
    if measure.target is None:
        return metric_text(measure.column, metric_mean(measure.column, measure.values(row)))
    median = row.median(measure.target, measure.column)
    if median is None:
        return "-"
    missed = f" ({median.reached} of {median.n})" if median.reached < median.n else ""
    return median_text(median) + missed


def _effect(measure: Measure, one: Comparison) -> str:
    """Return the ratio or difference of a comparison.

    Where there is no ratio, it is how often the row was first.
    """
    if isinstance(one.found, Paired):
        return mean_text(scaled(one.found.difference, 100 if is_share(measure.column) else 1), 3)
    if one.found.ratio is not None:
        return mean_text(one.found.ratio, 3)
    return order_text(one.found)


def _note(measure: Measure, compared: Mapping[str, Comparison], reference: Row | None) -> list[str]:
    if measure.target is not None:
        value = (
            "Median over seeds (Kaplan-Meier; of two middle values the lower) with an interval of nominally 95 %, and "
            f"in parentheses how many seeds reached the target, if not all did. {GRAIN}"
        )
        effect = (
            "The ratio is a geometric mean over common seeds with its 95 % interval, and p is of the paired t-test of "
            "its logarithm. Where a run missed the target, the cell says how often the row was first, and p is of the "
            "sign test, as it is where all ratios are equal."
        )
    else:
        value = "Mean over seeds with its 95 % interval."
        if not measure.tested:
            value += (
                " The value of a seed is that of its best validation, and a search may have chosen the settings by the "
                "same metric, so it is optimistic."
            )
        effect = "The difference is a mean over common seeds with its 95 % interval, and p is of the paired t-test."
    if reference is None:
        return [value]
    notes = [
        f"{value} {effect} p is adjusted for the number of rows by Holm's rule; the intervals are not adjusted. The "
        "probability is that a run of the row is ahead of one of the baseline, over all pairs of runs. A tie, or a "
        "pair that both missed, counts one half. Its interval is of the bootstrap, and at least that of as many pairs "
        "of different runs as there are seeds."
    ]
    by_t_test = [one.n for one in compared.values() if isinstance(one.found, Paired) or one.found.ratio is not None]
    fewest = min(by_t_test, default=_FEW + 1)
    if fewest <= _FEW:
        notes.append(
            f"With {fewest} common seeds the t-test rests on normally distributed differences: a permutation test "
            f"could not give less than {2.0 ** (1 - fewest):g}."
        )
    return notes
