"""The published tables are run in order, and can be rehearsed as typed."""

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from analysis.rows import PUBLISHED, matches
from experiment.identity import RunIdentity
from launch.within_time import Part
from studies import published_tables
from studies.published_tables import CIFAR, WIKITEXT2, all_parts, arguments, slots
from tests.helpers.commands import ROOT, Result, call, captured, fresh_python, python
from tests.helpers.marks import slow
from tests.helpers.processes import Running, server, wait_until
from tests.helpers.text import write_corpus

ROWS = [*WIKITEXT2, *CIFAR]


def options(**changed: object) -> argparse.Namespace:
    defaults = {"rows": ROWS, "seeds": [42, 43], "output": Path("tables"), "accelerator": "gpu"}
    return argparse.Namespace(**{**defaults, "compile": False, "rehearse": False, "processes": 2, **changed})


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_most_valuable_parts_come_first() -> None:
    parts = all_parts(options())
    done = [(part.row.partition("_")[0], part.seed, part.epochs == part.total_epochs) for part in parts]
    kinds = list(dict.fromkeys(done))
    assert kinds == [
        ("wikitext2", 42, False),
        ("cifar", 42, True),
        ("wikitext2", 43, False),
        ("cifar", 43, True),
        ("wikitext2", 42, True),
        ("wikitext2", 43, True),
    ]
    first = {part.row: part.epochs for part in parts[:10]}
    assert list(first) == ROWS
    assert list(first.values()) == [3, 4, 4, 7, 5, 60, 100, 20, 100, 100]
    assert [part.total_epochs for part in parts[:5]] == [20, 10, 10, 20, 20]


def test_the_first_parts_of_wikitext2_go_past_the_published_best_epoch() -> None:
    entry = next(entry for name, entry in yaml.safe_load(PUBLISHED.read_text()).items() if name == "wikitext2")
    curves = {
        "Base": [121.3, 96.1, 96.7, 104.3],
        "Sync": [118.5, 93.1, 90.7, 96.7],
        "AGA": [118.8, 94.2, 93.2, 101.9],
        "AdamW": [177.9, 141.0, 126.9, 119.8, 116.7, 116.5, 118.9],
        "Muon": [156.5, 125.3, 115.2, 111.4, 112.1],
    }
    assert len(entry["rows"]) == len(WIKITEXT2) == len(curves)
    for name, curve in curves.items():
        best = curve.index(min(curve)) + 1
        assert WIKITEXT2[f"wikitext2_{name.lower()}"] == best + 1


def test_all_parts_of_a_run_have_the_same_command_line() -> None:
    lines: dict[tuple[str, int], set[tuple[str, ...]]] = {}
    for part in all_parts(options()):
        lines.setdefault(part.run, set()).add(part.arguments)
    assert {len(found) for found in lines.values()} == {1}
    assert len({line for found in lines.values() for line in found}) == len(lines) == 20


@pytest.mark.parametrize("row", [row if row.endswith(("base", "muon")) else slow(row) for row in ROWS])
def test_every_row_has_the_options_of_its_published_entry(row: str) -> None:
    result = call(*arguments(row, 43, options(accelerator="cpu")), "--print_config")
    assert result.code == 0, result.err
    identity = RunIdentity(yaml.safe_load(result.out))
    entries = yaml.safe_load(PUBLISHED.read_text()).values()
    (entry,) = [e for e in entries if e["task"] == identity.task and matches(identity.options, e["protocol"])]
    (published,) = [r for r in entry["rows"] if matches(identity.options, r["settings"])]
    assert published["epochs"] == identity.options["trainer.max_epochs"]
    assert identity.seed == "43"


def test_every_gpu_that_may_be_used_gets_as_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots("gpu", 2)] == ["0", "1", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert slots("gpu", 1) == [{"CUDA_VISIBLE_DEVICES": "3"}]
    assert slots("cpu", 2) == [{}, {}]


def command(folder: Path, *more: str) -> Result:
    """Run the command in this process.

    Its runs are forked from the server of the tests.
    """
    server()
    corpus = str(write_corpus(folder / "text"))
    line = ["published_tables", "--output", str(folder / "tables"), *more]
    with patch("sys.argv", line), patch.dict("os.environ", ARS2_WIKITEXT2_ROOT=corpus, OMP_NUM_THREADS="1"):
        return captured(published_tables.main)


def test_without_a_gpu_a_message_explains_how_to_rehearse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["published_tables", "--minutes", "1", "--output", str(tmp_path / "tables")])
    assert published_tables.main() == 1
    expected = "error: there is no GPU on this machine: add --accelerator cpu --rehearse to try everything on a CPU\n"
    assert capsys.readouterr().err == expected
    assert not (tmp_path / "tables").exists()


