"""A user's module is checked at once, and a bug in it is located."""

import itertools
import re
import textwrap
from pathlib import Path

import pytest
import torch

import modules
from modules.evaluation import EvaluatedModule
from tests.helpers.commands import TINY, Result, call, fresh_python
from tests.helpers.marks import slow

NUMBERS = itertools.count()
OPTIMIZER = ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1")
DATA = (
    *("--data", "datamodules.modular_addition.ModularAdditionData", "--data.p", "7", "--data.batch_size", "16"),
    *("--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--checkpoint.monitor", "val/loss"),
)
HEAD = """
import lightning.pytorch as L
import torch
from torch import nn
from modules.two_pass import TwoPassModule
"""


def fit_module(
    body: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *options: str,
    package: str = "",
    data: str = "",
    subcommand: str = "fit",
) -> tuple[Result, Path]:
    """Run a subcommand with the class ``Net`` of a file with this ``body``.

    Return the result and the file.
    """
    name = f"users_net_{next(NUMBERS)}"
    file = folder / f"{name}.py"
    file.write_text(HEAD + textwrap.dedent(body))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    given = ("--data", f"{name}.{data}", *DATA[6:]) if data else DATA
    return call(subcommand, "--model", f"{package}{name}.Net", *options, *given, "--runs", folder / "runs"), file


