"""Tabulate what rounding, noise and training on other data do to tested networks."""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from analysis.flatness import given
from analysis.rows import Group, Row
from analysis.statistics import bounded_interval, mean_interval, paired
from analysis.tables import Table, mean_text, number

# Columns of callbacks.robustness_probe and callbacks.forgetting_probe, and which columns to subtract from them.
_LOSSES = ("robustness/loss", "forgetting/loss_before")  # of the weights as they are
_BITS = re.compile(r"robustness/loss_(\d+)_bit")
_MEASURES: dict[str, tuple[str, str]] = {
    "rise by noise": ("robustness/loss_noise", "robustness/loss"),
    "top eigenvalue": ("robustness/hessian_top", ""),
    "rise along the gradient": ("robustness/rise_gradient", ""),
    "forgotten": ("forgetting/loss_after", "forgetting/loss_before"),
    "learned": ("forgetting/new_loss_before", "forgetting/new_loss_after"),
}


def robustness(group: Group, reference: Row | None) -> Iterator[Table]:
    """Yield the probes' values by row, and their differences to the reference by seed.

    Nothing is yielded where no run was probed in a test.
    """
    rows = [row for row in group.rows if any(run.has(column) for run in row.runs.values() for column in _LOSSES)]
    runs = [run for row in rows for run in row.runs.values()]
    bits = {int(found[1]) for run in runs for key in run.log if (found := _BITS.fullmatch(key))}
    rounded = {f"rise by {n} bits": (f"robustness/loss_{n}_bit", "robustness/loss") for n in sorted(bits, reverse=True)}
    measures = {name: pair for name, pair in (rounded | _MEASURES).items() if any(run.has(pair[0]) for run in runs)}
    if not measures:
        return
    columns = {"loss": next((column, "") for column in _LOSSES if any(run.has(column) for run in runs)), **measures}
    cells: list[list[str]] = []
    for pair in columns.values():
        values = [list(_values(row, *pair).values()) for row in rows]
        # A column of positive values scatters by factors, and its intervals should not reach below zero.
        positive = all(value > 0 for found in values for value in found if np.isfinite(value))
        cells.append([mean_text((bounded_interval if positive else mean_interval)(found), 3) for found in values])
    lines = [[row.label, str(len(row.runs)), *line] for row, *line in zip(rows, *cells, strict=True)]
    heads = ["row", "seeds", *columns]
    optional = {"seeds", "learned", *list(rounded)[:-1]}
    yield Table("Robustness of the tested checkpoint", heads, lines, [_note(rows)], optional=optional)
    if reference is None:
        return
    lines = []
    for row in rows:
        differences = [paired(_values(row, *pair), _values(reference, *pair)) for pair in measures.values()]
        if row is not reference and any(differences):
            texts = ["-" if d is None else f"{mean_text(d.difference, 3)} ({number(d.p, 2)})" for d in differences]
            lines.append([row.label, *texts])
    notes = [
        f"Differences to {reference.label} on common seeds: mean, 95 % interval and the p-value of the paired t-test, "
        "which is not adjusted for the number of tests. Except for what was learned, less is better."
    ]
    yield Table(f"Robustness against {reference.label}", ["row", *measures], lines, notes)


def _values(row: Row, column: str, subtracted: str) -> dict[str, float]:
    """Return by seed the value of a column, less that of another if one is named."""
    return {seed: run.last(column) - (run.last(subtracted) if subtracted else 0.0) for seed, run in row.runs.items()}


def _note(rows: Sequence[Row]) -> str:
    noise, radius = (given(rows, "RobustnessProbe", option) for option in ("noise", "rho"))
    steps, rate = (given(rows, "ForgettingProbe", option) for option in ("steps", "lr"))
    return (
        "Mean and 95 % interval over seeds, on the log scale where a column has positive values only. The loss is that "
        "of the first test batches. Rises are from it: by rounding the weights of every output to so many bits, and "
        f"by noise of {noise} relative to the root mean square of a tensor. Top eigenvalue and rise along the gradient "
        f"are of the training loss in evaluation mode, at radius {radius} in every tensor. Forgotten is the rise of "
        f"the test loss by {steps} steps of AdamW at learning rate {rate} on other data, and learned is the fall of "
        "the loss on the other data."
    )
