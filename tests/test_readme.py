"""The README's code and commands run as written, and all links resolve.

Links of all pages lead to files.
"""

import re
import shlex
import shutil
import subprocess
import tomllib
import venv
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from packaging.requirements import Requirement

import compare
import sweep
from tests.helpers.commands import ROOT, TINY, call

README = (ROOT / "README.md").read_text()
INDEX = (ROOT / "docs/index.md").read_text()
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
    "docs/results/index.md",
]


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)


def commands() -> dict[str, list[list[str]]]:
    """Return the words of every shell command of the README, by its program.

    ``uv run`` is left out.
    """
    found: dict[str, list[list[str]]] = {}
    for line in "".join(blocks(README, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        words = words[2:] if words[:2] == ["uv", "run"] else words
        if words:
            program = " ".join(words[: 2 if words[0] == "python" else 1])
            found.setdefault(program, []).append(words)
    return found


COMMANDS = commands()


def test_every_command_is_one_of_those_that_are_run_below() -> None:
    assert set(COMMANDS) == {
        "make",
        "source",
        "uv",
        "pip",
        "python train.py",
        "python sweep.py",
        "python compare.py",
    }


def test_commands_of_the_suite_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _, _, subcommand, *options in COMMANDS["python train.py"]:
        result = call(subcommand, *options, *TINY, "--trainer.max_epochs", "1", "--runs", tmp_path / "runs")
        assert result.code == 0, result.err
    # Beside runs/, as a person is who has trained something.
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS["python compare.py"]:
        monkeypatch.setattr("sys.argv", command[1:])
        assert compare.main() == 0
    assert (tmp_path / "report/report.html").exists()


def test_the_sweep_is_read_and_given_its_folder_and_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[Any, ...]] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which the command sets
    monkeypatch.setattr("launch.sweep_progress.run", lambda *arguments: started.append(arguments))
    for command in COMMANDS["python sweep.py"]:
        monkeypatch.setattr("sys.argv", command[1:])
        assert sweep.main() == 0
    ((specification, folder, workers),) = started
    assert (specification.name, folder, workers) == ("grok", Path("runs/grok"), 2)


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_has_a_recipe_for_every_target() -> None:
    for command in COMMANDS["make"]:
        subprocess.run([command[0], "--dry-run", *command[1:]], cwd=ROOT, capture_output=True, check=True)


def test_the_environment_is_active_after_its_command(tmp_path: Path) -> None:
    venv.create(tmp_path / ".venv", symlinks=True)
    for command in COMMANDS["source"]:
        line = f"{shlex.join(command)} && python -c 'import sys; print(sys.prefix)'"
        shown = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert shown.stdout.strip() == str(tmp_path / ".venv")


def test_uv_installs_by_default_what_the_suite_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert COMMANDS["uv"] == [["uv", "sync"]]
    assert project["dependency-groups"]["dev"] == ["ars2[dev]"]
    extras = [Requirement(line).extras for line in project["project"]["optional-dependencies"]["dev"]]
    assert any("suite" in names for names in extras)


def test_pip_installs_what_the_tests_of_the_wheel_build() -> None:
    assert COMMANDS["pip"] == [["pip", "install", "."]]  # tests/ars2/test_package.py


def test_the_plain_loops_run_one_after_the_other_and_learn() -> None:
    one_pass, two_passes = blocks(README, "python")
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(one_pass, names)
    inputs, targets, model = names["inputs"], names["targets"], names["model"]
    assert names["loss"].item() < 0.5 * targets.var().item()
    for layer in (model[0], model[-1]):
        layer.reset_parameters()
    exec(two_passes, names)
    assert names["optimizer"].diagnostics()["gradient_evaluations"] == 300
    assert torch.nn.functional.mse_loss(model(inputs), targets).item() < 0.5 * targets.var().item()


def test_the_loop_of_the_documentation_learns(capsys: pytest.CaptureFixture[str]) -> None:
    (loop,) = blocks(INDEX, "python")
    names: dict[str, Any] = {}
    exec(loop, names)
    printed = capsys.readouterr().out
    match = re.search(r"loss ([\d.]+) after (\d+) gradient evaluations", printed)
    assert match is not None and int(match[2]) == 400
    assert float(match[1]) < 0.5 * names["targets"].var().item()
    assert "policy hidden leaves out every output head" in printed


class Recording(torch.nn.Dropout):
    """Record what was dropped by each pass."""

    masks: ClassVar[list[torch.Tensor]] = []

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = super().forward(input)
        self.masks.append(output == 0)
        return output


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_both_passes_drop_the_same_and_the_first_updates_running_statistics(page: str) -> None:
    names: dict[str, Any] = {"Recording": Recording}
    steps = 0
    for code in blocks((ROOT / page).read_text(), "python"):
        Recording.masks.clear()
        code = code.replace("torch.nn.Tanh()", "torch.nn.BatchNorm1d(64), Recording(0.5)")
        code = re.sub(r"range\(\d+\)", "range(1)", code)
        exec(code, names)
        steps += 1
        assert names["model"][1].num_batches_tracked == steps
        if 'mode="base"' not in code:
            first, second = Recording.masks
            assert torch.equal(first, second) and first.any() and not first.all()
    assert steps == {"README.md": 2, "docs/index.md": 1}[page]


def anchors(page: Path) -> set[str]:
    """Return what links may name after "#".

    These are the headings, as the code host and mkdocs spell them.
    """
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", (ROOT / page).read_text()):
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_named_files_and_make_targets_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    folders = "configs|modules|datamodules|ars2|results|benchmarks|studies|analysis|launch|experiment|examples"
    places = (ROOT, (ROOT / page).parent)  # a page may also name what is beside it
    paths = re.findall(rf"(?<![\w/.])(?:{folders})/[\w/]+\.\w+", text)
    assert not {path for path in paths if not any((place / path).is_file() for place in places)}
    targets = set(re.findall(r"^make ([\w-]+)|`make ([\w-]+)", text, re.M))
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{first or second}:", makefile, re.M) for first, second in targets)


def test_the_tree_names_exactly_the_folders_of_code() -> None:
    (tree,) = blocks(README, "text")
    named = set(re.findall(r"^(\w+)/ ", tree, re.M))
    assert all((ROOT / folder).is_dir() for folder in named)
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} <= named
