"""compare.py as it is typed."""

import re
from pathlib import Path

import pytest

from tests.callbacks.test_wandb_run import of, read
from tests.helpers.commands import AGA, TINY, Result, fit, python


def compare(*arguments: object, home: Path) -> Result:
    return python("compare.py", *arguments, home=home, timeout=120)


def test_runs_become_a_report(tmp_path: Path) -> None:
    for seed in (0, 1):
        fit(tmp_path / "runs", *AGA, *TINY, "--seed_everything", seed, "--data.seed", seed)
    target = ("--target", "train/loss < 1000", "--title", "Two seeds")
    missing = tmp_path / "missing"
    folders = (tmp_path / "runs", missing, "--output", tmp_path / "out")
    result = compare(*folders, *target, "--wandb", "mine", home=tmp_path)
    assert result.code == 0
    assert "reading runs" in result.err and "writing tables and pictures" in result.err
    for option, wrong, right in (("--baseline", "ars_aga", "ars2_aga"), ("--target", "val/acc < 1", "val/accuracy")):
        refused = compare(tmp_path / "runs", option, wrong, "--output", tmp_path / "refused", home=tmp_path)
        assert refused.code == 1
        assert refused.err.splitlines()[-1].endswith(f"{option}; did you mean {right}?")
    unwritable = compare(tmp_path / "runs", "--output", "/proc/report", home=tmp_path)
    assert (unwritable.code, unwritable.err.splitlines()[-1]) == (1, "error: /proc/report: No such file or directory")
    assert not (tmp_path / "refused").exists()
    assert "2 runs in 1 rows" in result.out
    assert "At most 2 seeds a row: nothing here is settled." in result.out
    assert re.search(
        r"train/loss < 1000 after [\d,]+ \[[\d,]+, [\d,]+\] gradient evaluations \(2 of 2 runs", result.out
    )
    *_, place, upload = result.out.splitlines()
    assert place == f"report: {tmp_path / 'out' / 'report.html'}"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h1>Two seeds</h1>" in page
    assert str(missing) in page
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.html", "report.md", "report.tex", "runs.csv", "pictures", "wandb"}
    # Without a key the report is recorded offline: the page, and the folder as an artifact.
    assert re.fullmatch(r"upload the report with: wandb sync .*offline-run-.*", upload)
    records = read(tmp_path / "out")
    (artifact,) = of("artifact", records)
    contents = {entry["path"].partition("/")[0] for entry in artifact["manifest"]["contents"]}
    assert (artifact["type"], contents) == ("report", names - {"wandb"})
    assert of("run", records)[0]["job_type"] == "report"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nothing"], 1, "there is no finished run in nothing, such as nothing: there is no such folder"),
        (["nothing", "--target", "val/loss is small"], 2, "a target is a metric, >= or <, and a number"),
        (["nothing", "--baseline"], 2, "expected one argument"),
    ],
)
def test_errors_are_one_sentence(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    result = compare(*arguments, "--output", tmp_path / "out", home=tmp_path)
    assert result.code == code
    assert message in result.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
