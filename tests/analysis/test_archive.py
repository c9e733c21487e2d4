"""Test that archives are complete, reproducible, and read like their folders."""

import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from analysis import archive
from analysis.archive import ARCHIVE, FILES, find, pack
from analysis.report import write
from analysis.rows import group
from analysis.runs import Run, read
from analysis.study import Study
from tests.analysis.runs import EPOCHS, TRAINED_IN, copy, cut, unpack


def test_the_same_runs_give_the_same_bytes_without_weights(runs: Path, tmp_path: Path) -> None:
    packed = pack(runs, tmp_path / "a.zip")
    assert packed == pack(runs, tmp_path / "b.zip") == len(list(runs.glob("*/*/config.yaml")))
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as file:
        names = file.namelist()
    assert names == sorted(names)
    assert {Path(name).name for name in names} <= set(FILES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "b.zip"]


def test_an_archive_and_a_folder_with_one_are_read_like_the_runs_in_it(runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "studies" / "one" / ARCHIVE
    file.parent.mkdir(parents=True)
    pack(runs, file)
    expected, _ = read([runs])
    for paths in ([file], [tmp_path], [file.parent, file]):
        found, problems = read(paths)
        assert problems == []
        assert [run.shown for run in found] == [file / Path(str(run.folder)).relative_to(runs) for run in expected]
        for run, same in zip(found, expected, strict=True):
            assert run.log.keys() == same.log.keys()
            assert all(np.array_equal(run.log[name], same.log[name], equal_nan=True) for name in run.log)
            assert run.identity.setting_digest == same.identity.setting_digest
            assert run.summary == same.summary


def test_a_run_beside_its_archive_is_read_once(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    pack(tmp_path, tmp_path / ARCHIVE)
    shutil.rmtree(tmp_path / "grok_aga")
    on_disk = [isinstance(folder, Path) for folder in find([tmp_path])]
    assert (on_disk.count(True), on_disk.count(False)) == (len(list(tmp_path.glob("*/*/config.yaml"))), 3)


def test_the_report_of_an_archive_explains_how_to_unpack_it(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "grok_aga", tmp_path / "grok_aga")
    pack(tmp_path, tmp_path / ARCHIVE)
    shutil.rmtree(tmp_path / "grok_aga")
    write(tmp_path / "report", group(*read([tmp_path])), [], Study())
    text = (tmp_path / "report" / "report.md").read_text()
    assert f"python -m zipfile -e {tmp_path / ARCHIVE} {tmp_path}" in text.replace("\\", "")
    name = next(runs.glob("grok_aga/*")).relative_to(runs)
    assert f"python train.py fit --config {tmp_path / name / 'config.yaml'} |" in text


def test_a_resumed_run_finds_its_beginning_in_the_archive(tmp_path: Path) -> None:
    folder = unpack("resumed", tmp_path)
    first, second = sorted(folder.glob("*/*"))
    pack(folder, tmp_path / ARCHIVE)
    found, problems = read([tmp_path / ARCHIVE])
    assert [Path(run.shown).name for run in found] == [second.name]
    (problem,) = problems
    assert (problem.folder.name, "it was resumed in" in problem.reason) == (first.name, True)
    (continuous,) = unpack("continuous", tmp_path).glob("*/*")
    for column in ("val/accuracy", "train/loss", "cost/gradient_evaluations"):
        assert found[0].curve(column)[1].tolist() == Run(continuous).curve(column)[1].tolist()
    assert str(TRAINED_IN) in (second / "config.yaml").read_text()
    shutil.rmtree(first)
    pack(folder, tmp_path / ARCHIVE)
    assert "no longer exists" in read([tmp_path / ARCHIVE])[1][0].reason


def test_a_damaged_archive_costs_no_other_run(runs: Path, tmp_path: Path) -> None:
    pack(runs, tmp_path / ARCHIVE)
    with zipfile.ZipFile(tmp_path / ARCHIVE) as file:
        (damaged,) = (
            info for info in file.infolist() if "grok_adamw" in info.filename and "seed0/met" in info.filename
        )
    content = bytearray((tmp_path / ARCHIVE).read_bytes())
    start = damaged.header_offset + 30 + len(damaged.filename)
    content[start : start + damaged.compress_size] = bytes(damaged.compress_size)
    (tmp_path / ARCHIVE).write_bytes(bytes(content))
    found, problems = read([tmp_path])
    assert [problem.folder for problem in problems] == [tmp_path / ARCHIVE / Path(damaged.filename).parent]
    assert len(found) == len(list(runs.glob("*/*/config.yaml"))) - 1


def test_a_file_that_is_no_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no archive")
    with pytest.raises(ValueError, match=r"notes\.txt is neither a folder nor an archive"):
        read([tmp_path / "notes.txt"])


def test_a_failed_pack_leaves_the_former_archive_as_it_was(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(runs, tmp_path / ARCHIVE)
    former = (tmp_path / ARCHIVE).read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(OSError, match="No space left"):
        pack(runs, tmp_path / ARCHIVE)
    assert (tmp_path / ARCHIVE).read_bytes() == former
    assert [path.name for path in tmp_path.iterdir()] == [ARCHIVE]


def test_the_command_packs_a_search_with_its_configs_and_never_drops_a_run(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["archive", str(tmp_path)])
    assert archive.main() == 1
    assert capsys.readouterr().err == f"error: there is no run in {tmp_path}\n"
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    for name in ("trials.journal", "aga-winner.yaml", "study.yaml"):
        (tmp_path / name).write_text("a: 1\n")
    assert archive.main() == 0
    assert f"13 runs in {tmp_path / ARCHIVE}" in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / ARCHIVE) as file:
        assert [name for name in file.namelist() if "/" not in name] == ["aga-winner.yaml"]
    former = (tmp_path / ARCHIVE).read_bytes()
    shutil.rmtree(tmp_path / "grok_aga")
    assert archive.main() == 1
    assert f"unpack {tmp_path / ARCHIVE} first" in capsys.readouterr().err
    assert (tmp_path / ARCHIVE).read_bytes() == former


def test_unfinished_runs_have_separate_rows_with_their_progress(runs: Path, tmp_path: Path) -> None:
    complete = min((runs / "grok_aga").iterdir())
    half = copy(complete, tmp_path, "half-seed9")
    rows = (half / "metrics.csv").read_text().splitlines()
    cut(half, len(rows) // 2)
    paths = [complete, half.parent]
    finished, problems = read(paths)
    assert [run.folder for run in finished] == [complete]
    assert any("half-finished" in problem.reason for problem in problems)
    (alone,), _ = read([half], unfinished=True)
    assert 0 < alone.epochs < EPOCHS
    (table,) = group([*finished, alone])
    assert sorted(row.label for row in table.rows) == ["grok_aga", f"grok_aga, {alone.epochs} of {EPOCHS} epochs"]
