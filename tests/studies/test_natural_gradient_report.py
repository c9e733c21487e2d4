import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from studies.natural_gradient import FOLDER
from studies.natural_gradient_report import Rows, by_seed, cell, interval, picture, read, save, table


def rows(seeds: int = 3) -> Rows:
    """Return known cosines, 0.1 a seed and 0.01 a step."""
    names = [("step", name) for name in ("AdamW", "ARS2 Base", "ARS2 Sync", "Muon")]
    for name in ("gradient", "Adam", "1/sqrt(diagonal Fisher)", "1/diagonal Fisher"):
        names += [("shape", name), ("shape", f"orthogonal {name}")]
    return [
        {"seed": seed, "driver": "AdamW", "step": step, "loss": 2.5, "target": target, "damping": damping}
        | {"kind": kind, "candidate": name}
        | {f"cosine_{scope}": 0.1 * seed + 0.01 * step for scope in ("all", "weights", "layer1", "layer2")}
        | {f"ratio_{scope}": 10.0**seed for scope in ("all", "weights", "layer1", "layer2")}
        for seed in range(seeds)
        for step in (1, 3)
        for target in ("natural", "newton")
        for damping in (1e-4, 1e-3)
        for kind, name in names
    ]


def test_the_interval_is_students() -> None:
    # The quantile for two degrees of freedom is 4.303, for four 2.776.
    assert interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.3027 / math.sqrt(3), rel=1e-4))
    assert interval([0.0, 0.0, 1.0, 1.0, 0.5])[1] == pytest.approx(2.7764 * 0.5 / math.sqrt(5), rel=1e-4)


def test_means_are_within_seeds_first() -> None:
    values = by_seed(rows(), "cosine_weights", kind="step", candidate="AdamW")
    assert values == [pytest.approx(0.02), pytest.approx(0.12), pytest.approx(0.22)]
    assert by_seed(rows(), "ratio_all", step=1) == [pytest.approx(seed) for seed in range(3)]
    assert by_seed(rows(), "loss", step=2) == []
    assert cell([0.02, 0.12, 0.22]) == "0.120 ± 0.248"
    assert cell([1.0, 1.0], signed=True) == "+1.000 ± 0.000"


def test_rows_come_back_from_the_file(tmp_path: Path) -> None:
    save(rows(), tmp_path / "deep/cosines.csv.gz")
    back = read(tmp_path / "deep/cosines.csv.gz")
    assert back == [
        {key: pytest.approx(value, rel=1e-3) if isinstance(value, float) else value for key, value in row.items()}
        for row in rows()
    ]


def test_the_table_has_what_was_measured(tmp_path: Path) -> None:
    text = table(rows())
    assert "| step: AdamW | 0.120 ± 0.248 | 0.120 ± 0.248 |" in text
    assert "| step: ARS2 Base minus AdamW | +0.000 ± 0.000 | +0.000 ± 0.000 |" in text
    assert "| training loss | 2.500 ± 0.000 | 2.500 ± 0.000 |" in text
    picture(rows(), tmp_path / "it.png")
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def measured() -> Rows:
    return read(FOLDER / "cosines.csv.gz")


def test_the_published_table_is_that_of_the_published_numbers(measured: Rows) -> None:
    assert (FOLDER / "table.md").read_text() == table(measured)
    assert len({row["seed"] for row in measured}) >= 5


def test_the_text_agrees_with_the_numbers(measured: Rows) -> None:
    """Check the sentences of results/natural_gradient/README.md, one by one."""
    chosen: dict[tuple[Any, ...], Rows] = defaultdict(list)
    for row in measured:
        chosen[row["kind"], row["damping"], row["target"], row["candidate"]].append(row)

    def difference(
        kind: str, candidate: str, other: str, damping: float, target: str = "natural"
    ) -> tuple[float, float]:
        sides = [by_seed(chosen[kind, damping, target, name], "cosine_weights") for name in (candidate, other)]
        return interval([a - b for a, b in zip(*sides, strict=True)])

    def clear(sign: int, *pair: Any) -> None:
        """Return whether the full interval is on the side of ``sign``."""
        mean, half = difference(*pair)
        assert sign * mean > half, pair

    for damping in (1e-6, 1e-5, 1e-4):
        clear(+1, "step", "ARS2 Base", "AdamW", damping)
        clear(+1, "shape", "orthogonal Adam", "Adam", damping)
    for damping in (1e-2, 1e-1):
        clear(-1, "step", "ARS2 Base", "AdamW", damping)
        clear(-1, "shape", "orthogonal Adam", "Adam", damping)
    for damping in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        clear(-1, "shape", "orthogonal Adam", "orthogonal gradient", damping)
    for damping in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        clear(-1, "step", "ARS2 Base", "Muon", damping)
        clear(-1, "step", "ARS2 Sync", "ARS2 Base", damping)
    for damping in (1e-6, 1e-5):
        clear(+1, "shape", "orthogonal 1/sqrt(diagonal Fisher)", "orthogonal gradient", damping)
    for damping in (1e-4, 1e-3, 1e-2, 1e-1):
        clear(-1, "shape", "orthogonal Adam", "Adam", damping, "newton")
