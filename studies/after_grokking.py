"""Train tuned winners on after they reach 99 % validation accuracy, and measure whether they keep it.

    python -m studies.after_grokking run --workers 2    # continues where it was stopped
    python -m studies.after_grokking report             # prints the table and draws accuracy.svg

On this task networks can lose generalisation again long after they found it (arXiv 2608.07436, for Muon with AdamW on
embeddings, and for AdamW). The runs of results/grok_tuned end at 99 % and cannot show it. A row here is the winner of
one of its rows (an optimizer under a policy), on five seeds, for 2,000 epochs without a limit on gradient evaluations,
validated every five epochs. All learning rates are constant. The report has the epoch of the first validation of at
least 99 %, the share of later validations below 99 %, the most of these in succession, and the lowest and the last
accuracy after it.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from matplotlib.figure import Figure

from analysis.archive import ARCHIVE, pack
from analysis.palette import COLOURS
from analysis.runs import Run, read
from analysis.style import STYLE, on_white, svg
from analysis.tables import number
from experiment.target import Target
from studies.newton_schulz_runs import ended, options_of

FOLDER = Path("results") / "after_grokking"
PICTURE = "accuracy.svg"
STUDY = "grok_tuned"
# Both policies of each optimizer, because whether a network keeps its accuracy depends on the settings.
ROWS = {
    "base_all": "ARS2-Neo Base, all",
    "base_hidden": "ARS2-Neo Base, hidden",
    "adamw_all": "AdamW, all",
    "adamw_hidden": "AdamW, hidden",
    "muon_all": "Muon, all",
    "muon_hidden": "Muon, hidden",
}
SEEDS, EPOCHS, VALIDATED_EVERY = range(5), 2000, 5
GOAL = Target("99 %", "val/accuracy", 0.99)


@dataclass(frozen=True)
class Kept:
    """How a run kept its accuracy.

    Args:
        epoch: the first at which it validated with at least 99 %.
        below: share of the later validations below 99 %; NaN if there is none.
        longest: largest number of successive later validations below 99 %.
        lowest, last: of the later accuracies; NaN if there is none.
    """

    epoch: float
    below: float
    longest: int
    lowest: float
    last: float


def kept(run: Run) -> Kept | None:
    """Measure a run; ``None`` if it never reached 99 %."""
    first = run.reached(GOAL)
    if first is None:
        return None
    epochs, accuracy = run.curve(GOAL.metric)
    later = accuracy[epochs > first].astype(np.float32)  # in which it was measured
    if not len(later):
        return Kept(first, np.nan, 0, np.nan, np.nan)
    below = later < np.float32(GOAL.level)
    longest = max((sum(1 for _ in stretch) for is_below, stretch in groupby(below) if is_below), default=0)
    return Kept(first, float(below.mean()), longest, float(later.min()), float(later[-1]))


def config_of(row: str, folder: Path, epochs: int = EPOCHS) -> dict[str, Any]:
    """Return the complete config of a row."""
    from studies.newton_schulz_steps import winner  # imports torch

    config = winner(STUDY, row)
    milestones = {"class_path": "callbacks.milestones.GrokkingMilestones", "init_args": {"stop_at": None}}
    config["trainer"].update(max_epochs=epochs, check_val_every_n_epoch=VALIDATED_EVERY, callbacks=[milestones])
    return {**config, "experiment": row, "runs": str(folder)}


def train(folder: Path, workers: int, epochs: int = EPOCHS) -> None:
    """Run everything that has not ended; an interrupted run begins again."""
    from launch import trial
    from launch.search import run_jobs

    context = trial.server("modules.modular_addition", "datamodules.modular_addition")

    def one(row: str, seed: int, config: Path) -> None:
        arguments = ["fit", "--config", str(config), "--seed_everything", str(seed), "--data.seed", str(seed)]
        outcome = trial.run(context, arguments, folder / "logs" / f"{row}-{seed}.log")
        print(f"{row} seed {seed}: exit code {outcome.code}", flush=True)

    def jobs() -> Iterator[Any]:
        folder.mkdir(parents=True, exist_ok=True)
        for seed in SEEDS:
            for row in ROWS:
                config = folder / f"{row}.yaml"
                config.write_text(yaml.safe_dump(config_of(row, folder, epochs), sort_keys=False))
                if not ended(folder / row, seed):
                    yield partial(one, row, seed, config)

    run_jobs(jobs(), workers, lambda: None)


def table(runs: Sequence[Run]) -> str:
    """Return the table in Markdown."""
    heads = [
        "row",
        "runs",
        "reached 99 %",
        "epoch of the first 99 %",
        "later validations below 99 %",
        "most in succession",
        "lowest later accuracy",
        "last accuracy",
    ]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for row, label in ROWS.items():
        of_row = [run for run in runs if run.identity.experiment == row]
        found = [one for run in of_row if (one := kept(run)) is not None]
        cells = [
            _spread([one.epoch for one in found]),
            _spread([100 * one.below for one in found], " %"),
            _spread([one.longest for one in found]),
            _spread([100 * one.lowest for one in found], " %"),
            _spread([100 * one.last for one in found], " %"),
        ]
        lines.append(f"| {label} | {len(of_row)} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Median over seeds, with minimum and maximum in parentheses."])


def _spread(values: Sequence[float], unit: str = "") -> str:
    if not values:
        return "-"
    least, median, most = (number(float(value)) for value in np.quantile(values, [0, 0.5, 1]))
    return f"{median}{unit} ({least} to {most})"


def picture(runs: Sequence[Run]) -> Figure:
    """Draw the validation accuracy of every run, with a panel for each row."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.8), layout="constrained")
        panels = figure.subplots(len(ROWS) // 2, 2, sharex=True, sharey=True)
        for axes, (row, label) in zip(panels.flat, ROWS.items(), strict=True):
            axes.set_title(label, loc="left")
            for run in runs:
                if run.identity.experiment == row:
                    epochs, accuracy = run.curve(GOAL.metric)
                    axes.plot(epochs, 100 * accuracy, color=COLOURS[0], linewidth=0.6, alpha=0.6)
        figure.supxlabel("epoch")
        figure.supylabel("validation accuracy, %")
    return figure


def main() -> int:
    """Run, report or pack, and return the exit code."""
    options = options_of(__doc__, FOLDER)
    if options.part == "run":
        train(options.folder, options.workers)
    elif options.part == "pack":
        print(f"{pack(options.folder, options.folder / ARCHIVE)} runs")
    else:
        runs = read([options.folder])[0]
        print(table(runs))
        (options.folder / PICTURE).write_text(on_white(svg(picture(runs))), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
