"""The package on its own: what it exports and what it imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ars2

ROOT = Path(ars2.__file__).parent
FILES = sorted(ROOT.glob("*.py"))


def test_a_fresh_import_brings_no_more_than_torch() -> None:
    script = (
        "import sys, torch; before = set(sys.modules); import ars2;"
        " print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    command = [sys.executable, "-c", script]
    brought = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, check=True).stdout.split()
    assert "ars2" in brought
    assert not {"lightning", "torchmetrics", "lightning_fabric", "torchvision", "transformers", "numpy"} & set(brought)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_import_torch_the_standard_library_and_the_package_alone(path: Path) -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            imported.add(node.module.split(".")[0])
    assert imported <= {"torch", "ars2"} | set(sys.stdlib_module_names)


def test_there_are_files_to_look_at() -> None:
    assert len(FILES) > 5


def test_what_is_exported_is_there_and_documented() -> None:
    assert set(ars2.__all__) == {"ARS2Neo", "Muon", "orthogonalize", "param_groups", "repeatable", "report"}
    assert all(getattr(ars2, name).__doc__ for name in ars2.__all__)
