"""Every row is told apart by colour, dash and marker, also by the colour-blind."""

from itertools import combinations

import numpy as np
import pytest

from analysis.palette import COLOURS, DASHES, MARKERS, Style, styles

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
SIMULATED = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = TO_XYZ.sum(axis=1)


def linear(colour: str) -> np.ndarray:
    """Return linear RGB of a colour such as ``#0072B2``."""
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """Return CIE L*a*b* of linear RGB."""
    x = np.clip(TO_XYZ @ np.clip(rgb, 0, 1) / WHITE, 0, None)
    f = np.where(x > (6 / 29) ** 3, np.cbrt(x), x / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(colour: str, page: str) -> float:
    """Return the contrast ratio of a colour with a page, as WCAG defines it."""
    light = sorted(float(TO_XYZ[1] @ linear(one)) for one in (colour, page))
    return (light[1] + 0.05) / (light[0] + 0.05)


@pytest.mark.parametrize("vision", SIMULATED)
def test_colours_are_told_apart_by_everyone(vision: str) -> None:
    seen = [lab(np.asarray(SIMULATED[vision]) @ linear(colour)) for colour in COLOURS]
    distances = [float(np.linalg.norm(one - other)) for one, other in combinations(seen, 2)]
    # A difference of 2.3 is just noticeable side by side. Thin lines need several times that.
    assert min(distances) > 15, min(distances)


@pytest.mark.parametrize("page", ["#ffffff", "#1b1d20"])
def test_colours_stand_out_from_white_and_from_dark_pages(page: str) -> None:
    assert min(contrast(colour, page) for colour in COLOURS) > 2


def test_fourteen_rows_differ_in_marker_and_in_colour_or_dash() -> None:
    found = styles([f"row {index}" for index in range(14)])
    assert len({style.marker for style in found}) == 14
    assert len({(style.colour, str(style.dash)) for style in found}) == 14
    assert len({style.colour for style in found}) == len(COLOURS)


def test_no_two_of_35_rows_have_the_same_line() -> None:
    found = styles([str(index) for index in range(len(COLOURS) * len(DASHES))])
    assert len({(style.colour, str(style.dash)) for style in found}) == len(found) == 35
    assert len(set(MARKERS)) == len(MARKERS) == 14


def test_a_family_shares_a_colour_and_differs_in_dashes() -> None:
    families = {"AdamW": ["adamw_all", "adamw_hidden"], "Muon": ["muon_all", "muon_hidden"]}
    by_name = dict(
        zip(
            names := ["muon_all", "adamw_all", "other", "adamw_hidden", "muon_hidden"],
            styles(names, families),
            strict=True,
        )
    )
    for one, other in families.values():
        assert by_name[one].colour == by_name[other].colour
        assert by_name[one].dash != by_name[other].dash
    assert len({style.colour for style in by_name.values()}) == 3
    assert len({style.marker for style in by_name.values()}) == 5


def test_more_families_than_colours_leave_every_row_a_line_of_its_own() -> None:
    names = [f"{family}_{policy}" for family in range(9) for policy in ("all", "hidden")]
    families = {str(family): [f"{family}_all", f"{family}_hidden"] for family in range(9)}
    assert len({(style.colour, str(style.dash)) for style in styles(names, families)}) == len(names)


def test_a_style_is_given_to_lines_and_to_points() -> None:
    style = Style("#0072B2", "--", "s")
    assert style.line == {"color": "#0072B2", "linestyle": "--"}
    assert style.points == {"color": "#0072B2", "marker": "s", "linestyle": "none"}