@pytest.mark.slow
def test_the_common_imports_of_the_runs_do_not_touch_the_gpu(tmp_path: Path) -> None:
    """A process forked from one that has called CUDA cannot use a GPU."""
    script = """
import sys, torch
asked = []
for module, name in ((torch._C, "_cuda_getDeviceCount"), (torch.cuda, "device_count"), (torch.cuda, "is_available")):
    setattr(module, name, lambda *_, name=name: asked.append(name) or 0)
from launch import cli
for module in sys.argv[1:]:
    __import__(module)
assert not asked, asked
"""
    result = fresh_python("-c", script, *published_tables.MODULES, home=tmp_path)
    assert result.code == 0, result.err


def test_two_calls_for_one_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Within one process a lock can be taken again.
    take = "import sys, pathlib, time; from experiment.folders import lock; lock(pathlib.Path(sys.argv[1]));"
    take += " print('held'); time.sleep(60)"
    with Running(["-c", take, str(tmp_path)], os.environ) as other:
        wait_until(lambda: other.out, other)
        line = ["published_tables", "--minutes", "1", "--output", str(tmp_path), "--accelerator", "cpu"]
        monkeypatch.setattr(sys, "argv", line)
        assert published_tables.main() == 1
        other.kill()
    assert "is in use by another call" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [("wikitext2_base",), slow(("wikitext2_base", "wikitext2_sync"))], ids=len)
def test_a_rehearsal_leaves_an_archive_that_compare_reads(rows: tuple[str, ...], tmp_path: Path) -> None:
    count = len(rows)
    choice = ["--accelerator", "cpu", "--rehearse", "--rows", *rows, "--seeds", "42"]
    result = command(tmp_path, "--minutes", "3", *choice)
    assert (result.code, result.err) == (0, ""), result.out
    assert f"{2 * count} of {2 * count} parts are done\n{count} runs are in" in result.out
    again = command(tmp_path, "--minutes", "3", *choice)
    assert again.out.splitlines() == result.out.splitlines()[-3:]  # nothing is left to do
    report = ("compare.py", tmp_path / "tables/runs.zip", "--unfinished", "--output", tmp_path / "report")
    compared = python(*report, home=tmp_path)
    assert compared.code == 0, compared.err
    assert re.search(rf"\b{count} runs? in {count} rows?", compared.out), compared.out


def test_an_archive_that_cannot_be_written_is_an_error_before_anything_is_run(tmp_path: Path) -> None:
    choice = ("--minutes", "1", "--accelerator", "cpu", "--rehearse", "--archive", str(tmp_path / "nowhere/runs.zip"))
    result = command(tmp_path, *choice)
    assert (result.code, result.out) == (1, "")
    assert result.err.endswith("nowhere/runs.zip: No such file or directory\n")
    assert result.err.startswith("error: the runs cannot be packed into ")


def test_a_disk_that_fills_up_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The runs are asked to save, and the exit code reports the archive."""

    class EndsOnce:
        def __init__(self, *given: Any, ended: Callable[[], object]) -> None:
            self.parts, self.failed, self.ended = given[0], {}, ended

        def run(self) -> None:
            def full(*_: object, **__: object) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr("analysis.archive.zipfile.ZipFile", full)
            assert self.ended() is None

        def is_done(self, part: Part) -> bool:
            return False

    monkeypatch.setattr(published_tables, "Schedule", EndsOnce)
    monkeypatch.setattr(published_tables, "server", lambda *_: None)
    line = ["published_tables", "--minutes", "1", "--output", str(tmp_path), "--accelerator", "cpu", "--rehearse"]
    monkeypatch.setattr(sys, "argv", line)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert published_tables.main() == 1
    assert "error: the runs cannot be packed into" in capsys.readouterr().err