def test_everything_that_a_task_module_lacks_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """
    class Net(TwoPassModule):
        def training_step(self, batch, index):
            return None
    """
    result, _ = fit_module(body, tmp_path, monkeypatch, *OPTIMIZER)
    assert result.code == 1
    (line,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    for message in ("leave training_step()", "implement compute_loss", "set self.network", "call self.set_metrics"):
        assert message in line


@pytest.mark.parametrize(("where", "line"), [slow("__init__", 10), ("compute_loss", 15)])
def test_a_bug_is_reported_with_its_file_and_line(
    where: str, line: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = f"""
    class Net(TwoPassModule):
        def __init__(self, **options):
            super().__init__(**options)
            {"(3).foo" if where == "__init__" else "pass"}
            self.network = nn.Linear(2, 3)
            self.set_metrics({{}})

        def compute_loss(self, batch, metrics):
            return (3).foo
    """
    result, file = fit_module(body, tmp_path, monkeypatch, *OPTIMIZER)
    assert result.code == 1
    assert "'int' object has no attribute 'foo'" in result.err and f"({file}, line {line})" in result.err
    details = [*tmp_path.rglob("error.txt")]
    assert len(details) == 1 and "Traceback" in details[0].read_text()


BROKEN = """
    class Net(TwoPassModule):
        def __init__(self, **options):
            super().__init__(**options)
            self.network = nn.Linear(2, 3)
            self.set_metrics({})
            %s

        def compute_loss(self, batch, metrics):
            %s
            return self.network(batch[0].float()).sum()
    """


@pytest.mark.parametrize(
    ("made", "run", "message"),
    [
        ("[][1]", "pass", "error: IndexError: list index out of range ({file}, line 12) (details in "),
        (
            "pass",
            "(3).foo",
            "error: AttributeError: 'int' object has no attribute 'foo' ({file}, line 15) (details in ",
        ),
        (
            "pass",
            "pass",
            "error: mat1 and mat2 shapes cannot be multiplied (35x3 and 2x3) ({file}, line 16) (details in ",
        ),
        ("raise ValueError('a sentence')", "pass", "error: a sentence\n"),
    ],
    ids=["made", "run", "in torch", "a sentence"],
)
def test_a_bug_is_located_in_the_tasks_of_the_suite_too(
    made: str, run: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules, "__path__", [*modules.__path__, str(tmp_path)])
    result, file = fit_module(BROKEN % (made, run), tmp_path, monkeypatch, *OPTIMIZER, package="modules.")
    assert result.code == 1
    assert result.err.startswith(message.format(file=file)), result.err


def test_a_bug_in_a_process_of_a_data_loader_is_located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """
    class Failing(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return {}["label"]

    class Net(TwoPassModule):
        def __init__(self, **options):
            super().__init__(**options)
            self.network = nn.Linear(2, 3)
            self.set_metrics({})

        def compute_loss(self, batch, metrics):
            return self.network(batch).sum()

    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(Failing(), num_workers=1)

        val_dataloader = train_dataloader
    """
    result, file = fit_module(body, tmp_path, monkeypatch, *OPTIMIZER, data="Data")
    assert result.err.startswith(f"error: KeyError: 'label' ({file}, line 12) (details in "), result.err


COMPLETE = """
    class Net(TwoPassModule):
        def __init__(self, **options):
            super().__init__(**options)
            self.network = nn.Linear(2, 1)
            self.set_metrics({})

        def compute_loss(self, batch, metrics):
            return self.network(batch).square().mean()

    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=4)

        def val_dataloader(self):
            return self.train_dataloader()
    """


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def val_data", "def dev_data", "monitor is val/loss, but there is no validation: add val_dataloader"),
        ("return self.train_dataloader()", "return [self.train_dataloader()] * 2", "several loaders for val"),
        ("return torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=4)", "yield torch.ones(8, 2)", "a generator"),
        ("**options", "lr=0.1", r"'optimizer' is not accepted: the __init__\(\) of a TwoPassModule"),
        ("mean()", "sum(1)", r"must return the mean loss, .* returned one of shape \(4,\) \(details in"),
    ],
)
def test_a_task_that_cannot_be_trained_says_what_to_do(
    old: str, new: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = fit_module(COMPLETE.replace(old, new), tmp_path, monkeypatch, *OPTIMIZER, data="Data")
    (line,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.code in (1, 2) and re.search(message, line), result.err


@pytest.mark.parametrize(
    ("part", "other", "kind"),
    [
        ("model", "datamodules.modular_addition.ModularAdditionData", "LightningModule"),
        ("data", "modules.modular_addition.ModularAddition", "LightningDataModule"),
    ],
)
def test_model_and_data_that_are_mixed_up_are_refused(part: str, other: str, kind: str) -> None:
    error = call("fit", "--config", "configs/grok_adamw.yaml", f"--{part}", other).error
    assert error == f"error: {part}: it must name a subclass of lightning.pytorch.{kind}; got {other}"


def test_predictions_are_printed_or_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def predict(step: str) -> Result:
        asked = "    def predict_dataloader(self):\n            return self.train_dataloader()\n"
        step = f"\n        def predict_step(self, batch, index):\n            return {step}\n" if step else ""
        body = COMPLETE.replace("mean()\n", f"mean()\n{step}") + "\n    " + asked
        options = (*OPTIMIZER, "--ckpt_path", saved)
        return fit_module(body, tmp_path, monkeypatch, *options, data="Data", subcommand="predict")[0]

    trained, _ = fit_module(COMPLETE, tmp_path, monkeypatch, *OPTIMIZER, data="Data")
    assert trained.code == 0, trained.err
    (saved,) = map(str, tmp_path.rglob("last.ckpt"))
    assert "implement predict_step(batch, batch_index), which returns a list of lines" in predict("").err
    assert predict("'a line'").out == "a line\na line\n"
    assert predict("[str(len(batch)), 'b']").out == "4\nb\n4\nb\n"
    assert predict("None").out == ""


@pytest.mark.slow
def test_an_error_raised_by_the_suite_names_no_file(tmp_path: Path) -> None:
    result = call("fit", "--config", "configs/grok_base.yaml", *TINY, "--data.p", "0", "--runs", tmp_path)
    assert result.code != 0 and ", line " not in result.err


def test_batches_of_any_structure_are_counted_by_their_tensors() -> None:
    module, examples = EvaluatedModule(), torch.ones(5, 2)
    for batch in (examples, (examples, examples), {"image": examples, "label": examples}, [{"x": [examples]}]):
        assert module.batch_size(batch) == 5
    for batch in ({}, "text", ["text"]):
        with pytest.raises(TypeError, match=r"override batch_size\(batch\) in EvaluatedModule"):
            module.batch_size(batch)


WORKING = BROKEN % ("pass", "pass")
WORKING = WORKING.replace("batch[0].float()", "batch[0].float()[:, :2]")
CALLBACK = """
    class Callback(L.Callback):
        def {method}(self, *arguments):
            {bug}  # BUG
    """
METRIC = """
    import torchmetrics

    class Broken(torchmetrics.SumMetric):
        def compute(self):
            {bug}  # BUG
    """
SCHEDULER = """
    class Scheduler(torch.optim.lr_scheduler.LRScheduler):
        def get_lr(self):
            {bug}  # BUG
    """
DATA_MODULE = """
    class Data(L.LightningDataModule):
        def setup(self, stage):
            {bug}  # BUG

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.ones(4, 1, 2))
    """
STEPS = """
        def validation_step(self, batch, index):
            {bug}  # BUG
    """
KEY, VALUE = ("{}['a']", "KeyError: 'a'"), ("int('abc')", "invalid literal for int() with base 10: 'abc'")


@pytest.mark.parametrize(
    ("code", "bug", "message", "options"),
    [
        ("{bug}  # BUG", "x = = 3", "SyntaxError: invalid syntax", ()),
        ("{bug}  # BUG", "import nothing_here", "No module named 'nothing_here'", ()),
        slow("{bug}  # BUG", *KEY, ()),
        (CALLBACK.replace("{method}", "__init__"), *KEY, ("--trainer.callbacks", "Callback")),
        (CALLBACK.replace("{method}", "on_train_epoch_end"), *VALUE, ("--trainer.callbacks", "Callback")),
        (SCHEDULER, *VALUE, ("--model.scheduler", "Scheduler")),
        (DATA_MODULE, *VALUE, ("--data", "Data")),
        slow(DATA_MODULE, "open('/nothing/here')", "/nothing/here: No such file or directory", ("--data", "Data")),
        (STEPS, *VALUE, ()),
        (METRIC, *KEY, ("Broken()",)),
    ],
    ids=[
        "syntax",
        "import",
        "import of a bug",
        "callback is made",
        "callback",
        "schedule",
        "data",
        "data's file",
        "validation",
        "metric",
    ],
)
def test_a_bug_of_any_kind_is_located(
    code: str, bug: str, message: str, options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Find the line with the comment BUG in the line of the error."""
    body = textwrap.dedent(WORKING)
    if options == ("Broken()",):
        body, options = body.replace("{})", "{'broken': Broken()})"), ()
        body = body.replace("return self.network", "metrics['broken'].update(1.0)\n        return self.network")
    more = textwrap.dedent(code.replace("{bug}", bug))
    body += textwrap.indent(more, "    ") if code is STEPS else more
    name = f"users_kind_{next(NUMBERS)}"
    file = tmp_path / f"{name}.py"
    file.write_text(HEAD + body)
    (number,) = [number for number, line in enumerate(file.read_text().splitlines(), 1) if "# BUG" in line]
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = [f"{name}.{option}" if option in ("Callback", "Scheduler", "Data") else option for option in options]
    data = DATA[6:] if "--data" in given else DATA
    result = call("fit", "--model", f"{name}.Net", *OPTIMIZER, *data, *given, "--runs", tmp_path / "runs")
    (line,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {message} ({file}, line {number})"), line


def test_an_error_in_the_backward_pass_names_the_option_that_locates_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = WORKING.replace("return self.network", "output = self.network").replace(
        ").sum()",
        """).exp()
            output += 1  # BUG
            return output.sum()""",
    )
    result, file = fit_module(body, tmp_path, monkeypatch, *OPTIMIZER)
    assert "modified by an inplace operation" in result.err and "two_pass.py" not in result.err
    assert "--trainer.detect_anomaly true prints the traceback of the operation (details in " in result.err
    with pytest.warns(UserWarning, match="Error detected in ExpBackward0") as printed:
        _, file = fit_module(body, tmp_path, monkeypatch, *OPTIMIZER, "--trainer.detect_anomaly", "true")
    (number,) = [number for number, line in enumerate(file.read_text().splitlines(), 1) if "exp()" in line]
    assert any(f'File "{file}", line {number}' in str(warning.message) for warning in printed)


def test_an_assertion_without_a_message_is_located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, file = fit_module(BROKEN % ("pass", "assert batch is None"), tmp_path, monkeypatch, *OPTIMIZER)
    assert result.err.startswith(f"error: AssertionError ({file}, line 15)"), result.err


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_bug_in_one_process_is_located_and_the_other_one_blames_that_process(rank: int, tmp_path: Path) -> None:
    body = WORKING.replace("class Net", "import os\n    class Net").replace(
        "return",
        f"""{{}} if os.environ.get(
                "LOCAL_RANK", "0") != "{rank}" else {{}}["a"]
            return""",
    )
    file = tmp_path / "users_process.py"
    file.write_text(HEAD + textwrap.dedent(body))
    options = (*OPTIMIZER, *DATA, "--trainer.devices", 2, "--trainer.strategy", "ddp", "--runs", tmp_path / "runs")
    result = fresh_python(
        "train.py", "fit", "--model", "users_process.Net", *options, home=tmp_path, PYTHONPATH=str(tmp_path)
    )
    lines = sorted(line for line in result.err.splitlines() if line.startswith("error: "))
    assert lines[0].startswith(f"error: KeyError: 'a' ({file}, line "), result.err
    assert lines[1].startswith("error: another process of the run has ended; its error says why (details in ")
    details = {path.name: path.read_text() for path in tmp_path.rglob("error*.txt")}
    assert set(details) == {"error.txt", "error-rank1.txt"}
    assert "KeyError" in details["error-rank1.txt" if rank else "error.txt"]
