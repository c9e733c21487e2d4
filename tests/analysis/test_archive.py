"""Archives of runs: whole, the same bytes every time, and read like the folder that they were packed from."""

import zipfile
from pathlib import Path

import pytest

from analysis.archive import FILES, pack, unpacked
from analysis.rows import group
from analysis.runs import read
from tests.analysis.runs import EPOCHS, copy, cut


def test_the_same_runs_give_the_same_bytes_without_weights(runs: Path, tmp_path: Path) -> None:
    packed = pack(runs, tmp_path / "a.zip")
    assert packed == pack(runs, tmp_path / "b.zip") == len(list(runs.glob("*/*/config.yaml")))
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        names = archive.namelist()
    assert names == sorted(names)
    assert {Path(name).name for name in names} <= set(FILES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "b.zip"]


def test_an_archive_is_read_like_its_folder(runs: Path, tmp_path: Path) -> None:
    archive = tmp_path / "runs.zip"
    pack(runs, archive)
    with unpacked([archive]) as (folders, shown):
        (place,) = folders
        found, problems = read(folders, shown)
    assert not place.exists()
    expected, expected_problems = read([runs])
    assert [run.shown for run in found] == [archive / run.folder.relative_to(runs) for run in expected]
    assert len(problems) == len(expected_problems)
    for run, same in zip(found, expected, strict=True):
        assert run.log.equals(same.log)
        assert run.identity.setting_digest == same.identity.setting_digest


def test_a_file_that_is_no_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no archive")
    with (
        pytest.raises(ValueError, match=r"notes\.txt is neither a folder nor an archive"),
        unpacked([tmp_path / "notes.txt"]),
    ):
        pass


def test_a_failed_pack_leaves_the_former_archive_as_it_was(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(runs, tmp_path / "runs.zip")
    former = (tmp_path / "runs.zip").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(OSError, match="No space left"):
        pack(runs, tmp_path / "runs.zip")
    assert (tmp_path / "runs.zip").read_bytes() == former
    assert [path.name for path in tmp_path.iterdir()] == ["runs.zip"]


def test_unfinished_runs_are_rows_of_their_own_that_say_how_far_they_got(runs: Path, tmp_path: Path) -> None:
    whole = min((runs / "grok_aga").iterdir())
    half = copy(whole, tmp_path, "half-seed9")
    rows = (half / "metrics.csv").read_text().splitlines()
    cut(half, len(rows) // 2)
    paths = [whole, half.parent]
    finished, problems = read(paths)
    assert [run.folder for run in finished] == [whole]
    assert any("half-finished" in problem.reason for problem in problems)
    (alone,), _ = read([half], unfinished=True)
    assert 0 < alone.epochs < EPOCHS
    (table,) = group([*finished, alone])
    assert sorted(row.label for row in table.rows) == ["grok_aga", f"grok_aga, {alone.epochs} of {EPOCHS} epochs"]
