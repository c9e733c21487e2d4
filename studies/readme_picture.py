"""Draw the README's curves of validation accuracy.

    python -m studies.readme_picture

A thin line is a run, which ends where it reached 99 %. A thick line is the median of a row's ten runs; a run that has
ended counts with its last accuracy.
"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from analysis.palette import styles
from analysis.rows import Row
from analysis.runs import Run, Target, read
from analysis.style import STYLE, on_white, svg

RESULTS = Path("results/grok_tuned")
PICTURE = Path("docs/pictures/grok_tuned_curves.svg")
# Names in the search, and in the README's table.
ROWS = {"base_all": "ARS2-Neo Base", "adamw_hidden": "AdamW", "aga_all": "ARS2-Neo AGA", "muon_hidden": "Muon"}
AXIS, GOAL, END = "cost/gradient_evaluations", Target("99 %", "val/accuracy", 0.99), 500


def draw(rows: list[Row]) -> Figure:
    """Draw the rows in their order."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.add_subplot(xlim=(0, END), ylim=(0, 102))
        axes.set_xlabel("gradient evaluations")
        axes.set_ylabel("validation accuracy, %")
        axes.axhline(100 * GOAL.level, color="#8a8f98", linewidth=0.8, linestyle=(0, (4, 3)))
        for row, style in zip(rows, styles([row.label for row in rows]), strict=True):
            curves = [run.curve(GOAL.metric, AXIS) for run in row.runs.values()]
            for x, y in curves:
                axes.plot(x, 100 * y, linewidth=0.6, alpha=0.35, **style.line)
            reached = row.median(GOAL, AXIS)
            assert reached is not None and reached.median is not None
            grid = np.arange(1, reached.median + 1)
            median = np.quantile([np.interp(grid, x, y) for x, y in curves], 0.5, axis=0, method="higher")
            axes.plot(grid, 100 * median, linewidth=2.2, **style.line, label=f"{row.label}: {reached.median:.0f}")
        axes.legend(loc="lower right", title="median evaluations to 99 %", alignment="left")
    return figure


def main() -> None:
    """Read the ten runs of each row's winner and write the picture."""
    winners: dict[str, dict[str, Run]] = {name: {} for name in ROWS}
    for run in read([RESULTS])[0]:
        sweep = run.identity.sweep
        if sweep and sweep.trial is None and sweep.optimizer in winners:
            winners[sweep.optimizer][str(run.identity.seed)] = run
    PICTURE.write_text(on_white(svg(draw([Row(runs, ROWS[name]) for name, runs in winners.items()]))))


if __name__ == "__main__":
    main()
