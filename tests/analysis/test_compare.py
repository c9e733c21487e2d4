"""Run compare.py as it is typed."""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.comparison import baseline
from analysis.glance import at_a_glance
from analysis.project import Project
from analysis.protocol import protocol_words
from analysis.report import read_groups
from analysis.study import Study
from analysis.tables import markdown_text
from analysis.verdict import headlines
from compare import main
from tests.callbacks.test_wandb_run import of, read
from tests.helpers.commands import AGA, ROOT, TINY, Result, clean_environment, fit
from tests.helpers.marks import slow


def compare(*arguments: object) -> Result:
    """Run ``compare.py`` in this process."""
    out, err, given = io.StringIO(), io.StringIO(), sys.argv
    code: int | str | None
    sys.argv = ["compare.py", *map(str, arguments)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main()
        except SystemExit as leaving:
            code = leaving.code
        finally:
            sys.argv = given
    return Result(code, out.getvalue(), err.getvalue())


def without_a_key(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the user's key of Weights & Biases."""
    monkeypatch.setenv("HOME", str(home))
    for name in [name for name in os.environ if name.startswith(("WANDB", "NETRC"))]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("wandb", [(), slow(("--wandb", "project"))], ids=["local", "uploaded"])
def test_a_fresh_run_becomes_a_report(wandb: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path / "runs", *AGA, *TINY)
    without_a_key(tmp_path, monkeypatch)
    missing = tmp_path / "missing"
    folders = (tmp_path / "runs", missing, "--output", tmp_path / "out")
    result = compare(*folders, "--target", "train/loss < 1000", "--title", "One seed", *wandb)
    assert result.code == 0
    assert "reading runs" in result.err and "writing tables and pictures" in result.err
    assert "1 run in 1 row" in result.out
    assert "grok_aga is the only row." in result.out
    assert re.search(r"Gradient evaluations to train/loss < 1000: [\d,]+, from one seed\.", result.out)
    assert f"report: {tmp_path / 'out' / 'report.html'}" in result.out.splitlines()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h1>One seed</h1>" in page
    assert str(missing) in page
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names - {"wandb"} == {"report.html", "report.md", "report.tex", "runs.csv", "pictures"}
    if not wandb:
        return
    # Without a key the report is recorded offline: the page, and the folder as an artifact.
    assert re.fullmatch(r"upload the report with: wandb sync .*offline-run-.*", result.out.splitlines()[-1])
    records = read(tmp_path / "out")
    (artifact,) = of("artifact", records)
    contents = {entry["path"].partition("/")[0] for entry in artifact["manifest"]["contents"]}
    assert (artifact["type"], contents) == ("report", names - {"wandb"})
    assert of("run", records)[0]["job_type"] == "report"


def test_two_seeds_and_a_target_are_summed_up(runs: Path, tmp_path: Path) -> None:
    for row in ("grok_aga", "grok_adamw"):
        shutil.copytree(runs / row, tmp_path / row, ignore=shutil.ignore_patterns("*seed2", "*seed42"))
    result = compare(tmp_path, "--target", "train/loss < 1000", "--output", tmp_path / "out")
    assert result.code == 0
    assert "4 runs in 2 rows" in result.out
    least = r"grok_adamw has the lowest median of gradient evaluations to train/loss < 1000: [\d,]+ \[[\d,]+, [\d,]+\]"
    assert re.search(rf"{least}, over 2 seeds\. At most 2 seeds a row: nothing here is settled\.", result.out)


def test_a_wrong_name_is_refused_with_the_nearest_right_one(runs: Path, tmp_path: Path) -> None:
    for option, wrong, right in (("--baseline", "ars_aga", "ars2_aga"), ("--target", "val/acc < 1", "val/accuracy")):
        refused = compare(runs / "grok_aga", option, wrong, "--output", tmp_path / "refused")
        assert refused.code == 1
        assert refused.err.splitlines()[-1].endswith(f"{option}; did you mean {right}?")
    assert not (tmp_path / "refused").exists()
    unwritable = compare(runs / "grok_aga", "--output", "/proc/report")
    assert (unwritable.code, unwritable.err.splitlines()[-1]) == (1, "error: /proc/report: No such file or directory")


STUDY = """
title: Published & measured
baseline: grok_aga
targets: [train/loss < 1000]
labels: {grok_aga: ARS2-Neo AGA, grok_adamw: AdamW}
families: {AGA with luck: [aga]}
note: Three seeds.
"""


def test_a_study_states_the_options_and_the_command_line_wins(runs: Path, tmp_path: Path) -> None:
    for name in ("grok_adamw", "grok_aga", "search"):
        shutil.copytree(runs / name, tmp_path / "study" / name)
    shutil.rmtree(next((tmp_path / "study" / "grok_adamw").glob("*seed42")))
    (tmp_path / "study" / "study.yaml").write_text(STUDY)
    assert compare(tmp_path / "study", "--output", tmp_path / "out").code == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith("# Published & measured\n\nThree seeds.\n")
    assert "Paired seeds against ARS2-Neo AGA: train/loss < 1000" in text
    assert "| ratio of the best to AGA with luck |" in text
    given = ("--title", "Other", "--baseline", "grok_adamw", "--target", "train/loss < 999")
    assert compare(tmp_path / "study", *given, "--output", tmp_path / "out").code == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith("# Other\n")
    assert "Paired seeds against AdamW: train/loss < 999" in text and "< 1000" not in text
    # The options of one folder do not apply to another.
    assert Study.of([tmp_path / "study", tmp_path / "other"]) == Study.of([runs]) == Study()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("titel: a", "study.yaml has the option titel; valid options are title, baseline, targets, labels, families"),
        ("title: [a]", "study.yaml: title cannot be ['a']"),
        ("labels: {a: 1}", "study.yaml: labels cannot be {'a': 1}"),
        ("targets: [val/loss is small]", "a target is a metric, >= or <, and a number"),
        ("families: {a: b}", "study.yaml: families cannot be {'a': 'b'}"),
        ("families: {a: [1]}", "study.yaml: families cannot be {'a': [1]}"),
        ("also: elsewhere", "study.yaml: also cannot be 'elsewhere'"),
        ("also: [1]", "study.yaml: also cannot be [1]"),
        ("- a", "study.yaml has no options"),
        ("a: [", "study.yaml is not valid YAML"),
    ],
)
def test_a_wrong_study_is_an_error_in_one_sentence(content: str, message: str, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(content)
    result = compare(tmp_path, "--output", tmp_path / "out")
    assert (result.code, message in result.err) == (1, True)
    assert len(result.err.splitlines()) == 1


STUDIES = sorted(str(path.parent.relative_to(ROOT / "results")) for path in ROOT.glob("results/**/study.yaml"))


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_can_be_compared_with_its_options(study: str) -> None:
    folder = ROOT / "results" / study
    options = Study.of([folder])
    (entry,), problems = read_groups([folder], options)
    assert problems == []
    # The parts of a study share the text of the folder above.
    text = folder / "README.md" if (folder / "README.md").is_file() else folder.parent / "README.md"
    assert f"python compare.py results/{study}" in text.read_text()
    project = Project.of([ROOT / "results"])
    assert project is not None
    if study not in project.studies:  # its rows are in the tables of another
        assert folder in [
            path.resolve() for name in project.studies for path in Study.of([ROOT / "results" / name]).also
        ]
        return
    # The committed page of all results is what python compare.py results makes of these runs.
    page = " ".join((ROOT / "docs/results/index.md").read_text().split())
    reference = baseline(entry, options.baseline)
    for line in [*headlines(entry, reference), protocol_words(entry)]:
        assert " ".join(markdown_text(line).split()) in page
    rows = at_a_glance(entry, reference).markdown().splitlines()
    assert len(rows) > 4 and all(line in page for line in rows if line.startswith("| "))


def test_the_page_of_all_results_is_in_the_documentation() -> None:
    project = Project.of([ROOT / "results"])
    assert project is not None and project.output == Path("docs/results")
    assert "results/index.md" in (ROOT / "mkdocs.yml").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nothing"], 1, "there is no finished run in nothing, such as nothing: there is no such folder"),
        (["nothing", "--target", "val/loss is small"], 2, "a target is a metric, >= or <, and a number"),
        (["nothing", "--baseline"], 2, "expected one argument"),
    ],
)
def test_errors_are_one_sentence(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    result = compare(*arguments, "--output", tmp_path / "out")
    assert result.code == code
    assert message in result.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_command_needs_no_torch(runs: Path, tmp_path: Path) -> None:
    # A new interpreter: a forked one has torch from the start.
    code = "import sys, compare; code = compare.main(); sys.exit(code or 3 * ('torch' in sys.modules))"
    command = [sys.executable, "-c", code, str(runs / "grok_aga"), "--output", str(tmp_path / "out")]
    environment = clean_environment(tmp_path)
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "report.html").is_file()
