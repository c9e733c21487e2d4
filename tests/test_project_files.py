"""The files about the project agree with each other and with the code."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import yaml

import ars2

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text())
HOOKS = [
    hook
    for repository in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in repository["hooks"]
]


def test_the_citation_has_what_its_format_requires() -> None:
    assert CITATION["cff-version"] == "1.2.0"
    assert all(CITATION[key] for key in ("message", "title", "authors"))
    (reference,) = CITATION["references"]
    assert all(reference[key] for key in ("type", "title", "authors"))


def test_the_citation_is_of_this_version_its_authors_and_its_licence() -> None:
    assert CITATION["version"] == ars2.__version__
    assert CITATION["license"] == PROJECT["license"]
    assert [author["name"] for author in CITATION["authors"]] == [author["name"] for author in PROJECT["authors"]]


def test_the_citation_names_the_project_of_the_algorithm() -> None:
    (reference,) = CITATION["references"]
    assert reference["url"] == PROJECT["urls"]["Algorithm"]


def test_the_changelog_has_a_heading_for_this_version() -> None:
    assert re.search(rf"^## .*\b{re.escape(ars2.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_hooks_run_the_commands_of_make_lint() -> None:
    recipe = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    of_make = [shlex.split(line.split("$(RUN)")[1]) for line in recipe.splitlines()[1:]]
    of_hooks = [shlex.split(hook["entry"]) for hook in HOOKS]
    assert {command[0] for command in of_hooks} == {".venv/bin/python"}
    assert [[word for word in command[1:] if word != "--force-exclude"] for command in of_hooks] == of_make
