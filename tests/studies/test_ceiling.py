import json
import math
import re
import sys
from copy import deepcopy
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from scipy import stats

from studies import ceiling, ceiling_rows
from tests.analysis.runs import unpack
from tests.helpers.commands import ROOT

# The logarithm of each row's measure on four seeds, relative to Base.
NOISE = (0.004, -0.003, 0.001, -0.002)
LOGS = {
    "base": (0.0, 0.1, -0.1, 0.05),
    "base_averaged": tuple(x - 0.03 + n for x, n in zip((0.0, 0.1, -0.1, 0.05), NOISE, strict=True)),
    "late_short": tuple(x - 0.05 - n for x, n in zip((0.0, 0.1, -0.1, 0.05), NOISE, strict=True)),
    "sync": tuple(x + n / 2 for x, n in zip((0.0, 0.1, -0.1, 0.05), NOISE, strict=True)),
}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Return a folder with winners' runs of four rows, and two trials of one."""
    run = next(path.parent for path in unpack("runs", tmp_path / "made").rglob("summary.json"))
    folder = tmp_path / "study"
    for row, logs in LOGS.items():
        for seed, log in enumerate(logs):
            write(run, folder / row / f"final-{seed}", row, seed, None, 1 - math.exp(log) / 2)
    for trial in (0, 1):
        write(run, folder / "base" / f"trial-{trial}", "base", 1000, trial, None)
    return folder


def write(run: Path, target: Path, row: str, seed: int, trial: int | None, accuracy: float | None) -> None:
    target.mkdir(parents=True)
    (target / "metrics.csv").write_bytes((run / "metrics.csv").read_bytes())
    config = yaml.safe_load((run / "config.yaml").read_text())
    config |= {"seed_everything": seed, "sweep": {"name": "ceiling", "optimizer": row, "trial": trial}}
    config["data"]["init_args"]["seed"] = seed
    config["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 0.001 * (
        1 + [*LOGS, "base_at_late"].index(row) + (trial or 0) / 10
    )
    (target / "config.yaml").write_text(yaml.safe_dump(config))
    summary = json.loads((run / "summary.json").read_text())
    if accuracy is not None:
        summary["test"] = {"test/accuracy": accuracy}
    (target / "summary.json").write_text(json.dumps(summary))


def test_the_stated_tests_are_paired_and_adjusted_over_all_of_them(study: Path) -> None:
    finals, trials = ceiling_rows.winners([study])
    assert {row: len(runs) for row, runs in finals.items()} == dict.fromkeys(LOGS, 4)
    assert len(trials["base"]) == 2
    rows = ceiling_rows.by_family(finals)
    averaged, late, sync = ceiling_rows.tests_of(ceiling.STATED, rows, ceiling_rows.ERROR)
    assert (late.family, late.reference) == ("late", "base")
    assert late.ratio.mean == pytest.approx(math.exp(-0.05), rel=1e-9)
    p = [
        stats.ttest_rel(LOGS["late_short"], LOGS["base_averaged"]).pvalue,
        stats.ttest_rel(LOGS["late_short"], LOGS["base"]).pvalue,
        stats.ttest_rel(LOGS["sync"], LOGS["base"]).pvalue,
    ]
    assert [one.effect.p for one in (averaged, late, sync)] == pytest.approx(p, rel=1e-6)
    assert p[1] < p[0] < p[2]
    assert [one.p for one in (averaged, late, sync)] == pytest.approx(
        [2 * p[0], 3 * p[1], max(2 * p[0], p[2])], rel=1e-6
    )
    assert [one.verdict for one in (averaged, late, sync)] == [
        "better, maybe by less than 1 %",
        "better",
        "equal within 1 %",
    ]

    # A test whose runs are missing counts all the same.
    (alone,) = ceiling_rows.tests_of(ceiling.STATED, {row: rows[row] for row in ("late", "base")}, ceiling_rows.ERROR)
    assert alone.p == pytest.approx(3 * p[1], rel=1e-6)


def test_the_luck_of_the_search_is_of_the_first_run_of_each_trial(study: Path) -> None:
    trials = ceiling_rows.winners([study])[1]
    (once,) = ceiling_rows.searched(trials, "base", ceiling_rows.ERROR)
    assert once == [1 - run.best("val/accuracy", False) for run in trials["base"][::-1]] and len(once) == 2
    later = [deepcopy(run) for run in trials["base"]]  # on a further seed
    for run in later:
        run.log["val/accuracy"] = run.log["val/accuracy"] / 2
    (again,) = ceiling_rows.searched({"base": [*trials["base"], *later]}, "base", ceiling_rows.ERROR)
    assert sorted(again) == sorted(once)
    assert (
        len(ceiling_rows.searched({"late": trials["base"], "late_short": trials["base"]}, "late", ceiling_rows.ERROR))
        == 2
    )


def test_the_ratio_of_seconds_is_the_geometric_mean_over_common_seeds(study: Path) -> None:
    rows = ceiling_rows.by_family(ceiling_rows.winners([study])[0])
    slower = {seed: deepcopy(run) for seed, run in rows["base"].items()}
    for run, factor in zip(slower.values(), (2.0, 2.0, 2.0, 4.0), strict=True):
        run.log["cost/training_seconds"] = run.log["cost/training_seconds"] * factor
    low, high = (math.exp(x) for x in stats.t.interval(0.95, 3, 1.25 * math.log(2), 0.25 * math.log(2)))
    of, both = ceiling_rows.training_seconds, {"late": slower, "base": rows["base"]}
    assert ceiling.ratio(both, "late", "base", of, 3) == f"{2**1.25:.3g} [{low:.3g}, {high:.3g}]"
    assert ceiling.ratio(both, "base", "base", of, 3) == "1"
    assert ceiling.ratio(both, "late", "base_averaged", of, 3) == "-", "no runs"
    assert ceiling.ratio({"late": {"0": slower["0"]}, "base": rows["base"]}, "late", "base", of, 3) == "-"


