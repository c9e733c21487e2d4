"""Tabulate what rows are ranked by, against the baseline: the first table of a report."""

from analysis.comparison import chance_text, compare_times, compare_values
from analysis.results import is_share, metric_mean, metric_text
from analysis.rows import Group, Measure, Row
from analysis.statistics import holm, improvement, pairs_ahead, scaled
from analysis.tables import Table, mean_text, median_text, number, percent_text


def at_a_glance(group: Group, reference: Row | None) -> Table:
    """Return the measure of every row, and how it compares with the reference on common seeds."""
    measure = group.measure
    compared = {} if reference is None else _compared(group, measure, reference)
    adjusted = dict(zip(compared, holm([p for _, p, _ in compared.values()]), strict=True))
    lines = []
    for row in group.rows:
        cells = ["-"] * 3
        if row.label in compared:
            effect, _, better = compared[row.label]
            cells = [effect, number(adjusted[row.label], 2), better]
        elif row is reference:
            cells = ["baseline", "-", "-"]
        diverged = f", {row.diverged} diverged" if row.diverged else ""
        trials = "none" if row.trials is None else str(row.trials)
        lines.append([row.label, _text(measure, row), *cells, f"{len(row.runs)}{diverged}", trials])
    if reference is None:
        lines = [[*line[:2], *line[-2:]] for line in lines]
        heads = ["row", _head(measure), "seeds", "trials"]
        return Table("At a glance", heads, lines, [_note(measure, reference)], optional={"trials"})
    kind = "ratio to" if measure.target is not None else "difference to"
    unit = " (points)" if measure.target is None and is_share(measure.column) else ""
    which = "faster" if measure.target is not None else "better"
    heads = [
        "row",
        _head(measure),
        f"{kind} {reference.label}{unit}",
        "p",
        f"probability of being {which}",
        "seeds",
        "trials",
    ]
    return Table("At a glance", heads, lines, [_note(measure, reference)], optional={"trials"})


def _head(measure: Measure) -> str:
    return str(measure) if measure.target is not None or measure.column.startswith("test/") else f"best {measure}"


def _text(measure: Measure, row: Row) -> str:
    if measure.target is None:
        return metric_text(measure.column, metric_mean(measure.column, measure.values(row)))
    median = row.median(measure.target, measure.column)
    if median is None:
        return "-"
    missed = f" ({median.reached} of {median.n})" if median.reached < median.n else ""
    return median_text(median) + missed


def _compared(group: Group, measure: Measure, reference: Row) -> dict[str, tuple[str, float, str]]:
    """Return effect, p-value and probability of being better by row, for those that can be compared."""
    found = {}
    for row in group.rows:
        if row is reference:
            continue
        if measure.target is not None:
            race = compare_times(measure, row, reference)
            seeds = race.first + race.second + race.undecided
            if seeds > 1:
                order = f"first on {race.first} of {seeds}" if race.undecided < seeds else "undecided"
                effect = order if race.ratio is None else mean_text(race.ratio, 3)
                found[row.label] = effect, race.p, chance_text(race)
            continue
        pair = compare_values(group, measure, row, reference)
        if pair is not None:
            scale = 100 if is_share(measure.column) else 1
            own, others = (list(measure.values(one).values()) for one in (row, reference))
            better = improvement(pairs_ahead(own, others, measure.lower))
            found[row.label] = mean_text(scaled(pair.difference, scale), 3), pair.p, percent_text(better)
    return found


def _note(measure: Measure, reference: Row | None) -> str:
    if measure.target is not None:
        value = (
            "Median over seeds with its interval (Kaplan-Meier), and in parentheses how many seeds reached the target, "
            "if not all did."
        )
        effect = (
            " The ratio is a geometric mean over common seeds with its 95 % interval, and how often the row was first "
            "where a run missed the target. p is of the paired t-test of the logarithms, or then of the sign test"
        )
    else:
        value = "Mean over seeds with its 95 % interval."
        effect = " The difference is a mean over common seeds with its 95 % interval. p is of the paired t-test"
    if reference is None:
        return value
    return (
        f"{value}{effect}, adjusted for the number of rows by Holm's rule. The probability is that a run of the row is "
        "ahead of one of the baseline, over all pairs of runs, with a bootstrap interval unless all pairs agree."
    )
