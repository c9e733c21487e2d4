"""The README's picture can be drawn, and the committed one is up to date."""

import re
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from analysis.rows import Row
from analysis.runs import Run
from studies.readme_picture import AXIS, GOAL, PICTURE, ROWS, draw

ROOT = Path(__file__).parents[2]


class Drawn(Run):
    """Stand for a run of which only a curve is known."""

    def __init__(self, evaluations: list[float], accuracies: list[float]) -> None:
        self.places, self.values, self.diverged = np.asarray(evaluations), np.asarray(accuracies), False

    def curve(self, column: str, axis: str = "epoch") -> tuple[np.ndarray, np.ndarray]:
        assert (column, axis) == (GOAL.metric, AXIS)
        return self.places, self.values

    def at_end(self, axis: str) -> float:
        assert axis == AXIS
        return float(self.places[-1])


def test_the_median_is_drawn_as_far_as_the_goal_and_named_with_its_place() -> None:
    runs = {str(seed): Drawn([0, 100, end], [0.0, 0.5, 0.99]) for seed, end in enumerate((150, 200, 300))}
    figure: Figure = draw([Row(runs, "AdamW")])
    (axes,) = figure.axes
    median = axes.lines[-1]
    assert median.get_label() == "AdamW: 200"
    assert (median.get_xdata()[-1], round(median.get_ydata()[-1], 6)) == (200, 99)
    assert len(axes.lines) == 1 + 3 + 1
    assert matplotlib.rcParams["axes.spines.top"], "the style is left as it was"


def test_the_committed_picture_has_the_names_and_medians_of_the_readme() -> None:
    drawn = dict(re.findall(r">([\w -]+): (\d+)<", (ROOT / PICTURE).read_text()))
    table = re.findall(r"^\| \**([\w -]+?)\**(?: \([^)]*\))? \| \**(\d+)\** \[", (ROOT / "README.md").read_text(), re.M)
    assert list(drawn) == list(ROWS.values())
    assert drawn.items() <= dict(table).items()