def test_the_table_counts_the_runs_whose_last_validation_is_the_best(study: Path) -> None:
    rows = ceiling_rows.by_family(ceiling_rows.winners([study])[0])
    for seed, last in (("0", 0.1), ("1", 0.3)):
        rows["base"][seed].log["val/accuracy"][-2:] = 0.2, last
    table = ceiling.tables(rows, dict.fromkeys(rows, "800"), {}, ceiling_rows.ERROR)[-1]
    (base,) = [line for line in table.rows if line[0] == "Base"]
    assert base[table.columns.index("last is best")] == "3 of 4"


def test_a_table_of_comparisons_without_any_is_left_out(study: Path) -> None:
    rows = ceiling_rows.by_family(ceiling_rows.winners([study])[0])
    made = ceiling.tables(rows, dict.fromkeys(rows, "800"), {}, ceiling_rows.ERROR)
    assert [table.title for table in made] == ["Stated tests", "All rows"]


def test_winners_of_both_budgets_of_a_family_are_an_error(study: Path) -> None:
    finals = ceiling_rows.winners([study])[0]
    with pytest.raises(ValueError, match="both budgets of late have runs of winners"):
        ceiling_rows.by_family({**finals, "late": finals["late_short"]})


def test_the_command_writes_the_verdict_and_its_picture_beside_the_runs(study: Path) -> None:
    with patch.object(sys, "argv", ["ceiling", str(study)]):
        ceiling.main()
    text = (study / "verdict.md").read_text()
    assert "late against Base, averaged" in text and "equal within 1 %" in text
    rows = [line for line in text.splitlines() if line.startswith(("| late |", "| Base |"))]
    assert [line.split(" | ")[0] for line in rows] == ["| late", "| Base"], "the best row is first"
    late, base = (line.split(" | ")[4:6] for line in rows)
    assert late[0].startswith("0.9512 [") and late[1].startswith("0.9802 ["), "to Base and to Base with averaging"
    assert base[0] == "1" and base[1].startswith("1.03 [")
    assert rows[1].endswith("| 2 |")
    assert (study / "verdict.svg").read_text().count("<svg") == 1


def test_controls_in_a_second_folder_are_tested_by_themselves(study: Path, tmp_path: Path) -> None:
    run = next(path.parent for path in (tmp_path / "made").rglob("summary.json"))
    for seed, log in enumerate(LOGS["late_short"]):
        accuracy = 1 - math.exp(log - 0.02 + NOISE[seed]) / 2
        write(run, tmp_path / "controls" / f"final-{seed}", "base_at_late", seed, None, accuracy)
    write(run, tmp_path / "controls" / "trial", "base_at_late", 1000, 1, None)
    with patch.object(sys, "argv", ["ceiling", str(study), str(tmp_path / "controls")]):
        ceiling.main()
    lines = (study / "verdict.md").read_text().splitlines()
    (control,) = [line for line in lines if "late against Base (settings of late)" in line]
    assert control.split(" | ")[2].startswith("1.02 [")
    (row,) = [line for line in lines if line.startswith("| Base (settings of late) | ")]
    assert row.endswith(" | - | - |"), "nothing was searched"
    rows = ceiling_rows.by_family(ceiling_rows.winners([study, tmp_path / "controls"])[0])
    (test,) = ceiling_rows.tests_of(ceiling.CONTROLS, rows, ceiling_rows.ERROR)
    p = stats.ttest_1samp([0.02 - n for n in NOISE], 0.0).pvalue
    assert (test.effect.p, test.p) == pytest.approx((p, 4 * p), rel=1e-6)
    assert not (tmp_path / "controls" / "verdict.md").exists()


@pytest.mark.parametrize("page", ["README.md", "docs/speed_and_ceiling.md"])
def test_the_tables_shown_are_those_of_the_committed_verdicts(page: str) -> None:
    columns = {
        "WikiText-2": "ceiling_language",
        "CIFAR-10": "ceiling_cifar",
        "CIFAR-10 augmented": "ceiling_cifar_augmented",
        "800 evaluations": "ceiling_cifar_augmented",
        "1,600 evaluations": "ceiling_cifar_augmented_long",
    }
    compared = 0
    for table in re.findall(r"^\| row \|.*\n(?:\|.*\n)+", (ROOT / page).read_text(), re.M):
        heads, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
        for place, head in enumerate(heads):
            study = columns.get(head.split(", ")[-1])
            if study is None or not head.startswith("test"):
                continue
            verdict = (ROOT / "results" / study / "verdict.md").read_text()
            for name, *cells in rows:
                shown = numbers(cells[place - 1])
                if not shown or name == "Base, control":
                    continue
                row = re.escape(re.sub(r" \(.*", "", name))
                (made,) = re.findall(rf"^\| {row} \| [\d,]+ \| \d+ \| (.*?) \|", verdict, re.M)
                percent = 100 if "%" in cells[place - 1] else 1
                # The page has one decimal of percent and of perplexity.
                assert shown == pytest.approx([percent * value for value in numbers(made)], abs=0.051), name
                compared += 1
    assert compared == {"README.md": 23, "docs/speed_and_ceiling.md": 27}[page]


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]


def test_a_folder_without_winners_is_an_error_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with patch.object(sys, "argv", ["ceiling", str(tmp_path)]), pytest.raises(SystemExit):
        ceiling.main()
    assert "has no runs of winners yet: continue its sweep" in capsys.readouterr().err
