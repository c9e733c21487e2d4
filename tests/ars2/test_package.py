"""Check what the package exports, imports and installs."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

import ars2

ROOT = Path(ars2.__file__).parent
FILES = sorted(ROOT.glob("*.py"))
FILE_NAMES = [path.name for path in FILES]
PROJECT = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
PAGE = (ROOT / "README.md").read_text()
CODE = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
# What a file for another library may import too. No other file imports it.
EXTRAS = {
    "lightning": {"lightning", "lightning_utilities", "torchmetrics"},
    "transformers": {"transformers", "accelerate"},
}


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


def names_of(extra: str) -> set[str]:
    return {Requirement(line).name for line in PROJECT["optional-dependencies"][extra]}


def test_an_extra_installs_what_its_file_imports() -> None:
    """Leave out what Lightning requires itself."""
    of_lightning = {"torchmetrics", "lightning_utilities"}
    for extra, imported in EXTRAS.items():
        assert names_of(extra) == imported - of_lightning
        assert names_of(extra) <= names_of("suite") | names_of("dev")
    required = {Requirement(line).name.replace("-", "_") for line in requires("lightning") or ()}
    assert of_lightning <= required


def test_the_extras_agree_on_versions() -> None:
    """The suite may be installed with any other extra."""
    lines = [Requirement(line) for extra in PROJECT["optional-dependencies"].values() for line in extra]
    versions = {(line.name, str(line.specifier)) for line in lines if line.name in set.union(*EXTRAS.values())}
    assert len(versions) == len({name for name, _ in versions}), versions


def built(kind: str, source: Path, into: Path) -> Path:
    """Build a wheel or an sdist of a folder; return the file."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(into)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, check=True)
    (file,) = into.iterdir()
    return file


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist of a release, from the files of a checkout that it may take."""
    checkout = tmp_path_factory.mktemp("checkout")
    for path in ROOT.parent.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, checkout)
    for folder in ("ars2", "tests/ars2", "configs", "examples", "modules"):
        shutil.copytree(ROOT.parent / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return built("sdist", checkout, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build the wheel from the sdist, as installers do."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    return zipfile.ZipFile(built("wheel", source, tmp_path_factory.mktemp("wheel")))


def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    return Parser().parsestr(wheel.read(name).decode())


def test_the_sdist_is_the_package_and_what_describes_it(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()} - {""}
    files = {name for name in files if not name.startswith("ars2.egg-info") and name not in ("ars2", "PKG-INFO")}
    beside = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.cfg"}
    assert files == beside | {f"ars2/{name}" for name in ("README.md", "py.typed", *FILE_NAMES)}


def test_the_wheel_is_the_package_with_its_type_marker_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert files == {"ars2/py.typed", *(f"ars2/{name}" for name in FILE_NAMES)}
    assert all(wheel.read(name) == (ROOT.parent / name).read_bytes() for name in files)


def test_the_wheel_has_the_version_of_the_checkout(wheel: zipfile.ZipFile) -> None:
    assert metadata(wheel)["Version"] == ars2.__version__


def test_the_wheel_requires_only_torch(wheel: zipfile.ZipFile) -> None:
    required = [line for line in metadata(wheel).get_all("Requires-Dist", []) if "extra ==" not in line]
    assert [line.split(">=")[0] for line in required] == ["torch"]


def test_the_description_needs_no_file_of_the_repository(wheel: zipfile.ZipFile) -> None:
    """A package index shows no other files, so relative links would be broken."""
    description = str(metadata(wheel).get_payload())
    assert description.strip() == PAGE.strip()
    assert metadata(wheel)["Description-Content-Type"] == "text/markdown"
    targets = re.findall(r"\]\(([^)\s]*)|(?:src|href)=[\"']([^\"']*)", description)
    assert all(re.match("https?://", link or attribute) for link, attribute in targets)


def test_the_description_names_the_extras() -> None:
    assert set(re.findall(r"ars2\[(\w+)\]", PAGE)) == set(EXTRAS)


def test_the_loop_of_the_description_learns() -> None:
    loop, *_ = CODE
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(loop, names)
    assert names["optimizer"].diagnostics()["gradient_evaluations"] == 300
    assert names["loss"].item() < 0.5 * names["targets"].var().item()


@pytest.mark.parametrize("code", CODE[1:], ids=EXTRAS)
def test_the_other_code_of_the_description_imports_what_exists(code: str) -> None:
    """Other tests train with these classes; their libraries take seconds to import."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ars2."):
            file = ROOT / f"{node.module.partition('.')[2]}.py"
            defined = {item.name for item in ast.parse(file.read_text()).body if isinstance(item, ast.ClassDef)}
            assert {alias.name for alias in node.names} <= defined


def install(file: Path, into: Path) -> None:
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--no-compile", "--quiet", "--target", str(into))
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(file)], cwd=into.parent, check=True)


def test_both_install_the_same_which_imports_only_torch(sdist: Path, wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    targets = [tmp_path / "from_sdist", tmp_path / "from_wheel"]
    for file, into in zip((sdist, Path(str(wheel.filename))), targets, strict=True):
        install(file, into)
    first, second = ({p.relative_to(t): p.read_bytes() for p in t.glob("ars2/**/*") if p.is_file()} for t in targets)
    assert first == second and len(first) > len(FILES)
    code = """
import sys, importlib.metadata, ars2
print(ars2.__file__, ars2.__version__, importlib.metadata.version("ars2"))
assert not {"lightning", "transformers", "accelerate"} & set(sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(targets[0])}
    imported = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert imported.returncode == 0, imported.stderr
    assert imported.stdout.split() == [str(targets[0] / "ars2/__init__.py"), ars2.__version__, ars2.__version__]
