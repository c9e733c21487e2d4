"""All studies of a project come onto one page."""

import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from analysis.project import MADE, Project, report
from tests.analysis.test_compare import compare

PROJECT = """
title: Everything & more
output: {output}
note: Two studies.
profile: [first, second]
parts:
  - title: Tuned
    note: With <equal> budgets.
    studies: [first]
  - title: Published
    studies: [second]
"""


@pytest.fixture
def folder(runs: Path, tmp_path: Path) -> Path:
    """Return a project of two studies, of other protocols."""
    folder = tmp_path / "results"
    for name, title in (("first", "A study"), ("second", "Another one")):
        for row in ("grok_adamw", "grok_aga"):
            shutil.copytree(runs / row, folder / name / row)
        (folder / name / "study.yaml").write_text(f"title: {title}\ntargets: [train/loss < 2.2]\n")
        (folder / name / "README.md").write_text("Commands.\n")
        shutil.rmtree(next((folder / name / "grok_adamw").glob("*seed42")))  # of another protocol
    for path in [path for name in ("config", "protocol") for path in (folder / "second").rglob(f"{name}.yaml")]:
        path.write_text(path.read_text().replace("train_fraction: 0.3", "train_fraction: 0.4"))
    with (folder / "first" / "study.yaml").open("a") as file:
        file.write("note: Settings of <its> own.\n")
    (folder / "project.yaml").write_text(PROJECT.format(output=tmp_path / "docs"))
    return folder


def test_the_page_has_every_study_with_its_result_picture_and_table(folder: Path, tmp_path: Path) -> None:
    project = Project.of([folder])
    assert project is not None
    report(project)
    page = (tmp_path / "docs" / "index.md").read_text()
    assert page.startswith(f"{MADE}\n# Everything & more\n\nTwo studies.\n")
    assert re.findall(r"^#+ .*", page, re.M)[1:] == [
        *("## Over all tasks", "### Cost by task"),
        *("## Tuned", "### A study", "#### At a glance", "## Published", "### Another one", "#### At a glance"),
    ]
    assert r"With \<equal\> budgets." in page
    for name in ("first", "second"):
        ElementTree.parse(tmp_path / "docs" / "pictures" / f"{name}.svg")
        assert f"(pictures/{name}.svg)" in page and f"{name}/README.md" in page
        assert (tmp_path / "docs" / name / "report.html").is_file()
    html = (tmp_path / "docs" / "report.html").read_text()
    assert 'href="first/report.html"' in html and "With &lt;equal&gt; budgets." in html
    # The note of a study is below its heading, and nowhere else.
    assert page.count(r"Settings of \<its\> own.") == html.count("<p>Settings of &lt;its&gt; own.</p>") == 1
    assert page.index("### A study") < page.index("Settings of") < page.index("## Published")
    anchors = re.findall(r'<section id="(.*?)"', html)
    assert len(anchors) == len(set(anchors)) and {"first-1", "second-1"} <= set(anchors)


def test_a_page_replaces_the_former_one_and_no_other_file(folder: Path, tmp_path: Path) -> None:
    project = Project.of([folder])
    assert project is not None
    report(project)
    before = (tmp_path / "docs" / "index.md").read_text()
    with (tmp_path / "docs" / "index.md").open("a") as page:
        page.write("![of a study that is no longer there](pictures/gone.svg)\n")
    for name in ("gone", "user"):
        (tmp_path / "docs" / "pictures" / f"{name}.svg").write_text("kept, if it is the user's")
    (tmp_path / "docs" / "notes.txt").write_text("kept")
    report(project)
    assert (tmp_path / "docs" / "index.md").read_text() == before
    assert not (tmp_path / "docs" / "pictures" / "gone.svg").exists()
    assert (tmp_path / "docs" / "pictures" / "user.svg").exists()
    assert (tmp_path / "docs" / "notes.txt").read_text() == "kept"


def test_a_users_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# My notes\n")
    result = compare(folder)
    assert result.code == 1
    assert "is not empty and has no report: name another folder" in result.err.splitlines()[-1]
    assert (tmp_path / "docs" / "index.md").read_text() == "# My notes\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("studies: [first]", "studies: [frist]"),
        ("parts:", "part:"),
        ("note: Two", "colour: blue\nnote: Two"),
        ("title: Everything", "title: [a, b"),
        ("title: Tuned", "notes: Tuned"),
        ("studies: [first]", "studies: first"),
        ("profile: [first, second]", "profile: [first, third]"),
    ],
)
def test_a_wrong_project_is_refused_in_one_sentence(text: str, message: str, folder: Path) -> None:
    file = folder / "project.yaml"
    file.write_text(file.read_text().replace(text, message))
    result = compare(folder)
    assert result.code == 1
    last = result.err.splitlines()[-1]
    assert last.startswith("error: ") and "project.yaml" in last
    if "frist" in message:
        assert last.endswith("names frist, which has no study.yaml; did you mean first?")


@pytest.mark.parametrize("option", [("--baseline", "adamw"), ("--unfinished",), ("--title", "Other")])
def test_options_of_a_single_report_are_refused(option: tuple[str, ...], folder: Path) -> None:
    result = compare(folder, *option)
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith(f"error: {option[0]} is for a single report")


def test_the_command_reports_the_project_where_it_is_told_to(folder: Path, tmp_path: Path) -> None:
    result = compare(folder, "--output", tmp_path / "elsewhere")
    assert result.code == 0, result.err
    assert result.out.splitlines() == [
        f"2 studies in {tmp_path / 'elsewhere' / 'index.md'}",
        f"report: {tmp_path / 'elsewhere' / 'report.html'}",
    ]
    assert "reporting studies" in result.err


def test_a_report_that_failed_can_be_made_again(folder: Path, tmp_path: Path) -> None:
    labels = folder / "second" / "study.yaml"
    right = labels.read_text()
    labels.write_text(f"{right}labels: {{nobody: Somebody}}\n")
    failed = compare(folder)
    assert failed.code == 1 and "no row is named nobody" in failed.err.splitlines()[-1]
    labels.write_text(right)
    assert compare(folder).code == 0
    assert "### Another one" in (tmp_path / "docs" / "index.md").read_text()


def test_links_lead_from_the_page_to_the_study_and_a_study_may_have_no_text(folder: Path, tmp_path: Path) -> None:
    (folder / "second" / "README.md").unlink()
    (folder / "first" / "verdict.md").write_text("A verdict.\n")
    assert compare(folder, "--output", tmp_path / "a" / "b").code == 0
    page = (tmp_path / "a" / "b" / "index.md").read_text()
    links = re.findall(r"^More: (.*)", page, re.M)
    targets = [re.findall(r"\]\((.*?)\)", line) for line in links]
    assert [len(found) for found in targets] == [2, 0]
    assert all((tmp_path / "a" / "b" / target).resolve().is_file() for found in targets for target in found)
