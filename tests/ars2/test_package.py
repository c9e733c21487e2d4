"""Check what the package exports, imports and installs."""

import ast
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import ars2

ROOT = Path(ars2.__file__).parent
FILES = sorted(ROOT.glob("*.py"))
# What a file for another library may import too. No other file imports it.
EXTRAS = {"lightning": {"lightning", "torchmetrics"}, "transformers": {"transformers", "accelerate"}}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_import_only_torch_the_standard_library_and_the_package(path: Path) -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            imported.add(node.module.split(".")[0])
            assert node.module not in {f"ars2.{name}" for name in EXTRAS}
            assert node.module != "ars2" or EXTRAS.keys().isdisjoint(alias.name for alias in node.names)
    assert imported <= {"torch", "ars2"} | set(sys.stdlib_module_names) | EXTRAS.get(path.stem, set())


def test_the_files_of_the_package_are_found() -> None:
    assert len(FILES) > 5


def test_every_export_exists_and_is_documented() -> None:
    assert set(ars2.__all__) == {"ARS2Neo", "Muon", "orthogonalize", "param_groups", "repeatable", "report"}
    assert all(getattr(ars2, name).__doc__ for name in ars2.__all__)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build what ``pip install .`` installs."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT.parent / name, checkout)
    shutil.copytree(ROOT, checkout / "ars2", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_wheel('.')"]
    subprocess.run(build, cwd=checkout, capture_output=True, check=True)
    (file,) = checkout.glob("*.whl")
    return zipfile.ZipFile(file)


def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    return Parser().parsestr(wheel.read(name).decode())


def test_the_wheel_is_the_package_with_its_type_marker_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert files == {"ars2/py.typed", *(f"ars2/{path.name}" for path in FILES)}


def test_the_wheel_has_the_version_of_the_checkout(wheel: zipfile.ZipFile) -> None:
    assert metadata(wheel)["Version"] == ars2.__version__


def test_the_wheel_requires_only_torch(wheel: zipfile.ZipFile) -> None:
    required = [line for line in metadata(wheel).get_all("Requires-Dist", []) if "extra ==" not in line]
    assert [line.split(">=")[0] for line in required] == ["torch"]
