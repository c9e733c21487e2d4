"""Judge a ceiling study: which row generalises best once the network can overfit.

    python -m studies.ceiling results/ceiling_language [results/ceiling_language_controls]
    python -m studies.ceiling results/ceiling_cifar [results/ceiling_cifar_controls]

The folder has the runs of one of configs/sweeps/ceiling_*.yaml, unpacked or in an archive. A second folder may have
those of its controls. The command writes into the first folder ``verdict.md`` (the tests stated for these studies, the
controls, further comparisons, and a table of all rows) and ``verdict.svg``.

The measure is that of the best checkpoint on the test split: perplexity, or the share of errors. Checkpoint and
settings are chosen on validation data. Rows are compared on the seeds that both have, by the ratio of the measure.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from analysis.palette import COLOURS
from analysis.results import metric_text
from analysis.runs import Run
from analysis.statistics import exponential, geometric_interval, mean_interval, paired
from analysis.style import STYLE, on_white, svg
from analysis.tables import Table, mean_text, number
from analysis.tuning_budget import luck
from studies.ceiling_rows import (
    ERROR,
    PERPLEXITY,
    Measure,
    by_family,
    family_of,
    logs,
    searched,
    tests_of,
    training_seconds,
    winners,
)

# Family and reference of the tests that configs/sweeps/ceiling_language.yaml and ceiling_cifar.yaml state as primary.
STATED = (("late", "base_averaged"), ("late", "base"), ("sync", "base"))
# Each method against Base with the settings that the method's search found (configs/sweeps/ceiling_*_controls.yaml).
# Late is also compared with the other of these, which may be a better Base than the search for Base found.
CONTROLS = (
    ("late", "base_at_late"),
    ("momentum", "base_at_momentum"),
    ("late_averaged", "averaged_at_late"),
    ("late", "base_at_momentum"),
)
# What the recommended second pass rests on, and other rows against Base with the settings of another row.
FURTHER = (
    ("late_averaged", "base_averaged"),
    ("late_averaged", "late"),
    ("late_averaged", "momentum"),
    ("base", "muon"),
    ("base_averaged", "base_at_momentum"),
    ("base_averaged", "base_at_late"),
    ("aga", "base_at_momentum"),
    ("functional", "base_at_momentum"),
    ("periodic", "base_at_momentum"),
)
NAMES = {
    "base": "Base",
    "base_averaged": "Base, averaged",
    "sync": "Sync",
    "late": "late",
    "late_averaged": "late, averaged",
    "adamw": "AdamW",
    "muon": "Muon",
    "aga": "AGA",
    "periodic": "periodic, rho grown",
    "functional": "functional late",
    "momentum": "along the momentum",
    "base_at_late": "Base (settings of late)",
    "base_at_momentum": "Base (settings of the momentum row)",
    "averaged_at_late": "Base, averaged (settings of late, averaged)",
}


def ratio(
    rows: Mapping[str, Mapping[str, Run]], family: str, reference: str, of: Callable[[Run], float], digits: int
) -> str:
    """Return the ratio of a quantity of two families: its geometric mean over common seeds, with the interval."""
    if family == reference:
        return "1"
    effect = paired(logs(rows[family], of), logs(rows.get(reference, {}), of))
    return "-" if effect is None else mean_text(exponential(effect.difference), digits)


def tested(
    title: str,
    stated: Sequence[tuple[str, str]],
    rows: Mapping[str, Mapping[str, Run]],
    measure: Measure,
    note: str,
) -> Table:
    """Return the table of the stated tests."""
    lines = [
        [
            f"{NAMES[one.family]} against {NAMES[one.reference]}",
            str(one.ratio.n),
            mean_text(one.ratio, 4),
            number(one.effect.p, 2),
            number(one.p, 2),
            one.verdict,
            ratio(rows, one.family, one.reference, training_seconds, 3),
        ]
        for one in tests_of(stated, rows, measure)
    ]
    heads = ["comparison", "seeds", f"ratio of {measure.name}", "p", "p (Holm)", "verdict", "ratio of seconds"]
    return Table(title, heads, lines, [note])


def tables(
    rows: Mapping[str, Mapping[str, Run]], budgets: Mapping[str, str], trials: Mapping[str, list[Run]], measure: Measure
) -> list[Table]:
    """Return the tables of comparisons that have any, and that of all rows, the best first."""
    comparisons = [
        (
            "Stated tests",
            STATED,
            f"Geometric mean of the ratios of {measure.name} on common seeds, with its 95 % interval; below 1 the "
            "first row is better. p is of the paired t-test of the logarithms, and p (Holm) is adjusted for the "
            f"{len(STATED)} tests stated for the studies of the ceiling, also for those whose rows did not run. The "
            "smallest effect of interest is 1 %. Rows are compared at equal gradient evaluations; the ratio of the "
            "seconds of training, without validation, says what that costs.",
        ),
        (
            "Controls",
            CONTROLS,
            "Base runs with the settings that the search of another row found. Where they are the settings of the row "
            "that it is compared with, only the method differs. These controls were added after the winners were "
            "known; p (Holm) is adjusted for them alone.",
        ),
        (
            "Further comparisons",
            FURTHER,
            "These comparisons were not stated before the first run; p (Holm) is adjusted for them alone.",
        ),
    ]
    tests = (tested(title, pairs, rows, measure, note) for title, pairs, note in comparisons)
    found = [table for table in tests if table.rows]
    lines = []
    order = sorted(rows, key=lambda name: geometric_interval([measure.of(run) for run in rows[name].values()]).mean)
    for family in order:
        runs = list(rows[family].values())
        gap = mean_interval([run.last("val/loss") - run.last("train/loss") for run in runs])
        metric = measure.metric
        found_by, base = searched(trials, family, measure), searched(trials, "base", measure)
        last_is_best = sum(run.last(metric) == run.best(metric, measure.lower) for run in runs)
        was_searched = sum(map(len, found_by)) > 1  # the one trial of a control only makes it a sweep
        lucky = mean_text(luck(found_by, base), 3) if was_searched and base and family != "base" else "-"
        lines.append(
            [
                NAMES[family],
                budgets[family],
                str(len(logs(rows[family], measure.of))),
                mean_text(geometric_interval([measure.of(run) for run in runs]), 4),
                *(ratio(rows, family, reference, measure.of, 4) for reference in ("base", "base_averaged")),
                ratio(rows, family, "base", training_seconds, 3),
                metric_text(metric, mean_interval([run.best(metric, measure.lower) for run in runs])),
                metric_text(metric, mean_interval([run.last(metric) for run in runs])),
                f"{last_is_best} of {len(runs)}",
                mean_text(gap, 3),
                lucky,
                str(sum(len(of) for row, of in trials.items() if family_of(row) == family)) if was_searched else "-",
            ]
        )
    heads = ["row", "gradient evaluations", "seeds", measure.name, "ratio to Base", "ratio to Base, averaged"]
    heads += [
        "ratio of seconds",
        f"best {measure.metric}",
        f"last {measure.metric}",
        "last is best",
        "gap of the losses",
        "ratio of the best trials",
        "trials",
    ]
    notes = [
        "Each family at its better budget, if it had two. Geometric means (test) and means (validation) over seeds, "
        "with 95 % intervals. Seeds count the runs with a test, and 'last is best' those whose last validation is the "
        "best. The gap is last validation loss minus last training loss. Trials count all budgets, and the best trials "
        "on further seeds; the settings of controls were not searched. The ratio of the best trials is that of the "
        "validated measure to Base's, on the trials' seed. Its interval has 95 % of the ratios where the trials are "
        "drawn again with replacement: the luck of the search, which the intervals over seeds do not include."
    ]
    return [*found, Table("All rows", heads, lines, notes)]


def draw(rows: Mapping[str, Mapping[str, Run]], measure: Measure) -> Figure:
    """Draw each seed's measure, and the geometric mean of each row with its interval."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.8 + 0.32 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        means = {name: geometric_interval([measure.of(run) for run in runs.values()]) for name, runs in rows.items()}
        order = sorted(rows, key=lambda name: -means[name].mean)
        for place, name in enumerate(order):
            seeds = [measure.of(run) for run in rows[name].values()]
            axes.plot(seeds, [place] * len(seeds), "o", color="#8a8f98", markersize=3, alpha=0.5, markeredgewidth=0)
            mean = means[name]
            if mean.low is not None and mean.high is not None:
                axes.plot([mean.low, mean.high], [place] * 2, color=COLOURS[0], linewidth=2.5)
            axes.plot(mean.mean, place, "o", color=COLOURS[0], markersize=5)
        axes.set_yticks(range(len(order)), [NAMES[name] for name in order])
        axes.set_ylim(-0.5, len(order) - 0.5)  # two rows would otherwise lie on the edges
        axes.set_xlabel(f"{measure.name}\n(points: seeds; bars: 95 % intervals of the mean)")
    return figure


def main() -> None:
    """Read the runs of a folder, and write the verdict beside them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="such as results/ceiling_language; then its controls")
    folders: list[Path] = parser.parse_args().folders
    folder = folders[0]
    finals, trials = winners(folders)
    if not finals:
        parser.error(f"{folder} has no runs of winners yet: continue its sweep")
    try:
        rows = by_family(finals)
    except ValueError as error:
        parser.error(str(error))
    budgets = {
        family_of(row): number(max(run.at_end("cost/gradient_evaluations") or 0.0 for run in runs.values()))
        for row, runs in finals.items()
    }
    some = next(iter(next(iter(rows.values())).values()))
    measure = ERROR if some.has("val/accuracy") else PERPLEXITY
    made = tables(rows, budgets, trials, measure)
    text = "\n\n".join(table.markdown() for table in made)
    (folder / "verdict.md").write_text(f"{text}\n", encoding="utf-8")
    (folder / "verdict.svg").write_text(on_white(svg(draw(rows, measure))), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
