"""Every folder imports only from the floors below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each folder may import of the others.
ALLOWED = {
    "ars2": set(),
    "experiment": set(),
    "datamodules": set(),
    "modules": {"ars2", "experiment"},
    "callbacks": {"ars2", "experiment"},
    "analysis": {"experiment"},
    "launch": {"analysis", "callbacks", "datamodules", "experiment", "modules"},
    "studies": {"analysis", "ars2", "datamodules", "experiment", "launch", "modules"},
    "benchmarks": {"ars2", "callbacks", "datamodules", "launch", "modules"},
    "examples": {"ars2", "datamodules", "modules"},
}


def imports(folder: str) -> Iterator[tuple[str, str]]:
    """Return every import of another of the folders, with its file."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for package in {name.partition(".")[0] for name in names} & (ALLOWED.keys() - {folder}):
                yield package, str(path.relative_to(ROOT))


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_folder_imports_only_from_the_floors_below(folder: str) -> None:
    assert {pair for pair in imports(folder) if pair[0] not in ALLOWED[folder]} == set()


def test_no_two_folders_import_each_other_in_a_circle() -> None:
    floors, placed = 0, set[str]()
    while placed != ALLOWED.keys():
        floor = {folder for folder, below in ALLOWED.items() if below <= placed} - placed
        assert floor, ALLOWED.keys() - placed
        placed |= floor
        floors += 1
    assert floors <= 5


def test_every_folder_of_code_has_its_floor() -> None:
    assert {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests", "docs"} <= ALLOWED.keys()
