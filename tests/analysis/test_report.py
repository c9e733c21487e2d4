"""Test the report of real runs against numbers by hand; its page needs no network."""

import math
import re
import shutil
from copy import deepcopy
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.figure import Figure
from scipy import stats

from analysis.comparison import baseline, pairs, who_is_ahead
from analysis.curves import band, second_passes
from analysis.labels import value_text
from analysis.report import pictures, write
from analysis.results import is_share, metric_text, milestones, published, results, step_cost, to_target
from analysis.rows import Group, group
from analysis.runs import AXES, Problem, Run, read
from analysis.search_pictures import sensitivity
from analysis.statistics import bounded_interval, geometric_interval, mean_interval
from analysis.study import Study
from analysis.tables import Table
from analysis.tuning_budget import luck, options_of, searched_rows, searches_luck, tuning_budgets
from experiment.target import Target
from tests.analysis.runs import SEEDS, copy, cut, unpack


@pytest.fixture(scope="module")
def groups(runs: Path) -> list[Group]:
    found, problems = read([runs])
    assert problems == []
    return sorted(group(found), key=lambda entry: -len(entry.rows))


@pytest.fixture(scope="module")
def saved() -> list[Figure]:
    """Return the figures that were saved for the page, in order."""
    return []


@pytest.fixture(scope="module")
def page(groups: list[Group], saved: list[Figure], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    save = Figure.savefig

    def count(figure: Figure, *arguments: Any, **options: Any) -> None:
        saved.append(figure)
        save(figure, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", count)
        write(folder, groups, [Problem(Path("runs/<lost>"), "it has no config.yaml")], Study(title="A & B"))
    return folder


def in_results(entry: Group, label: str) -> list[str]:
    """Return the cells of a row of that label in the results."""
    (cells,) = [list(line) for line in results(entry).rows if line[0].startswith(label)]
    return cells


def test_protocols_never_share_a_table_and_seeds_of_a_setting_share_a_row(groups: list[Group]) -> None:
    first, second = groups
    assert first.digest != second.digest
    assert [sorted(entry.runs) for entry in second.rows] == [["42"]]
    by_label = {entry.label: entry for entry in first.rows}
    assert by_label.keys() == {"grok_adamw", "grok_aga", "aga of search"}
    assert sorted(by_label["grok_aga"].runs) == [str(seed) for seed in SEEDS]
    # Trials of a search are no rows.
    assert sorted(by_label["aga of search"].runs) == ["5"]


def test_settings_of_one_name_are_distinguished(tmp_path: Path) -> None:
    runs = read([unpack("settings", tmp_path)])[0]
    for labels, label in (({}, "grok_aga"), ({"grok_aga": "AGA"}, "AGA")):
        found = {entry.label for entry in group(runs, labels=labels)[0].rows}
        assert found == {f"{label}, optimizer.lr 0.001", f"{label}, optimizer.lr 0.002"}


def test_a_study_names_its_rows(groups: list[Group], runs: Path, tmp_path: Path) -> None:
    found, _ = read([runs])
    named = max(group(found, labels={"grok_adamw": "AdamW", "grok_aga": "AGA"}), key=lambda entry: len(entry.rows))
    assert {row.label for row in named.rows} == {"AdamW", "AGA", "aga of search"}
    for wanted in ("AdamW", "grok_adamw", "adamw"):
        reference = baseline(named, wanted)
        assert reference is not None and reference.label == "AdamW"
    assert [line[0] for line in results(named).rows if line[0].startswith("A")] == [
        row.label for row in named.rows if row.label.startswith("A")
    ]
    write(tmp_path / "report", groups[1:], [], Study(title="A study", note="Five & more."))
    assert "<p>Five &amp; more.</p>" in (tmp_path / "report" / "report.html").read_text()
    assert (tmp_path / "report" / "report.md").read_text().startswith("# A study\n\nFive & more.\n")


def test_callbacks_are_named_by_their_class_and_options() -> None:
    budget = {"class_path": "callbacks.evaluation_budget.EvaluationBudget", "init_args": {"gradient_evaluations": 9}}
    stop = {"class_path": "lightning.pytorch.callbacks.EarlyStopping"}
    assert value_text([stop, budget]) == "EarlyStopping and EvaluationBudget (gradient_evaluations 9)"
    assert (value_text([0.9, 0.95]), value_text(None)) == ("[0.9, 0.95]", "None")


def test_means_and_intervals_are_those_of_the_logs(groups: list[Group], runs: Path) -> None:
    best = [pd.read_csv(path / "metrics.csv")["val/accuracy"].max() for path in (runs / "grok_aga").iterdir()]
    mean = np.mean(best)
    low, high = stats.t.interval(0.95, len(best) - 1, mean, stats.sem(best))
    assert low < 0  # no share is
    # On the logit scale, whose derivative at the mean is 1 / (mean (1 - mean)).
    logit = np.log(mean / (1 - mean)) + np.array([low - mean, high - mean]) / (mean * (1 - mean))
    low, high = 100 / (1 + np.exp(-logit))
    cells = in_results(groups[0], "grok_aga")
    assert cells[1:4] == ["3", "none", "6"]
    assert cells[4] == f"{100 * mean:.2f} % [{low:.2f}, {high:.2f}]"


def test_milestones_are_medians_over_seeds(groups: list[Group], runs: Path) -> None:
    losses = [pd.read_csv(path / "metrics.csv")["train/loss"].dropna() for path in (runs / "grok_adamw").iterdir()]
    losses = [
        loss for loss, path in zip(losses, (runs / "grok_adamw").iterdir(), strict=True) if "seed42" not in path.name
    ]
    # Two of three seeds reach the second lowest of their last losses, one of them barely.
    level = sorted(loss.iloc[-1] for loss in losses)[1] * (1 + 1e-6)
    epochs = [next((epoch for epoch, value in enumerate(loss, 1) if value < level), None) for loss in losses]
    reached = sorted(epoch for epoch in epochs if epoch is not None)
    assert len(losses) == 3 and len(reached) >= 2
    shown = Group(
        **{**vars(groups[0]), "targets": [Target("half", "train/loss", level, lower=True)], "borrowed": False}
    )
    (cells,) = [line for line in milestones(shown).rows if line[0] == "grok_adamw"]  # type: ignore[union-attr]
    assert cells[1].startswith(f"{reached[1]} [{reached[0]}, ")
    never = Group(**{**vars(groups[0]), "targets": [Target("never", "train/loss", 0.0, lower=True)], "borrowed": False})
    assert {line[1] for line in milestones(never).rows} == {"not within 6"}  # type: ignore[union-attr]


def test_the_targets_of_a_task_of_ones_own_are_the_milestones_of_its_config(runs: Path, tmp_path: Path) -> None:
    folder = copy(min((runs / "grok_aga").iterdir()), tmp_path, "mine")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    thresholds = {"any": "val/accuracy >= 0.01", "never": "val/loss < -1"}
    callback = {"class_path": "callbacks.milestones.Milestones", "init_args": {"thresholds": thresholds}}
    config |= {"task": "mine", "trainer": {**config["trainer"], "callbacks": [callback]}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (entry,) = group(read([tmp_path])[0])
    assert [(target.name, str(target)) for target in entry.aims] == [*thresholds.items()]
    assert entry.goal == Target("never", "val/loss", -1.0, lower=True)
    table = milestones(entry)
    assert table is not None and table.columns == ["row", *thresholds.values()]
    (given,) = group(read([tmp_path])[0], targets=[Target("other", "val/loss", 1.0, lower=True)])
    assert [target.name for target in given.targets] == ["other"]


def test_pairs_are_scipys_paired_t_test(groups: list[Group], runs: Path) -> None:
    def best(experiment: str) -> dict[str, float]:
        found = [Run(path) for path in (runs / experiment).iterdir()]
        return {run.identity.seed: run.best("val/loss", True) for run in found}

    entry = Group(**{**vars(groups[0]), "metric": "val/loss", "lower": True})
    reference = baseline(entry, None)
    assert reference is not None and reference.label == "grok_adamw"
    aga, adamw = best("grok_aga"), {seed: v for seed, v in best("grok_adamw").items() if seed != "42"}
    test = stats.ttest_rel(*([values[str(seed)] for seed in SEEDS] for values in (aga, adamw)))
    quality, speed = pairs(entry, reference)
    (line,) = [line for line in quality.rows if line[0] == "grok_aga"]
    difference = np.mean([aga[str(seed)] - adamw[str(seed)] for seed in SEEDS])
    assert line[1] == "3"
    assert float(line[2].split()[0]) == pytest.approx(difference, rel=5e-3)
    assert float(line[3]) == pytest.approx(test.pvalue, rel=0.05)
    # One seed in common is no pair: "aga of search" ran on another seed altogether.
    (line,) = [line for line in quality.rows if line[0] == "aga of search"]
    assert line[1:] == ["0", "-", "-", "-", "-"]
    goal = entry.goal
    assert goal is not None
    costs = [
        {run.identity.seed: run.reached(goal, "cost/gradient_evaluations") for run in map(Run, (runs / row).iterdir())}
        for row in ("grok_aga", "grok_adamw")
    ]
    first = sum((costs[0][str(seed)] or np.inf) < (costs[1][str(seed)] or np.inf) for seed in SEEDS)
    second = sum((costs[0][str(seed)] or np.inf) > (costs[1][str(seed)] or np.inf) for seed in SEEDS)
    (line,) = [line for line in speed.rows if line[0] == "grok_aga"]
    assert line[1] == f"{first} / {second} / {3 - first - second}"


def test_ratios_of_every_cost_are_over_the_same_seeds(groups: list[Group], runs: Path) -> None:
    easy = Target("easy", "val/accuracy", 0.0)
    entry = Group(**{**vars(groups[0]), "targets": [easy]})
    reference = baseline(entry, None)
    assert reference is not None
    speed = list(pairs(entry, reference))[-1]
    (line,) = [line for line in speed.rows if line[0] == "grok_aga"]
    for axis, name in (
        ("cost/gradient_evaluations", "ratio of evaluations"),
        ("cost/optimizer_steps", "ratio of optimizer steps"),
        ("cost/training_seconds", "ratio of training seconds"),
    ):
        aga, adamw = (
            {run.identity.seed: run.reached(easy, axis) or 0.0 for run in map(Run, (runs / row).iterdir())}
            for row in ("grok_aga", "grok_adamw")
        )
        logs = [np.log(aga[str(seed)] / adamw[str(seed)]) for seed in SEEDS]
        ratio = float(line[speed.columns.index(name)].split(" [")[0])
        assert ratio == pytest.approx(np.exp(np.mean(logs)), rel=5e-3), name


def test_rows_without_common_seeds_are_not_compared(groups: list[Group]) -> None:
    by_label = {row.label: row for row in groups[0].rows}
    entry = Group(**{**vars(groups[0]), "rows": [by_label["grok_aga"], by_label["aga of search"]]})
    assert list(pairs(entry, entry.rows[0])) == []


def test_borrowed_targets_that_no_run_reached_are_not_goals(groups: list[Group]) -> None:
    targets = [Target("one", "train/loss", 100.0, lower=True), Target("never", "train/loss", 0.0, lower=True)]
    unborrowed = Group(**{**vars(groups[0]), "targets": targets, "borrowed": False})
    borrowed = Group(**{**vars(unborrowed), "borrowed": True})
    none = Group(**{**vars(borrowed), "targets": targets[1:]})
    assert groups[0].borrowed  # p = 7 is no published protocol
    assert [entry.aims for entry in (unborrowed, borrowed, none)] == [targets, targets[:1], []]
    assert [entry.goal for entry in (unborrowed, borrowed, none)] == [targets[1], targets[0], None]
    assert milestones(none) is None and to_target(none) is None


def test_step_costs_are_ratios_of_the_logs_last_row(groups: list[Group]) -> None:
    reference = baseline(groups[0], None)
    table = step_cost(groups[0], reference)
    assert table is not None and reference is not None
    lines = {line[0]: line for line in table.rows}
    run = next(entry for entry in groups[0].rows if entry.label == "aga of search").any
    last = pd.read_csv(run.shown / "metrics.csv").iloc[-1]
    steps = last["cost/optimizer_steps"]
    assert float(lines["aga of search"][1]) == pytest.approx(1000 * last["cost/training_seconds"] / steps, rel=5e-3)
    assert float(lines["aga of search"][3]) == pytest.approx(last["cost/gradient_evaluations"] / steps, rel=5e-3)
    assert (lines["grok_adamw"][2], lines["grok_adamw"][3]) == ("1", "1")
    assert "threads" in lines["grok_adamw"][6]


def test_a_column_of_flops_has_one_prefix(groups: list[Group]) -> None:
    entry = deepcopy(groups[0])
    entry.targets, entry.borrowed = [Target("any", "train/loss", 100.0, lower=True)], False
    for run in entry.rows[0].runs.values():
        run.log["cost/flops"] = 1000 * run.log["cost/flops"]
    for table, head in ((step_cost(entry, None), "FLOPs a step"), (to_target(entry), "FLOPs")):
        assert table is not None
        cells = [line[table.columns.index(head)] for line in table.rows]
        assert len(cells) > 1 and len({prefix for cell in cells for prefix in re.findall(r"[kMGTPE]?FLOP", cell)}) == 1


def test_the_baseline_can_be_chosen(groups: list[Group]) -> None:
    chosen = [baseline(groups[0], wanted) for wanted in ("grok_aga", "adamw", "nobody")]
    assert [row and row.label for row in chosen] == ["grok_aga", "grok_adamw", None]
    assert baseline(groups[1], None) is None  # a single row has nothing to be compared with


def test_the_tuning_budget_counts_every_trial_and_flags_unequal_budgets(
    groups: list[Group], runs: Path, tmp_path: Path
) -> None:
    (budget,) = tuning_budgets(groups[0])
    assert [line[:5] for line in budget.rows] == [["adamw", "3", "3", "0", "0"], ["aga", "2", "2", "0", "0"]]
    assert any(note.startswith("UNEQUAL BUDGETS") for note in budget.notes)
    costs = [
        pd.read_csv(path / "metrics.csv")["cost/gradient_evaluations"].max() for path in (runs / "search").iterdir()
    ]
    winner = 1  # is in the same folder, and no trial
    assert len(costs) == 5 + winner
    assert in_results(groups[0], "aga of search")[2] == "2"
    # A third trial of AGA without readable files makes the budgets equal; an unfinished one counts too.
    trial = next(run.shown for run in groups[0].sweeps["search", "aga"])
    folder = copy(trial, tmp_path, "lost")
    config = folder / "config.yaml"
    config.write_text(re.sub(r"trial: \d", "trial: 7", config.read_text()))
    (folder / "metrics.csv").unlink()
    short = copy(trial, tmp_path, "short")
    config = short / "config.yaml"
    config.write_text(re.sub(r"trial: \d", "trial: 8", config.read_text()))
    cut(short, 10)
    found, problems = read([runs, tmp_path])
    entry = max(group(found, problems), key=lambda entry: len(entry.rows))
    (budget,) = tuning_budgets(entry)
    assert [line[:5] for line in budget.rows] == [["adamw", "3", "3", "0", "0"], ["aga", "4", "2", "1", "1"]]


def test_equal_budgets_are_not_flagged(groups: list[Group]) -> None:
    entry = groups[0]
    equal = Group(**{**vars(entry), "sweeps": {key: trials[:2] for key, trials in entry.sweeps.items()}})
    (budget,) = tuning_budgets(equal)
    assert not any("UNEQUAL" in note for note in budget.notes)


def test_the_best_of_trials_that_are_drawn_again_has_a_known_distribution() -> None:
    # Every draw of equal trials is the same, and rows count together: the best of two policies.
    assert vars(luck([[3.0, 3.0], [2.0]], [[4.0] * 8])) == {"n": 3, "mean": 0.5, "low": 0.5, "high": 0.5}
    # One of 32 is missing from (31/32)^32 = 36 % of the draws, which then have the second best or none at all.
    only, second = [100.0, *[math.inf] * 31], [100.0, 300.0, *[400.0] * 30]
    assert vars(luck([only], [[200.0]])) == {"n": 32, "mean": 0.5, "low": 0.5, "high": math.inf}
    assert vars(luck([second], [[200.0]])) == {"n": 32, "mean": 0.5, "low": 0.5, "high": 2.0}
    # Of eight, both of the best two are missing from (6/8)^8 = 10 % of the draws; of a higher-is-better metric too.
    assert vars(luck([[0.9, 0.8, *[0.6] * 6]], [[0.5]], lower=False)) == {"n": 8, "mean": 1.8, "low": 1.2, "high": 1.8}


def test_the_luck_of_a_search_is_of_its_best_trials(groups: list[Group]) -> None:
    reference = baseline(groups[0], None)
    assert reference is not None and reference.optimizer == "adamw"
    entry = Group(**{**vars(groups[0]), "targets": []})
    (table,) = searches_luck(entry, reference, {})
    best = {
        name: max(run.best("val/accuracy", False) for run in entry.sweeps["search", name]) for name in ("adamw", "aga")
    }
    adamw, aga = table.rows
    assert (adamw[0], adamw[1], adamw[3]) == ("adamw", "3", "1") and aga[:2] == ["aga of search", "2"]
    assert aga[3].startswith(f"{best['aga'] / best['adamw']:.3g} [")
    # A trial that ran again on another seed is still one trial, and its first run counts.
    again = [deepcopy(run) for run in entry.sweeps["search", "adamw"]]
    for run in again:
        run.log["val/accuracy"] = run.log["val/accuracy"] * 2
    sweeps = {**entry.sweeps, ("search", "adamw"): [*entry.sweeps["search", "adamw"], *again]}
    (same,) = searches_luck(Group(**{**vars(entry), "sweeps": sweeps}), reference, {})
    assert same.rows == table.rows
    never = Group(**{**vars(entry), "targets": [Target("never", "train/loss", 0.0, lower=True)], "borrowed": False})
    (nothing,) = searches_luck(never, reference, {})
    assert [line[2:] for line in nothing.rows] == [["-", "1"], ["-", "-"]]


def test_rows_of_a_search_count_together_only_where_the_study_says_so(groups: list[Group]) -> None:
    reference = baseline(groups[0], None)
    assert reference is not None
    adamw, aga = (groups[0].sweeps["search", name] for name in ("adamw", "aga"))
    # The second row has the optimizer of the first, as with another policy, but runs of its own.
    sweeps = {("search", "adamw"): adamw[:1], ("search", "adamw_other"): adamw[1:], ("search", "aga"): aga}
    entry = Group(**{**vars(groups[0]), "targets": [], "sweeps": sweeps})
    (apart,) = searches_luck(entry, reference, {})
    assert [line[:2] for line in apart.rows] == [["adamw", "1"], ["adamw_other", "2"], ["aga of search", "2"]]
    assert apart.rows[0][3] == "1" and "[" in apart.rows[1][3]
    (together,) = searches_luck(entry, reference, {"AdamW": ["adamw", "adamw_other"]})
    (as_one,) = searches_luck(Group(**{**vars(groups[0]), "targets": []}), reference, {})
    assert together.rows[0] == ["AdamW", *as_one.rows[0][1:]]
    assert together.columns[-1] == "ratio of the best to AdamW"
    assert together.rows[1][3].split(" [")[0] == as_one.rows[1][3].split(" [")[0]


def test_sensitivity_has_a_point_a_trial(groups: list[Group]) -> None:
    points = sensitivities(groups[0], "search", best_of(groups[0]))
    assert points.keys() == {"model.optimizer.lr"}  # nothing else was varied
    rates = {name: [rate for rate, _ in by] for name, by in points["model.optimizer.lr"].items()}
    assert rates == {"adamw": [0.003, 0.01, 0.03], "aga": [0.001, 0.01]}
    trials = groups[0].sweeps["search", "aga"]
    assert {best for _, best in points["model.optimizer.lr"]["aga"]} == {
        run.best("val/accuracy", False) for run in trials
    }
    # A picture of the best metric, and one of the evaluations to the goal: every trial is in it, reached or not.
    _, cost = plots.sensitivity(groups[0], "search")
    assert groups[0].goal is not None
    drawn = [(line.get_markerfacecolor() == "none", len(line.get_xdata())) for line in cost.axes[0].lines]
    reached = [
        sum(run.reached(groups[0].goal) is not None for run in groups[0].sweeps["search", name]) for name in rates
    ]
    assert drawn == [(False, reached[0]), (False, reached[1]), (True, 3 - reached[0]), (True, 2 - reached[1])]
    assert sum(reached) > 0


def test_published_numbers_stand_beside_runs_of_their_settings_alone(groups: list[Group]) -> None:
    # The published protocol has another p than 7.
    assert published(groups[0]) is None
    entry = groups[0]
    shown = Group(**{**vars(entry), "published": _published()})
    table = published(shown)
    assert table is not None
    lines = {line[0]: line for line in table.rows}
    # The published AdamW has another learning rate than the runs here; AGA has the same one.
    assert "AdamW: no run here" in lines
    assert lines["ARS2-Neo AGA: measured (grok_aga)"][1:3] == ["3", "6"]
    assert lines["ARS2-Neo AGA: later report"][3:8] == ["12", "-", "77", "116", "234"]
    assert not any("aga of search" in name for name in lines)
    others = [row for row in entry.rows if "grok_aga" not in row.label]
    assert others and published(Group(**{**vars(shown), "rows": others})) is None


def _published() -> dict[str, object]:
    import yaml

    from analysis.rows import PUBLISHED

    entry: dict[str, object] = yaml.safe_load(PUBLISHED.read_text())["modular_addition"]
    return entry


def test_percent_is_used_for_shares_only() -> None:
    assert is_share("val/accuracy") and not is_share("val/perplexity")
    assert metric_text("val/accuracy", mean_interval([0.5])) == "50.00 %"
    assert metric_text("val/perplexity", mean_interval([90.69])) == "90.69"


def test_an_interval_of_a_share_stays_between_nothing_and_everything(groups: list[Group]) -> None:
    (row, *_), metric = groups[0].rows, "val/accuracy"
    scattered = {"0": 0.5, "1": 0.99, "2": 0.98}
    low, high = stats.t.interval(0.95, 2, np.mean(list(scattered.values())), stats.sem(list(scattered.values())))
    assert low < 1 < high
    row = replace(row)
    row.best = lambda metric, lower: scattered  # type: ignore[method-assign]
    entry = Group(**{**vars(groups[0]), "rows": [row], "metric": metric})
    found = bounded_interval([*scattered.values()], 1.0)
    assert found.low is not None and found.high is not None and 0 < found.low < found.mean < found.high < 1
    assert results(entry).rows[0][4] == f"82.33 % [{100 * found.low:.2f}, {100 * found.high:.2f}]"


def test_a_test_after_training_has_a_column(groups: list[Group]) -> None:
    entry = deepcopy(groups[0])
    assert not any(head.startswith("test/") for head in results(entry).columns)
    tested = next(row for row in entry.rows if len(row.runs) == 3)
    for number, run in enumerate(tested.runs.values()):
        run.log["test/accuracy"] = np.append(np.full(len(run.log["epoch"]) - 1, np.nan), 0.5 + number / 10)
    table = results(entry)
    place = list(table.columns).index("test/accuracy")
    assert [cells[place][:7] for cells in table.rows] == ["60.00 %" if row is tested else "-" for row in entry.rows]


def test_a_time_has_no_interval_below_zero() -> None:
    scattered = [200.0, 210.0, 1800.0]
    assert mean_interval(scattered).low < 0  # type: ignore[operator]
    logs = np.log(scattered)
    expected = np.exp(stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs)))
    found = geometric_interval(scattered)
    assert found.mean == pytest.approx(stats.gmean(scattered))
    assert (found.low, found.high) == pytest.approx(tuple(expected))


def test_a_metric_that_runs_were_stopped_on_is_not_tested(groups: list[Group]) -> None:
    by_label = {row.label: row for row in groups[0].rows}
    adamw, aga = by_label["grok_adamw"], by_label["grok_aga"]
    assert not groups[0].stopped_on(adamw, "val/accuracy")
    # "full" is 99 % of val/accuracy: a run that reaches it has it as the best value.
    stopped = [Run(run.folder) for run in aga.runs.values()]
    for run in stopped:
        assert run.stopped_at is None
        run.log["milestone/full"] = np.full(len(run.log["epoch"]), float(run.epochs))
        assert run.stopped_at == "full"
    aga = replace(aga, runs={run.identity.seed: run for run in stopped})
    entry = Group(**{**vars(groups[0]), "rows": [adamw, aga]})
    assert entry.stopped_on(aga, "val/accuracy") and not entry.stopped_on(aga, "val/loss")
    titles = [table.title for table in pairs(entry, adamw)]
    assert titles == [f"Paired seeds against grok_adamw: {entry.goal}"]
    by_loss = Group(**{**vars(entry), "metric": "val/loss", "lower": True})
    assert "Paired seeds against grok_adamw: best val/loss" in [table.title for table in pairs(by_loss, adamw)]


def test_no_two_rows_have_the_same_style() -> None:
    rows = range(len(plots.COLOURS) * len(plots.STYLES))
    assert len(rows) >= 14
    for choose in (plots.style, plots.mark):
        assert len({tuple(choose(index).values()) for index in rows}) == len(rows)


def test_trials_differ_in_colour_and_marker(groups: list[Group]) -> None:
    figures = plots.sensitivity(groups[0], "search")
    for figure in figures:
        lines = [line for line in figure.axes[0].lines if not str(line.get_label()).startswith("_")]
        assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines) == 2


