"""Compare ARS2-Neo with each of its parts on and off.

The parts are flatness, geometry, energy, and the halves of energy.
Two runs are compared where they differ in one of these switches alone. The halves are Adam's scaling of each entry
before Newton-Schulz (``whitening``) and its length of the step (``scalar``).
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any, TypeAlias

import numpy as np

from analysis.results import is_share
from analysis.rows import AXIS, Group, Row
from analysis.runs import Run
from analysis.statistics import exponential, mean_interval, paired
from analysis.tables import Table, mean_text, number

Corner: TypeAlias = tuple[bool, ...]
SWITCHES = ("flatness", "geometry", "energy")
HALVES = ("whitening", "scalar")
_HALVES_OF: dict[Any, Corner] = {
    True: (True, True),
    "whitening": (True, False),
    "scalar": (False, True),
    False: (False, False),
}
_COUNT = {2: "two", 4: "four"}


def ablations(group: Group) -> Iterator[Table]:
    """Yield the effect of each switch for every complete search.

    A search is complete with all eight corners, or with all four of the halves of energy.
    Nothing where no corners have two seeds in common.
    """
    for name in dict.fromkeys(row.any.identity.sweep.name for row in group.rows if row.any.identity.sweep):
        for switches, corner in ((SWITCHES, _corner), (HALVES, _halves)):
            corners = {
                place: row
                for row in group.rows
                if (sweep := row.any.identity.sweep) is not None
                and sweep.name == name
                and (place := corner(row.any.identity.options)) is not None
            }
            if len(corners) == 2 ** len(switches):
                table = _table(group, name, switches, corners)
                if any(cell != "-" for line in table.rows for cell in line[1:]):
                    yield table


def _corner(options: Mapping[str, Any]) -> Corner | None:
    mode = options.get("model.optimizer.mode")
    others = [options.get(f"model.optimizer.{switch}", True) for switch in SWITCHES[1:]]
    if mode not in ("base", "sync") or not all(isinstance(value, bool) for value in others):
        return None
    return (mode == "sync", *others)


def _halves(options: Mapping[str, Any]) -> Corner | None:
    if options.get("model.optimizer.mode") != "base" or not options.get("model.optimizer.geometry", True):
        return None
    return _HALVES_OF.get(options.get("model.optimizer.energy", True))


def _table(group: Group, name: str, switches: tuple[str, ...], corners: dict[Corner, Row]) -> Table:
    scale = 100 if is_share(group.metric) else 1
    goal = group.goal

    def best(run: Run) -> float:
        return scale * run.best(group.metric, group.lower)

    def loss(run: Run) -> float:
        value = run.last("val/loss")
        return float(np.log(value)) if value > 0 else np.nan

    def evaluations(run: Run) -> float:
        reached = run.reached(goal, AXIS) if goal else None
        return np.nan if reached is None else float(np.log(reached))

    def top(run: Run) -> float:
        value = run.last("flatness/hessian_top")
        return float(np.log(value)) if value > 0 else np.nan

    # A metric that runs were stopped on is fixed by that, and not tested.
    stopped = any(group.stopped_on(row, group.metric) for row in corners.values())
    values: dict[str, tuple[Callable[[Run], float], bool]] = {
        f"best {group.metric}{' (points)' if scale == 100 else ''}": (best, False),
        "last val/loss, ratio": (loss, True),
    }
    kinds: dict[str, tuple[Callable[[Run], float], bool]] = {
        **({} if stopped else values),
        f"evaluations to {goal}, ratio": (evaluations, True),
        "top eigenvalue, ratio": (top, True),
    }
    lines: list[list[str]] = []
    strong = set()
    for index, switch in enumerate(switches):
        pairs = []
        for others in product((True, False), repeat=len(switches) - 1):
            on, off = ((*others[:index], value, *others[index:]) for value in (True, False))
            pairs.append((corners[on], corners[off], _words(switches, index, others)))
        strong.add(len(lines))
        lines.append([f"{switch}, mean of {_COUNT[len(pairs)]}", *_cells([pair[:2] for pair in pairs], kinds)])
        lines += [[f"{switch}, {words}", *_cells([(on, off)], kinds)] for on, off, words in pairs]
    notes = [
        "On minus off, or on over off, for pairs of corners that differ in one switch, and in the learning rate and "
        "radius that the search found for each. At equal gradient evaluations, runs with flatness have half the steps. "
        "Cells have the mean over common seeds, its 95 % interval, and the "
        "unadjusted p-value of the paired t-test. A dash marks fewer than two common seeds, or a run without the "
        "value, such as one that missed the target."
    ]
    return Table(f"Effect of each switch, in {name}", ["switch", *kinds], lines, notes, strong)


def _words(switches: tuple[str, ...], index: int, others: Corner) -> str:
    names = [switch for switch in switches if switch != switches[index]]
    return ", ".join(f"{'with' if value else 'without'} {switch}" for switch, value in zip(names, others, strict=True))


def _cells(pairs: list[tuple[Row, Row]], kinds: dict[str, tuple[Callable[[Run], float], bool]]) -> list[str]:
    cells = []
    for value, is_ratio in kinds.values():
        seeds: Any = set.intersection(*({*on.runs} & {*off.runs} for on, off in pairs))
        differences = {
            seed: float(np.mean([value(on.runs[seed]) - value(off.runs[seed]) for on, off in pairs])) for seed in seeds
        }
        test = paired(differences, dict.fromkeys(seeds, 0.0))
        if test is None or not np.isfinite(list(differences.values())).all():
            cells.append("-")
            continue
        mean = mean_interval(list(differences.values()))
        if is_ratio:
            mean = exponential(mean)
        cells.append(f"{mean_text(mean, 3)}, p {number(test.p, 2)}")
    return cells
