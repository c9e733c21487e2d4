"""Collect the part of a report that is about one group of rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from analysis.ablation import ablations
from analysis.comparison import baseline, who_is_ahead
from analysis.curves import curves, second_passes
from analysis.flatness import flatness
from analysis.glance import at_a_glance
from analysis.pairs import pairs
from analysis.protocol import protocol_words
from analysis.results import milestones, published, results, step_cost, to_target
from analysis.robustness import robustness
from analysis.rows import Group, Row
from analysis.search_pictures import best_after, sensitivity
from analysis.settings import runs_table, settings
from analysis.study import Study
from analysis.style import add_legend, svg
from analysis.tables import Table, markdown_text
from analysis.target_pictures import ranking, reached_over_cost
from analysis.tuning_budget import searches_luck, tuning_budgets
from analysis.verdict import headlines

# Flatness measures that are drawn as curves; the others are only in the table.
PROBED = ("flatness/hessian_top", "flatness/rise_gradient")


@dataclass
class Picture:
    """A picture with its explanation.

    Attributes:
        place: where it belongs: ``first``, an axis for curves, ``target``, ``passes`` or ``search``.
        drawn: SVG without a legend of rows, which a page has once.
        caption: what every sign in it means.
        title: in words, for those who cannot see it.
        file: name for Markdown; empty for a picture that only the page has.
        standalone: SVG with a legend of rows where it needs one.
    """

    place: str
    drawn: str
    caption: str
    title: str = ""
    file: str = ""
    standalone: str = ""

    def markdown(self, folder: str) -> str:
        """Return the picture and its caption."""
        return f"![{self.title}]({folder}/{self.file})\n\n{markdown_text(self.caption)}\n"


@dataclass
class Section:
    """Collect the part of a report that is about one group.

    Attributes:
        headlines: the result in sentences.
        protocol: in sentences.
        tables: in their order, without that of the runs.
        runs: every run, with the command that repeats it.
        reference: the row that others are compared with, if any.
        anchor: its id in a page.
        every_picture: also those that only a page has, where the reader chooses the axis.
    """

    group: Group
    reference: Row | None
    headlines: list[str]
    protocol: str
    tables: list[Table]
    runs: Table
    anchor: str
    every_picture: list[Picture] = field(default_factory=list)

    @property
    def pictures(self) -> list[Picture]:
        """Those with a file."""
        return [picture for picture in self.every_picture if picture.file]


def make_section(group: Group, study: Study, index: int) -> Section:
    """Return the section of a group, the ``index``-th of its report."""
    reference = baseline(group, group.baseline or study.baseline)
    drawn = _pictures(group, reference, f"{index + 1}-{group.task}")
    words = list(headlines(group, reference)), protocol_words(group)
    return Section(
        group, reference, *words, list(_tables(group, reference)), runs_table(group), f"table-{index + 1}", list(drawn)
    )


def _tables(group: Group, reference: Row | None) -> Iterator[Table]:
    """Yield the tables of a group that have rows."""
    found, cost = results(group), to_target(group)
    tables = [
        at_a_glance(group, reference),
        published(group),
        *([found, cost] if group.measure.target is None else [cost, found]),
    ]
    tables += [] if reference is None else list(pairs(group, reference))
    tables += [who_is_ahead(group), milestones(group)]
    tables += [*ablations(group), *flatness(group), *robustness(group, reference)]
    tables += [step_cost(group, reference), *tuning_budgets(group)]
    tables += [] if reference is None else list(searches_luck(group, reference))
    tables += [settings(group)]
    yield from (table for table in tables if table is not None and table.rows)


def _pictures(group: Group, reference: Row | None, prefix: str) -> Iterator[Picture]:
    """Yield the pictures of a group in the order of the page."""
    yield from _picture("first", ranking(group, reference), _ranking_caption(group, reference), f"{prefix}-ranking.svg")
    metrics = list(dict.fromkeys((group.metric, "train/loss", "val/loss", *PROBED)))
    for axis in group.axes:
        for metric in metrics:
            # Markdown has no choice of axes, so it shows the first one, and of metrics that of the ranking.
            shown = axis == group.axes[0] and metric == group.metric
            name = f"{prefix}-curves.svg" if shown else ""
            yield from _picture(axis, curves(group, metric, axis), _CURVES, name, legend=True)
    steps = "The share of each row's seeds that had reached the target by then (Kaplan-Meier)."
    yield from _picture("target", reached_over_cost(group), steps, f"{prefix}-reached.svg", legend=True)
    for number, row in enumerate(group.rows, 1):
        yield from _picture("passes", second_passes(row), _PASSES, f"{prefix}-passes-{number}.svg")
    for search in dict.fromkeys(name for name, _ in group.sweeps):
        for number, figure in enumerate(sensitivity(group, search), 1):
            yield from _picture("search", figure, _trials_caption(group), f"{prefix}-{search}-{number}.svg")
        yield from _picture("search", best_after(group, search), _BEST, f"{prefix}-{search}-best.svg")


def _picture(place: str, figure: Figure | None, caption: str, file: str, legend: bool = False) -> Iterator[Picture]:
    if figure is None:
        return
    drawn = standalone = svg(figure)
    if file and legend:
        add_legend(figure)
        standalone = svg(figure)
    yield Picture(place, drawn, caption, str(figure.get_label()), file, standalone)


_CURVES = (
    "A thick line is the mean over seeds (geometric for losses), and ends where the first seed ends. From three seeds "
    "on the band is the pointwise 95 % interval. Up to six rows have thin lines for their seeds."
)
_PASSES = (
    "The first seed of the row: its loss, phi with the threshold below which a second pass is made, and their rate."
)
_BEST = (
    "The best among k of a row's trials, chosen at random: the median, and a band with 80 % of the choices. Grey lines "
    "are the other rows' medians. A trial that the search stopped early has no value, though it might have reached the "
    "target later, so the lines are pessimistic for small k. A line begins where half of the choices have a trial with "
    "a value."
)


def _ranking_caption(group: Group, reference: Row | None) -> str:
    measure, against = group.measure, ""
    median = None if reference is None or measure.target is None else reference.median(measure.target, measure.column)
    if reference is not None and (measure.target is None or (median is not None and median.median is not None)):
        against = f" Dashed: {reference.label}, the baseline."
    if all(len(row.runs) < 2 for row in group.rows):
        return f"A mark is the only seed of its row.{against}"
    if measure.target is None:
        return f"Small: seeds. Large: means, with 95 % intervals.{against}"
    return f"Small: seeds, hollow at the right if they missed the target. Large: medians, with intervals.{against}"


def _trials_caption(group: Group) -> str:
    missed = ""
    if group.measure.target is not None:
        missed = " A hollow one ended without reaching the target, at the evaluations that it was given."
    return (
        f"A mark is a trial.{missed} A cross at the edge is one without a finite value. Rings are around trials that "
        "were the best so far when they ran. The large mark is the best on the first seed of the trials."
    )


def count_runs(group: Group) -> int:
    """Return the number of runs in the rows of a group."""
    return sum(len(row.runs) for row in group.rows)


def captions(pictures: Sequence[Picture]) -> list[str]:
    """Return the different captions of pictures."""
    return list(dict.fromkeys(picture.caption for picture in pictures))
