"""Every folder imports only from the floors below it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each folder may import of the others, as the map in docs/house.md states it; a module or a whole folder.
MAP = (ROOT / "docs/house.md").read_text(encoding="utf-8").split("Three commands")[0]
ALLOWED = {
    folder: set(re.findall(r"`([\w.]+)`", cell))
    for folder, cell in re.findall(r"^\| `(\w+)/` \| .* \| (.*?) ?\|$", MAP, re.M)
}
# The map lists examples among the folders that no other imports.
ALLOWED["examples"] = {"ars2", "datamodules", "modules"}


def imports(folder: str) -> set[str]:
    """Return what the files of a folder import from the others, as modules and names in them."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name for name in names if name.partition(".")[0] in ALLOWED.keys() - {folder}}
    return found


def is_in(name: str, allowed: set[str]) -> bool:
    return any(f"{name}.".startswith(f"{part}.") for part in allowed)


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_folder_imports_what_the_map_allows(folder: str) -> None:
    assert len(ALLOWED) == 10
    found = imports(folder)
    assert {name for name in found if not is_in(name, ALLOWED[folder])} == set()
    # The map names no import that does not exist.
    assert {part for part in ALLOWED[folder] if not any(is_in(name, {part}) for name in found)} == set()


def test_no_two_folders_import_each_other_in_a_circle() -> None:
    folders = {folder: {part.partition(".")[0] for part in below} for folder, below in ALLOWED.items()}
    floors, placed = 0, set[str]()
    while placed != ALLOWED.keys():
        floor = {folder for folder, below in folders.items() if below <= placed} - placed
        assert floor, ALLOWED.keys() - placed
        placed |= floor
        floors += 1
    assert floors <= 5


def test_every_folder_of_code_has_its_floor() -> None:
    assert {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests", "docs"} <= ALLOWED.keys()
