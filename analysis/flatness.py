"""Tabulate the flatness of trained networks, and its correlation with validation."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from scipy import stats

from analysis.rows import Group, Row
from analysis.runs import Run
from analysis.statistics import geometric_interval
from analysis.tables import Table, mean_text, number, quartiles_text
from experiment.quantities import count

# Columns of callbacks.flatness_probe.FlatnessProbe; of each, less is flatter.
MEASURES = {
    "flatness/hessian_top": "top eigenvalue",
    "flatness/hessian_trace": "trace",
    "flatness/rise_gradient": "rise along the gradient",
    "flatness/rise_adversarial": "rise at the optimizer's adversarial point",
    "flatness/rise_random": "rise at random",
}
_FEWEST = 5  # runs for a correlation
_PERMUTATIONS = 9999


def flatness(group: Group) -> Iterator[Table]:
    """Yield the probe's last values by row, and their correlation with validation.

    Nothing is yielded where no run was probed.
    """
    rows = [row for row in group.rows if any(run.has("flatness/hessian_top") for run in row.runs.values())]
    if not rows:
        return
    columns = {"flatness/probe_loss": "loss", **MEASURES}
    cells, geometric = [], []
    for column, name in columns.items():
        values = [[run.last(column) for run in row.runs.values()] for row in rows]
        # They scatter over powers of ten. Most can be negative too, away from a minimum.
        positive = min((value for last in values for value in last if np.isfinite(value)), default=0.0) > 0
        geometric += [name] if positive else []
        finite = [[value for value in last if np.isfinite(value)] for last in values]
        cells.append(
            [
                mean_text(geometric_interval(last), 3) if positive and last else quartiles_text(last, 3)
                for last in finite
            ]
        )
    lines = [[row.label, str(len(row.runs)), *line] for row, *line in zip(rows, *cells, strict=True)]
    notes = [
        "Flatness of the loss on a fixed training batch at the end of training: geometric mean and 95 % interval over "
        f"seeds where a column has positive values only ({', '.join(geometric) or 'none here'}), and else the median "
        "and in brackets the quartiles. "
        f"Rises are at radius {given(rows, 'FlatnessProbe', 'rho')} in every tensor. Lower is flatter. All columns "
        "change under a rescaling of the weights that leaves the network's function unchanged."
    ]
    yield Table("Flatness at the end", ["row", "seeds", *columns.values()], lines, notes)
    if (table := _with_validation(group)).rows:
        yield table


def _with_validation(group: Group) -> Table:
    """Return the rank correlations of flatness and validation."""
    sign = 1 if group.lower else -1
    kinds: dict[str, Callable[[Run], float]] = {
        f"better {group.metric}": lambda run: sign * run.last(group.metric),
        "lower val/loss": lambda run: run.last("val/loss"),
    }
    # A metric that a run was stopped on says when that was, and nothing of how good the run is.
    rows = [row for row in group.rows if not group.stopped_on(row, group.metric)]
    lines = []
    for column, name in MEASURES.items():
        cells = []
        for value in kinds.values():
            pairs = [
                np.asarray([(run.last(column), value(run)) for run in row.runs.values() if run.has(column)])
                for row in rows
            ]
            pairs = [pair[np.isfinite(pair).all(axis=1)] for pair in pairs if len(pair)]
            cells += [_over_all(pairs), _within_rows(pairs)]
        if any(cell != "-" for cell in cells):
            lines.append([name, *cells])
    heads = [head for name in kinds for head in (f"with {name}", f"with {name}, within rows")]
    notes = [
        "Rank correlations, and the number of runs. Above zero, flatter runs validate better. Over all runs "
        "(Spearman) it mixes optimizers, whose validation may differ for other reasons, and there is no p-value, "
        "because runs of one row are not independent. Within rows, values are ranked among the seeds of one row; p is "
        "of 9,999 permutations within rows, and not adjusted for the number of cells. Values are from the end of "
        "training. Rows whose runs were stopped at a level of a validation metric are left out."
    ]
    return Table("Does flatter go with better?", ["flatter by", *heads], lines, notes)


def _over_all(pairs: Sequence[np.ndarray]) -> str:
    values = np.concatenate(pairs) if pairs else np.empty((0, 2))
    if len(values) < _FEWEST or np.ptp(values, axis=0).min() == 0:
        return "-"
    return f"{stats.spearmanr(values[:, 0], values[:, 1]).statistic:+.2f} ({count(len(values), 'run')})"


def _within_rows(pairs: Sequence[np.ndarray]) -> str:
    """Return the correlation of ranks among the seeds of each row.

    Its p-value is of permutations within rows.
    """
    ranks = [stats.rankdata(pair, axis=0) - (len(pair) + 1) / 2 for pair in pairs if len(pair) > 1]
    x, y = np.concatenate(ranks).T if ranks else np.empty((2, 0))
    if len(x) < _FEWEST or not x.any() or not y.any():
        return "-"
    generator, scale = np.random.default_rng(0), np.sqrt((x**2).sum() * (y**2).sum())
    drawn = np.zeros(_PERMUTATIONS)
    for rank in ranks:
        drawn += generator.permuted(np.tile(rank[:, 0], (_PERMUTATIONS, 1)), axis=1) @ rank[:, 1]
    as_large = (np.abs(drawn) >= abs(x @ y) - 1e-9).sum()
    p = (1 + as_large) / (1 + _PERMUTATIONS)
    return f"{x @ y / scale:+.2f} ({count(len(x), 'run')}, p {number(p, 2)})"


def given(rows: Iterable[Row], probe: str, option: str) -> str:
    """Return the values of a probe's option in the configs of ``rows``, in words."""
    callbacks = [
        callback
        for row in rows
        for run in row.runs.values()
        for callback in run.identity.options.get("trainer.callbacks") or []
        if str(callback.get("class_path", "")).endswith(f".{probe}")
    ]
    return " or ".join(sorted({number(float(one["init_args"][option])) for one in callbacks})) or "unknown"
