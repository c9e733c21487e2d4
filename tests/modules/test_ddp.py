"""Processes under Lightning's DDP match one process and stay equal.

They have the same global batches.
"""

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.commands import ROOT
from tests.helpers.launching import launch
from tests.modules import ddp_fit, evaluations, exchanges, small_task
from tests.modules.ddp_fit import OPTIONS, STEPS, fit

Results = dict[str, dict[str, Any]]


EVERY_MODE = {name: (name, {}) for name in OPTIONS}
# The others differ only in the decisions of a step, which tests/ars2/test_distributed.py compares.
MODES = {name: (name, {}) for name in ("adamw", "muon", "sync", "aga")}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "accumulated and clipped": ("aga", {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}),
    "asked for sizes": ("sync", {"units": 3}),
    # DDP records the graph in its first backward pass, in the middle of a window.
    "accumulated, static graph": ("base", {"accumulate_grad_batches": 3, "static_graph": True}),
    "local": ("sync", {"local_first_pass": True}),
    "rounded": ("base", {"gather": "bfloat16"}),
}


@pytest.fixture(scope="module")
def two(alone: Results, text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return launch(ddp_fit.together, 2, tmp_path_factory.mktemp("two"), {**MODES, **VARIANTS}, text)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    results = {label: fit(name, **options) for label, (name, options) in {**MODES, **VARIANTS}.items()}
    exchanged = exchanges.count(tmp_path_factory.mktemp("one"), 1, lambda ranks: "auto")
    functional = ddp_fit.functional(text)
    return {**results, "evaluated": evaluations.evaluate(text), "exchanged": exchanged, "functional": functional}


def worst(actual: Results, other: Results, label: str) -> float:
    pairs = zip(actual[label]["state"].items(), other[label]["state"].items(), strict=True)
    return max((a - b).abs().max().item() for (name, a), (there, b) in pairs if name == there and "." in name)


def assert_same_as_alone(ranks: list[Results], alone: Results, label: str) -> None:
    for results in ranks:
        assert results[label]["evaluations"] == alone[label]["evaluations"]
        assert worst(results, alone, label) <= 1e-6
        for key, value in alone[label]["metrics"].items():
            assert results[label]["metrics"][key] == pytest.approx(value, abs=1e-5), key
    # Together the processes see the batches of the one.
    shares = zip(*(results[label]["batches"] for results in ranks), strict=True)
    assert [[x for part in parts for x in part] for parts in shares] == alone[label]["batches"]


def assert_one(ranks: list[Results], label: str) -> None:
    for results in ranks[1:]:
        assert results[label]["evaluations"] == ranks[0][label]["evaluations"]
        for name, value in results[label]["state"].items():
            assert torch.equal(value, ranks[0][label]["state"][name]), name


@pytest.mark.parametrize("label", [*MODES, "accumulated and clipped", "asked for sizes", "accumulated, static graph"])
def test_two_processes_train_like_one(label: str, two: list[Results], alone: Results) -> None:
    assert_one(two, label)
    assert_same_as_alone(two, alone, label)


def test_two_processes_make_functional_second_passes_like_one(two: list[Results], alone: Results) -> None:
    for results in two:
        assert worst(results, alone, "functional") <= 1e-6


@pytest.mark.slow
def test_four_processes_train_like_one(tmp_path: Path) -> None:
    alone = {label: fit(name) for label, (name, _) in EVERY_MODE.items()}
    four = launch(ddp_fit.together, 4, tmp_path, EVERY_MODE, None)
    for label in EVERY_MODE:
        assert_one(four, label)
        assert_same_as_alone(four, alone, label)


def test_two_processes_evaluate_and_predict_like_one(two: list[Results], alone: Results) -> None:
    """Count every example once, whether or not all processes have enough."""
    for results in two:
        for label, expected in alone["evaluated"].items():
            found = results["evaluated"][label]
            assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-6), label
            assert found["lines"] == expected["lines"], label
    language = alone["evaluated"]["language"]["metrics"]
    assert {"val/loss", "val/perplexity", "val/word_perplexity", "test/bits_per_byte"} <= language.keys()
    assert all(math.isfinite(value) for value in language.values())


