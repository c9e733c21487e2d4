"""Choose colour, dash and marker of every row, the same in all pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Okabe and Ito (2008), safe for the colour-blind: without black and yellow, which are lost on a dark or a white page,
# and with a violet that is as far from the others.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8A4FFF")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)), (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h", "d", "8")


@dataclass(frozen=True)
class Style:
    """Colour, dash and marker of a row."""

    colour: str = COLOURS[0]
    dash: Any = DASHES[0]
    marker: str = MARKERS[0]

    @property
    def line(self) -> dict[str, Any]:
        """As options of matplotlib's ``plot``, for a line without markers."""
        return {"color": self.colour, "linestyle": self.dash}

    @property
    def points(self) -> dict[str, Any]:
        """As options of matplotlib's ``plot``, for markers without a line."""
        return {"color": self.colour, "marker": self.marker, "linestyle": "none"}


def styles(names: Sequence[str], families: Mapping[str, Sequence[str]] | None = None) -> list[Style]:
    """Return a style for each name, no two of which are equal for the first 35.

    The first 14 differ in their markers. Names of a family share a colour as long as there are colours for the
    families, and differ in their dashes.

    Args:
        names: in their order in the tables.
        families: names that belong together, by the name of the family.
    """
    family_of = {name: family for family, members in (families or {}).items() for name in members}
    kinds = [family_of.get(name, name) for name in names]
    distinct = list(dict.fromkeys(kinds))
    if len(distinct) > len(COLOURS) or max(map(kinds.count, distinct), default=0) > len(DASHES):
        places = [(index % len(COLOURS), index // len(COLOURS)) for index in range(len(names))]
    else:
        places = [(distinct.index(kind), kinds[:index].count(kind)) for index, kind in enumerate(kinds)]
    return [
        Style(COLOURS[colour], DASHES[dash % len(DASHES)], MARKERS[index % len(MARKERS)])
        for index, (colour, dash) in enumerate(places)
    ]
