"""The pages in docs/ agree with the code.

Features and their tests, commands and configs are checked; tests/test_rooms.py checks the map of the rooms.
"""

import argparse
import ast
import importlib.util
import re
import shlex
import subprocess
import textwrap
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

import compare
from launch import sweep_specification
from tests.helpers.commands import ROOT, call
from tests.helpers.launching import alone

PAGES = {path.stem: path.read_text() for path in (ROOT / "docs").glob("*.md")}


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.M | re.S)


def commands(program: str) -> list[list[str]]:
    """Return the arguments of every command of a program on any page.

    Placeholders such as <run> are left in.
    """
    lines = [line for page in PAGES for line in "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()]
    words = [shlex.split(re.sub(r"\|\|.*", "", line), comments=True) for line in lines if program in line]
    return [line[line.index(program) + 1 :] for line in words if program in line]


@pytest.mark.parametrize("page", ["precision_and_faults", "several_processes", "lightning_features"])
def test_every_feature_in_a_table_names_the_file_that_tests_it(page: str) -> None:
    tables = re.findall(r"^\| feature[^\n]*\| tested how[^\n]*\|\n(.*?)\n\n", PAGES[page], re.M | re.S)
    paths = re.findall(r"\]\(\.\./(tests/[\w/]+\.py)\)", "".join(tables))
    assert len(paths) >= 3
    for path in paths:
        assert "def test_" in (ROOT / path).read_text(), path
    for row in (row for table in tables for row in table.splitlines()[1:] if page != "several_processes"):
        assert "](../tests/" in row, row


def test_the_schedules_shown_are_those_that_are_tested() -> None:
    names: dict[str, Any] = {}
    exec(blocks("lightning_features", "python")[0], names)
    tested = (ROOT / "tests/launch/test_lightning_callbacks.py").read_text()
    shown = re.findall(r"^ +(?:parts|super).*", blocks("lightning_features", "python")[0], re.M)
    assert shown and all(line in tested for line in shown)
    assert names["WarmUp"] and names["from_transformers"]


def test_commands_of_train_have_valid_options_and_configs(tmp_path: Path) -> None:
    found = [line for line in commands("train.py") if "my_task.yaml" not in line]
    assert len(found) > 15
    for line in found:
        files = [value for name, value in pairwise(line) if name == "--config"]
        assert all((ROOT / file).is_file() for file in files), line
    # Committed configs are tested by themselves.
    with_options = [line for line in found if {word for word in line if word[:2] == "--"} - {"--config", "--ckpt_path"}]
    assert len(with_options) > 8
    for subcommand, *options in with_options:
        options = [re.sub(r"<.*?>", "file", word).replace("$SLURM_NNODES", "1") for word in options if word != "$@"]
        result = call(subcommand, *options, *(() if "--print_config" in options else ("--print_config",)))
        assert result.code == 0, (options, result.err)


def test_commands_of_compare_have_valid_options(monkeypatch: pytest.MonkeyPatch) -> None:
    found = commands("compare.py")
    assert len(found) > 5
    for options in found:
        monkeypatch.setattr("sys.argv", ["compare.py", *options])
        compare.arguments()


def test_modules_that_are_run_by_name_exist() -> None:
    names = set(re.findall(r"python3? -m ((?:benchmarks|studies|analysis)[\w.]+)", " ".join(PAGES.values())))
    assert len(names) > 8
    for name in names:
        assert importlib.util.find_spec(name) is not None, name


def test_environment_variables_named_are_read_somewhere() -> None:
    folders = ("datamodules", "experiment", "launch", "callbacks", "analysis")
    sources = "".join(path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py"))
    for name in set(re.findall(r"\b(?:ARS2|WANDB)_[A-Z0-9_]+\b", "".join(PAGES.values()))):
        assert name in sources, name


def without_docstrings(code: str) -> str:
    """Return a module's syntax tree without docstrings, as text."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)


def test_the_page_of_a_task_shows_the_example() -> None:
    page, example = "your_own_task", ROOT / "examples/your_task.py"
    (code,), configs, (run, copy) = (blocks(page, language) for language in ("python", "yaml", "bash"))
    assert without_docstrings(code) == without_docstrings(example.read_text())
    for shown, name in zip(configs, ("your_task", "your_task_sweep"), strict=True):
        assert yaml.safe_load(shown) == yaml.safe_load((ROOT / f"examples/{name}.yaml").read_text())
    assert textwrap.indent(run, "    ") in example.read_text()
    assert "my_task.yaml" in copy


def test_a_copy_of_the_example_task_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    *copies, train = blocks("your_own_task", "bash")[1].splitlines()
    subprocess.run("\n".join(copies), shell=True, check=True, cwd=tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert sweep_specification.read(tmp_path / "my_sweep.yaml").optimizers["base"].configs == ("my_task.yaml",)
    options = train.replace("my_task.yaml", str(tmp_path / "my_task.yaml")).split()[2:]
    result = call(*options, "--trainer.max_epochs", "1", "--wandb", "false", "--runs", tmp_path / "runs")
    assert result.code == 0, result.err


def test_the_example_modules_are_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)  # Lightning's Trainer leaves logs and checkpoints here
    names: dict[str, Any] = {}
    for code in blocks("your_own_module", "python"):
        exec(code, names)
    digits = names["Digits"](optimizer=None)
    batch = torch.zeros(5, 28, 28), torch.arange(5)
    assert digits.compute_loss(batch, digits.val_metrics).ndim == 0
    assert names["trainer"].global_step == 20 * 16
    assert names["trainer"].callback_metrics["train_loss_epoch"] < 0.1 < 0.25 * names["targets"].var()


def test_the_program_that_fine_tunes_learns_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    first, *others = blocks("huggingface", "python")
    exec(first, names)
    assert names["trainer"].evaluate()["eval_accuracy"] > 0.9
    for code in others:
        exec(code.replace("trainer.train()", "trainer.args.max_steps = 4; trainer.train()"), names)
    assert names["trainer"].train().global_step == 4


def test_the_optimizer_with_other_factors_is_one_and_the_weight_decay_follows_the_learning_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for page in ("your_own_module", "choosing_settings"):
        for code in blocks(page, "python"):
            exec(code, names)
    param = torch.nn.Parameter(torch.zeros(3, 4))
    param.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    names["PolarARS2Neo"]([param], lr=1.0, weight_decay=0.0).step()
    values = torch.linalg.svdvals(param.detach())
    assert values.min().item() == pytest.approx(values.max().item(), rel=1e-4)
    for group in names["optimizer"].param_groups:
        assert 0 < group["weight_decay"] / 0.1 == pytest.approx(group["lr"] / 3e-3) and group["lr"] < 3e-3


def test_the_loops_of_ones_own_run_one_after_the_other() -> None:
    import torch

    names: dict[str, Any] = {}
    loop, closure, processes = blocks("your_own_loop", "python")
    torch.manual_seed(0)
    exec(loop, names)
    counters = names["optimizer"].diagnostics()
    assert 35 <= counters["steps"] <= 40  # the scaler may skip some
    assert 0 < counters["sync_steps"] < counters["steps"]
    exec(closure, names)
    assert names["optimizer"].diagnostics()["steps"] == counters["steps"] + 1
    assert not names["optimizer"].decides_alike
    with alone():
        exec(processes, names)
    assert names["optimizer"].decides_alike


def test_the_sweep_shown_is_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sweep.yaml").write_text(blocks("searching", "yaml")[0])
    monkeypatch.chdir(ROOT)
    assert sweep_specification.read(tmp_path / "sweep.yaml").trials == 16


def winner(study: str, row: str) -> dict[str, Any]:
    """Return the arguments of the module in a winner's run."""
    with zipfile.ZipFile(ROOT / f"results/{study}/runs.zip") as archive:
        name = next(n for n in archive.namelist() if n.startswith(f"{row}-final/") and n.endswith("config.yaml"))
        arguments: dict[str, Any] = yaml.safe_load(archive.read(name))["model"]["init_args"]
    return arguments


# The rows of the tables of docs/choosing_settings.md: a study, and its row in each column.
LEARNING_RATES = [
    ("grok_tuned", ("base_all", "adamw_all", "muon_all")),
    ("grok_tuned", ("base_hidden", "adamw_hidden", "muon_hidden")),
    ("grok_narrow", ("base_all", "adamw_all", None)),
    ("grok_narrow", (None, "adamw_hidden", "muon_hidden")),
    ("grok_ablation", ("base", "base_no_geometry", None)),
    ("cifar_mini_tuned", ("base", "adamw", "muon")),
    ("wikitext2_nano_tuned", ("base", "adamw", "muon")),
]
WEIGHT_DECAYS = ["base_all", "base_hidden", "adamw_all", "adamw_hidden", "muon_all", "muon_hidden"]
RADII = [
    ("grok_tuned", ("sync_all", "aga_all")),
    ("grok_tuned", ("sync_hidden", "aga_hidden")),
    ("grok_ablation", ("sync", None)),
    ("cifar_mini_tuned", ("sync", "aga")),
    ("wikitext2_nano_tuned", ("sync", "aga")),
]


def cells(heading: str) -> list[list[list[float]]]:
    """Return the numbers in the table below a heading, without the first column."""
    section = PAGES["choosing_settings"].split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    rows = [line.strip("|").split("|")[1:] for line in lines]
    return [[[float(number) for number in re.findall(r"[\d.]+", cell)] for cell in row] for row in rows]


def same(shown: list[float], *values: float | None) -> bool:
    """Return whether the numbers shown are the values to two digits.

    Those of vectors may be left out.
    """
    given = [float(f"{value:.2g}") for value in values if value is not None]
    return shown == given[: len(shown)] and bool(shown)


def test_the_settings_shown_are_those_of_the_winners() -> None:
    for (study, rows), shown in zip(LEARNING_RATES, cells("Learning rate"), strict=True):
        for row, numbers in zip(rows, shown, strict=True):
            found = winner(study, row) if row else {}
            vector = (found.get("vector") or {}).get("lr")
            assert (not row and not numbers) or same(numbers, found["optimizer"]["init_args"]["lr"], vector), row
    for row, shown in zip(WEIGHT_DECAYS, cells("Weight decay"), strict=True):
        found = winner("grok_tuned", row)
        decays = found["optimizer"]["init_args"]["weight_decay"], (found["vector"] or {}).get("weight_decay")
        assert same([*shown[0], *shown[1]], *decays), row
    for (study, rows), shown in zip(RADII, cells("rho"), strict=True):
        for row, numbers in zip(rows, shown, strict=True):
            assert (not row and not numbers) or same(numbers, winner(study, row)["optimizer"]["init_args"]["rho"]), row


class Page:
    """Stand for the part of mkdocs' page that the hook reads."""

    def __init__(self, source: str) -> None:
        self.file = argparse.Namespace(src_uri=source)


class Config:
    """Stand for the part of mkdocs' config that the hook reads."""

    def __init__(self, repo_url: str) -> None:
        self.repo_url = repo_url


@pytest.mark.parametrize(
    ("url", "source", "up", "start"),
    [
        ("", "algorithm.md", "../", "../"),
        ("", "results/index.md", "../../", "../../"),
        ("https://host/a/b/", "results/index.md", "../../", "https://host/a/b/blob/main/"),
    ],
)
def test_links_out_of_the_pages_lead_to_the_repository(url: str, source: str, up: str, start: str) -> None:
    specification = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    assert specification is not None and specification.loader is not None
    hooks = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(hooks)
    inside = "[b](tasks.md)" if up == "../" else "[b](../tasks.md)"  # stays within docs/
    hidden = hooks.on_page_markdown(f"[a]({up}ars2/muon.py) {inside}", page=Page(source))
    target = re.search(rf"\[a\]\((.*?)\) {re.escape(inside)}", hidden)
    assert target is not None and "../" not in target[1]
    link = f'<a href="{target[1]}">:func:<code>step</code></a>'
    html = hooks.on_page_content(link, page=Page(source), config=Config(url))
    assert html == f'<a href="{start}ars2/muon.py"><code>step</code></a>'