# The fits behind the rows of the table in docs/several_processes.md.
ROWS = {
    "AdamW": "adamw",
    "Muon": "muon",
    **{f"`{name}`": name for name in small_task.OPTIMIZERS if name not in ("adamw", "muon")},
    "`sync`, `local_first_pass`": "local",
    "`sync`, a gradient scaler": "scaled",
    "`base`, a different `batch_size()`": "other units",
    "an optimizer that lacks `decides_alike`": "votes",
}
COLUMNS = ("all_reduce of gradients", "all_gather", "broadcast", "all_reduce", "read")


def documented() -> dict[str, tuple[set[int], ...]]:
    """Return the rows of the table, with the numbers that each cell allows."""
    page = (ROOT / "docs" / "several_processes.md").read_text().split("### Operations of a step")[1].split("\n##")[0]
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")][2:]
    return {name: tuple({int(number) for number in cell.split(" or ")} for cell in cells) for name, *cells in rows}


def assert_documented(steps: list[dict[str, int]], cells: tuple[set[int], ...], columns: tuple[str, ...]) -> None:
    for step in steps:
        assert not step.keys() - set(columns)
        assert all(step.get(column, 0) in cell for column, cell in zip(columns, cells, strict=True)), (step, cells)


def test_the_table_has_every_mode() -> None:
    assert documented().keys() == ROWS.keys()
    assert {*ROWS.values(), "accumulated"} == exchanges.FITS.keys()


@pytest.mark.parametrize("row", ROWS)
def test_a_step_makes_the_documented_operations(row: str, two: list[Results], alone: Results) -> None:
    cells = documented()[row]
    for results in two:
        assert_documented(results["exchanged"][ROWS[row]], cells, COLUMNS)
    votes = ROWS[row] == "votes"  # with other processes only
    assert_documented(alone["exchanged"][ROWS[row]], ({reads - votes for reads in cells[-1]},), ("read",))


def test_a_step_averages_one_gradient_a_pass(two: list[Results]) -> None:
    for exchanged in (results["exchanged"] for results in two):
        # Steps 5 to 8, of which the seventh is a third one, and the first after half of 12.
        for label, averaged in (("periodic", [1, 1, 2, 1]), ("votes", [1, 1, 2, 1]), ("late", [1, 1, 2, 2])):
            assert [step["all_reduce of gradients"] for step in exchanged[label]] == averaged
        for label in ("aga", "random"):
            assert {step["all_reduce of gradients"] for step in exchanged[label]} == {1, 2}
    # Seed and step alone determine the draw.
    assert two[0]["exchanged"]["random"] == two[1]["exchanged"]["random"]


def test_nothing_is_logged_that_lightning_advises_to_reduce(two: list[Results]) -> None:
    assert [results["advised"] for results in two] == [[], []]


def test_a_signal_to_one_process_stops_all_of_them_after_the_same_step(two: list[Results]) -> None:
    assert [results["stopped"] for results in two] == [{"steps": 3, "signal": signal.SIGTERM}] * 2


def test_a_batch_of_an_open_window_exchanges_and_reads_nothing(two: list[Results], alone: Results) -> None:
    """Compare the batches that fill a window, the third and the last, with a plain step."""
    assert alone["exchanged"]["accumulated"] == [{}, {}, {"read": 1}, {"read": 1}]
    for exchanged in (results["exchanged"] for results in two):
        assert exchanged["accumulated"] == [{}, {}, exchanged["sync"][-1], exchanged["sync"][-1]]


def test_aga_makes_a_second_pass_at_some_steps_only(alone: Results) -> None:
    """Make the agreement between processes a real test."""
    assert len(alone["aga"]["evaluations"]) == STEPS < alone["aga"]["evaluations"][-1] < 2 * STEPS


def test_a_local_first_pass_moves_every_process_to_a_different_point(two: list[Results], alone: Results) -> None:
    assert_one(two, "local")
    assert two[0]["local"]["evaluations"][-1] == 2 * STEPS
    assert worst(two[0], alone, "local") > 1e-5
    loss = alone["local"]["metrics"]["train/loss"]
    assert two[0]["local"]["metrics"]["train/loss"] == pytest.approx(loss, rel=0.1)


def test_directions_gathered_in_bfloat16_are_rounded_and_the_same_everywhere(
    two: list[Results], alone: Results
) -> None:
    assert_one(two, "rounded")
    assert 1e-6 < worst(two[0], alone, "rounded") < 1e-2