def test_each_figure_is_drawn_once(page: Path, saved: list[Figure]) -> None:
    with_legend = len(list((page / "pictures").glob("*-epoch.svg"))) * 2
    # Only the two separate figures with a legend are saved again.
    assert len(saved) == (page / "report.html").read_text().count("<svg") + with_legend
    assert all(figure.get_layout_engine() is None for figure in saved)  # that would draw each of them twice


def test_names_break_between_words_and_intervals_keep_together() -> None:
    text = Table("A", ["row", "value"], [["periodic_hidden", "99.38 % [99.22, 99.54]"]]).html()
    assert "periodic_<wbr>hidden" in text
    assert "99.38\xa0% [99.22,\xa099.54]" in text


def test_bands_end_where_the_shortest_run_does() -> None:
    long, short = np.arange(1.0, 11.0), np.arange(1.0, 6.0)
    x, mean, low, high = band([(long, long), (short, 3 * short), (short, 2 * short)])
    assert (x[0], x[-1]) == (1, 5)
    middle = np.abs(x - 3).argmin()
    assert mean[middle] == pytest.approx(2 * x[middle])
    expected = mean_interval([x[middle], 2 * x[middle], 3 * x[middle]])
    assert (low[middle], high[middle]) == pytest.approx((expected.low, expected.high))


