import math
import re
from pathlib import Path

import pytest

from studies.natural_gradient import FOLDER
from studies.natural_gradient_report import TITLES, Rows, by_seed, cell, interval, picture, read, save, table
from studies.small_network import SCOPES


def rows(seeds: int = 3) -> Rows:
    """Return known cosines, 0.1 a seed and 0.01 a step, and shares, 0.05 a seed."""
    names = [("step", name) for name in ("AdamW", "ARS2 Base", "ARS2 Sync", "Muon", "Muon, momentum 0.9")]
    for name in ("gradient", "Adam", "1/sqrt(diagonal Fisher)", "1/diagonal Fisher"):
        names += [("shape", name), ("shape", f"orthogonal {name}")]
    names += [("shape", "SOAP"), ("shape", "K-FAC")]
    return [
        {"seed": seed, "driver": "AdamW", "step": step, "loss": 2.5, "target": target, "damping": damping}
        | {"kind": kind, "candidate": name}
        | {f"cosine_{scope}": 0.1 * seed + 0.01 * step for scope in SCOPES}
        | {f"share_{scope}": 0.05 * seed for scope in SCOPES}
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
    assert by_seed(rows(), "share_all", step=1) == [pytest.approx(0.05 * seed) for seed in range(3)]
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
    assert "| step: AdamW | 0.050 ± 0.124 | 0.050 ± 0.124 |" in text
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


def published(measure: str, target: str, name: str) -> list[tuple[float, float]]:
    """Return mean and interval of a candidate or pair in table.md, for each damping."""
    _, _, rest = (FOLDER / "table.md").read_text().partition(f"## {TITLES[measure, target]}\n")
    tables = "".join(rest.split("\n## ")[:2])  # of candidates and of pairs
    (line,) = re.findall(rf"^\| {re.escape(name)} \|(.*)\|$", tables, re.MULTILINE)
    numbers = [tuple(map(float, cell.split(" ± "))) for cell in line.split("|")]
    return [(mean, half) for mean, half in numbers]


def sign(measure: str, pair: str, target: str = "natural") -> str:
    """Return, for each damping, + or - where the interval is on one side of 0, and 0 elsewhere."""
    values = published(measure, target, pair)
    return "".join("0" if abs(mean) <= half else "+" if mean > 0 else "-" for mean, half in values)


def test_the_numbers_in_the_texts_are_those_of_the_table() -> None:
    table_text = (FOLDER / "table.md").read_text()
    page = (FOLDER.parents[1] / "docs" / "what_did_not_work.md").read_text().partition("## The natural gradient")[2]
    texts = (FOLDER / "README.md").read_text(), page.split("\n## ")[0]
    for text in texts:
        numbers = re.findall(r"\d\.\d{3} ± \d\.\d{3}", text)
        assert numbers
        assert not [number for number in numbers if number not in table_text]


def test_the_sentences_agree_with_the_table() -> None:
    """Check the sentences of results/natural_gradient/README.md, one by one, over the dampings from 1e-6 to 1e-1."""
    assert sign("share", "shape: K-FAC minus orthogonal Adam") == "++++++"
    assert sign("share", "shape: SOAP minus orthogonal Adam") == "++++++"
    assert sign("share", "shape: orthogonal Adam minus Adam") == "++++--"
    assert sign("share", "shape: orthogonal 1/diagonal Fisher minus 1/diagonal Fisher") == "---0--"
    both = "shape: orthogonal Adam minus orthogonal gradient"
    assert (sign("share", both), sign("cosine", both)) == ("++++--", "0-----")
    assert sign("share", "step: ARS2 Base minus AdamW") == "++++--"
    assert sign("share", "step: ARS2 Base minus Muon") == "------"
    momentum = "step: ARS2 Base minus Muon, momentum 0.9"
    assert (sign("share", momentum), sign("cosine", momentum)) == ("+++++-", "0-----")
    assert sign("share", "step: ARS2 Sync minus ARS2 Base") == "------"
    gradient = published("share", "newton", "shape: gradient")
    for name in ("shape: K-FAC", "shape: Fisher by layer"):
        sides = zip(published("share", "newton", name), gradient, strict=True)
        assert [one + one_half < other - half for (one, one_half), (other, half) in sides][:4] == [True] * 4
    for pair in ("shape: orthogonal Adam minus Adam", "step: ARS2 Base minus AdamW", "step: ARS2 Base minus Muon"):
        assert sign("share", pair, "newton") == "------"
