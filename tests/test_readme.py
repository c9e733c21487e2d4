"""What the README says works: its code runs, its links and commands lead somewhere."""

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_plain_loops_run_one_after_the_other_and_learn(capsys: pytest.CaptureFixture[str]) -> None:
    loop, parts = re.findall(r"```python\n(.*?)```", README, re.S)
    names: dict[str, object] = {}
    exec(loop, names)
    printed = capsys.readouterr().out
    match = re.search(r"loss ([\d.]+) after (\d+) gradient evaluations", printed)
    assert match is not None and int(match[2]) == 400
    model, inputs, targets = names["model"], names["inputs"], names["targets"]
    assert float(match[1]) < 0.5 * targets.var().item()  # type: ignore[attr-defined]
    assert "policy hidden leaves out every output head" in printed
    before = [param.clone() for param in model.parameters()]  # type: ignore[attr-defined]
    exec(parts, names)
    moved = [not before[i].equal(param) for i, param in enumerate(model.parameters())]  # type: ignore[attr-defined]
    assert all(moved) and model(inputs).shape == targets.shape  # type: ignore[operator, attr-defined]


class Recording(torch.nn.Dropout):
    """Keep what was dropped by each pass."""

    masks: ClassVar[list[torch.Tensor]] = []

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = super().forward(input)
        self.masks.append(output == 0)
        return output


def test_both_passes_of_the_plain_loops_drop_the_same_and_only_the_first_moves_running_statistics() -> None:
    loop, parts = re.findall(r"```python\n(.*?)```", README, re.S)
    replaced = loop.replace("torch.nn.Tanh()", "torch.nn.BatchNorm1d(64), Recording(0.5)").replace("200", "1")
    assert loop.count("torch.nn.Tanh()") == loop.count("200") == 1
    names: dict[str, Any] = {"Recording": Recording}
    for steps, code in enumerate((replaced, parts), start=1):
        Recording.masks.clear()
        exec(code, names)
        first, second = Recording.masks
        assert torch.equal(first, second) and first.any() and not first.all()
        assert names["model"][1].num_batches_tracked == steps


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)\)", README))))
def test_links_lead_to_files(target: str) -> None:
    assert (ROOT / target).exists()


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"(?<!tests/)(?:configs|modules|ars2|results|benchmarks)/[\w/]+\.\w+", README)))
)
def test_named_files_exist(path: str) -> None:
    assert (ROOT / path).is_file()


def test_every_module_is_on_the_map() -> None:
    tree = README.split("```text")[1].split("```")[0]
    folders = ("ars2", "modules", "datamodules", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"]
    # The networks and tasks are named together with their folder.
    missing = [path.name for path in files if path.name not in tree and path.name != "grokking_transformer.py"]
    assert not missing


def test_named_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", "\n".join(re.findall(r"`make \w+`|^make \w+", README, re.M))):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_every_feature_in_the_table_names_the_file_that_tests_it() -> None:
    table = re.search(r"^\| feature \| modes \| tested how \|\n(.*?)\n\n", README, re.M | re.S)
    assert table is not None
    for row in table[1].splitlines()[1:]:
        named = re.findall(r"\]\((tests/[\w/]+\.py)\)", row)
        assert named, row
        for path in named:
            assert "def test_" in (ROOT / path).read_text(), path


def test_environment_variables_named_are_read_somewhere() -> None:
    sources = "\n".join(path.read_text() for path in ROOT.glob("*.py"))
    sources += "\n".join(path.read_text() for path in ROOT.glob("datamodules/*.py"))
    for name in set(re.findall(r"\b(?:ARS2|WANDB)_[A-Z0-9_]+\b", README)):
        assert name in sources, name