def test_second_passes_are_drawn_for_rows_that_make_some(groups: list[Group]) -> None:
    by_label = {entry.label: entry for entry in groups[0].rows}
    figure = second_passes(by_label["grok_aga"])
    assert figure is not None
    # Every step was logged: each second pass is a line over the loss.
    run = by_label["grok_aga"].any
    _, rate = run.curve("flatness/trigger_rate", "cost/optimizer_steps")
    over_loss = figure.axes[0].lines
    assert len(over_loss) == 1 + int((rate > 0).sum())
    assert second_passes(by_label["grok_adamw"]) is None


class Page(HTMLParser):
    """Collect ids, links and everything that a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("href", "src", "srcset", "data", "action", "poster", "xlink:href"):
                self.links.append(str(value))
        assert tag not in ("script", "link", "iframe", "object", "embed", "img")


def test_the_page_loads_nothing_from_elsewhere(page: Path) -> None:
    text = (page / "report.html").read_text()
    parsed = Page(text)
    assert all(link.startswith("#") for link in parsed.links)
    # The only addresses are names of XML dialects, which no browser loads.
    assert set(re.findall(r"https?://[^\s\"'<>)]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", text))


def test_every_id_is_unique_and_every_reference_leads_somewhere(page: Path) -> None:
    text = (page / "report.html").read_text()
    parsed = Page(text)
    assert len(parsed.ids) == len(set(parsed.ids))
    references = (
        [link[1:] for link in parsed.links] + re.findall(r"url\(#(.*?)\)", text) + re.findall(r'for="(.*?)"', text)
    )
    assert set(references) <= set(parsed.ids)


def test_the_page_has_every_axis_every_table_and_every_problem(page: Path, groups: list[Group]) -> None:
    text = (page / "report.html").read_text()
    assert "<title>A &amp; B</title>" in text
    for name in AXES.values():
        assert f">{name}</label>" in text
    for metric in ("val/accuracy", "train/loss", "val/loss"):
        for name in AXES.values():
            assert f"{metric} over {name}" in text
    for title in ("Results", "Milestones", "Step cost", "Tuning budget of search", "Cost of reaching"):
        assert title in text
    assert "runs/&lt;lost&gt;" in text
    assert re.search(r">\d+ runs in \d+ rows; 1 folder is in no table and listed below\.</p>", text)
    for entry in groups:
        assert entry.digest in text
        for found in entry.rows:
            for run in found.runs.values():
                assert f"python train.py fit --config {run.shown / 'config.yaml'}" in text
    assert 'class="warning"' in text


def test_the_other_files_have_the_same_content(page: Path, groups: list[Group]) -> None:
    markdown, latex = (page / "report.md").read_text(), (page / "report.tex").read_text()
    assert "# A & B" in markdown
    for name in re.findall(r"!\[.*?\]\((.*?)\)", markdown):
        ElementTree.parse(page / name)
    assert len(list((page / "pictures").iterdir())) == markdown.count("![")
    assert latex.count(r"\begin{table}") == latex.count(r"\end{table}") > 6
    numbers = pd.read_csv(page / "runs.csv")
    assert len(numbers) == sum(len(entry.runs) for found in groups for entry in found.rows)
    aga = numbers[numbers["row"] == "grok_aga"]
    assert sorted(aga["seed"].astype(str)) == [str(seed) for seed in SEEDS]
    for line in aga.itertuples():
        assert line.best == Run(Path(line.folder)).best("val/accuracy", False)


def test_a_report_replaces_its_pictures_and_keeps_those_of_a_user(
    groups: list[Group], page: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "report"
    shutil.copytree(page, folder)
    (folder / "pictures" / "user.svg").write_text("kept")
    (folder / "user.txt").write_text("kept")
    before = {picture.name for picture in pictures(folder)}
    write(folder, groups[1:], [], Study(title="A & B"))
    after = {picture.name for picture in pictures(folder)}
    assert after and before - after
    assert {picture.name for picture in (folder / "pictures").iterdir()} == after | {"user.svg"}
    assert (folder / "user.txt").read_text() == "kept"
    assert "no table" not in (folder / "report.html").read_text()


@pytest.mark.parametrize("name", ["pictures/user.png", "runs.csv", "report.md", "thesis.tex"])
def test_a_users_folder_is_refused_and_left_as_it_was(name: str, groups: list[Group], tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("user's text")
    with pytest.raises(ValueError, match="is not empty and has no report: name another folder"):
        write(tmp_path, groups[1:], [], Study(title="A & B"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "user's text"


def test_a_file_in_the_place_of_the_folder_is_refused(groups: list[Group], tmp_path: Path) -> None:
    (tmp_path / "report").write_text("user's text")
    with pytest.raises(ValueError, match="is not a folder"):
        write(tmp_path / "report", groups[1:], [], Study(title="A & B"))
    assert (tmp_path / "report").read_text() == "user's text"


def test_costs_that_were_not_logged_leave_their_axis_out(runs: Path, tmp_path: Path) -> None:
    folder = copy(min((runs / "grok_aga").iterdir()), tmp_path, "without")
    log = pd.read_csv(folder / "metrics.csv")
    log = log.drop(columns=[column for column in log if column.startswith("cost/")])
    log.to_csv(folder / "metrics.csv", index=False)
    (entry,) = group(read([tmp_path])[0], targets=[Target("any", "val/accuracy", 0.01)])
    assert entry.axes == ["epoch"]
    write(tmp_path / "report", [entry], [], Study(title="Without costs"))
    text = (tmp_path / "report" / "report.html").read_text()
    assert "over epochs" in text and "over FLOPs" not in text and "Step cost" not in text
