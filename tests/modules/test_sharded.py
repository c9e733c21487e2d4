"""Processes under ModelParallelStrategy (FSDP2) match one process.

They run on CPUs with gloo.
"""

import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from tests.helpers.launching import launch
from tests.modules import evaluations, sharded_fit
from tests.modules.ddp_fit import OPTIONS
from tests.modules.sharded_fit import HALF, STEPS, Run, fit, read, strategy

Results = dict[str, dict[str, Any]]

EVERY_MODE: dict[str, Run] = {name: (name, {}) for name in OPTIONS}
# The others differ in the optimizer alone, whose steps tests/ars2/test_sharded.py compares.
MODES: dict[str, Run] = {name: (name, {}) for name in ("adamw", "muon", "aga", "momentum")}
VARIANTS: dict[str, Run] = {
    "clipped": ("sync", {"gradient_clip_val": 0.1, "clip_first_pass": True}),
    "accumulated and clipped by value": (
        "aga",
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ),
    # The fifth loss is that of the first pass of the third step.
    "damaged": ("sync", {"nonfinite": "skip", "damaged": 5}),
}
HALF_PRECISION: dict[str, Run] = {name: ("aga", {"precision": name}) for name in ("bf16-mixed", "bf16-true")}
RESUMED = ("aga",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


def saved(folder: Path, name: str, kind: str) -> Path:
    return folder / f"{name} in {kind}.ckpt"


@pytest.fixture(scope="module")
def alone(folder: Path) -> Results:
    runs = {**MODES, **VARIANTS, **HALF_PRECISION}
    results = {label: fit(name, folder=folder / label, **options) for label, (name, options) in runs.items()}
    return {
        **results,
        "text": read(0, folder),
        "evaluated": evaluations.evaluate(folder, without=sharded_fit.NOT_EVALUATED),
    }


@pytest.fixture(scope="module")
def two(folder: Path, alone: Results) -> list[Results]:
    runs = {**MODES, **VARIANTS, **HALF_PRECISION}
    for name in RESUMED:  # saving does not change training, as the comparison with one process shows
        runs[name] = name, {"saves": saved(folder, name, "parts")}
        runs[f"{name} in one"] = name, {"saves": saved(folder, name, "one"), "distributed": False}
    return launch(sharded_fit.together, 2, folder / "two", runs, folder)


def assert_same(actual: dict[str, Any], other: dict[str, Any]) -> None:
    assert actual["evaluations"] == other["evaluations"][-len(actual["evaluations"]) :]
    for name, expected in other["tensors"].items():
        # A shear force is the difference of two nearly equal gradients.
        tolerance = 1e-4 if name.endswith("shear") else 2e-6
        assert (actual["tensors"][name] - expected).norm() <= tolerance * expected.norm(), name
    for key, value in other["metrics"].items():
        assert actual["metrics"][key] == pytest.approx(value, rel=1e-4), key


def assert_one(ranks: list[Results], label: str) -> None:
    for results in ranks[1:]:
        assert results[label].get("evaluations") == ranks[0][label].get("evaluations")
        for name, value in results[label]["tensors"].items():
            assert torch.equal(value, ranks[0][label]["tensors"][name]), name


@pytest.mark.parametrize("label", [*MODES, *VARIANTS])
def test_two_processes_train_like_one(label: str, two: list[Results], alone: Results) -> None:
    assert_one(two, label)
    assert_same(two[0][label], alone[label])


@pytest.mark.parametrize("label", [*MODES, "accumulated and clipped by value", "clipped"])
def test_the_logged_rows_are_those_of_one_process(label: str, two: list[Results], alone: Results) -> None:
    """Compare norms, update sizes, cosines and costs among the logged values."""
    actual, expected = two[0][label]["rows"], alone[label]["rows"]
    assert len(actual) == len(expected) and any("optimizer/update_rms_matrix" in row for row in actual)
    for row, other in zip(actual, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("precision", HALF_PRECISION)
def test_in_half_precision_it_learns_the_same(precision: str, two: list[Results], alone: Results) -> None:
    assert_one(two, precision)
    for key in ("train/loss", "val/loss"):
        assert two[0][precision]["metrics"][key] == pytest.approx(alone[precision]["metrics"][key], rel=0.02)


def test_a_non_finite_loss_of_one_process_skips_the_step_in_all(two: list[Results]) -> None:
    assert [results["damaged"]["skipped"] for results in two] == [1, 1]
    first, last = (results["refused"]["damage"] for results in two)
    assert last.startswith("step 3 in epoch 1, first pass: the loss is nan and the gradient of query is not finite")
    # The gradient is the mean over the processes, so every one has non-finite entries.
    assert first.startswith("step 3 in epoch 1, first pass: the gradient of query is not finite")


def test_unsupported_fits_are_refused_in_every_process(two: list[Results]) -> None:
    for refused in (results["refused"] for results in two):
        assert "BatchNorm" in refused["batch norm"]
        assert "tensor parallelism" in refused["tensor parallel"]
        assert "local_first_pass" in refused["local first pass"]
        assert "flatness probe" in refused["probe"]


def test_lightning_refuses_16_mixed_under_the_strategy() -> None:
    with pytest.raises(ValueError, match=r"does not support .*precision='16-mixed'"):
        L.Trainer(accelerator="cpu", devices=2, strategy=strategy(2), precision="16-mixed")


def test_every_process_has_half_of_the_parameters(two: list[Results]) -> None:
    local_numels = [results["aga"]["local_numels"] for results in two]
    # Of 12 and of 3 rows.
    assert [h["token_embedding.weight"] for h in local_numels] == [6 * 16, 6 * 16]
    assert [h["position_embedding.weight"] for h in local_numels] == [2 * 16, 1 * 16]


def test_a_language_model_is_sharded_block_by_block(two: list[Results], alone: Results) -> None:
    assert_one(two, "text")
    assert two[0]["text"]["blocks"] == ["FSDPQwen3DecoderLayer"] * 2
    assert two[0]["text"]["text"] == two[1]["text"]["text"] == alone["text"]["text"]
    for name, expected in alone["text"]["tensors"].items():
        if name in alone["text"]["local_numels"]:
            assert (two[0]["text"]["tensors"][name] - expected).norm() <= 1e-5 * expected.norm(), name


def test_two_processes_evaluate_and_predict_like_one(two: list[Results], alone: Results) -> None:
    for results in two:
        for label, expected in alone["evaluated"].items():
            found = results["evaluated"][label]
            assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-6), label
            assert found["lines"] == expected["lines"], label


# Whether the step is finite and whether to stop; the norms of the matrices' directions.
FLAGS, NORMS = 1, 1
# Gather parameters, reduce gradients, and send matrices to their owners and back.
BASE = {"all_gather of parameters": 1, "reduce_scatter": 1, "all_to_all": 2, "all_reduce": FLAGS + NORMS, "read": 1}


def test_a_step_reduces_one_number_besides_the_gradients(two: list[Results]) -> None:
    for results in two:
        exchanged = results["exchanged"]
        assert exchanged["muon"] == [BASE | {"all_reduce": FLAGS}] * 4
        assert exchanged["base"] == [BASE] * 4
        # phi, and the lengths that a shear force is scaled by; another two where a step makes a second pass.
        for step in exchanged["aga"]:
            second_pass = step["reduce_scatter"] == 2
            assert step["all_reduce"] in ((FLAGS + NORMS + 3,) if second_pass else (FLAGS + NORMS + 2,)), step
            assert step["read"] == 2, step


def test_nothing_is_logged_that_lightning_advises_to_reduce(two: list[Results]) -> None:
    assert [results["advised"] for results in two] == [[], []]


def test_a_signal_to_one_process_stops_all_of_them_after_the_same_step(two: list[Results]) -> None:
    assert [results["stopped"] for results in two] == [{"steps": 3, "signal": signal.SIGTERM}] * 2


def test_accumulated_gradients_are_exchanged_once_a_window_and_pass(two: list[Results]) -> None:
    for results in two:
        steps = results["exchanged"]["accumulated"]
        assert [step.get("reduce_scatter", 0) for step in steps] == [0, 0, 2, 2]
        # Parameters are gathered for every batch, in both passes.
        assert [step["all_gather of parameters"] for step in steps] == [1, 1, 4, 2]


@pytest.fixture(scope="module")
def one(folder: Path, two: list[Results]) -> Results:
    """Resume both kinds of checkpoint of two processes in one process."""
    runs: dict[str, Run] = {}
    for name in RESUMED:
        runs[f"{name} in parts"] = name, {"resumes": saved(folder, name, "parts")}
        runs[f"{name} in one"] = name, {"resumes": saved(folder, name, "one"), "distributed": False}
    return launch(sharded_fit.together, 1, folder / "one", runs, None)[0]


@pytest.mark.parametrize("kind", ["parts", "one"])
@pytest.mark.parametrize("name", RESUMED)
def test_one_process_resumes_a_checkpoint_of_two(
    name: str, kind: str, folder: Path, two: list[Results], one: Results, alone: Results
) -> None:
    path = saved(folder, name, kind)
    assert path.is_dir() if kind == "parts" else path.is_file()
    assert len(one[f"{name} in {kind}"]["evaluations"]) == STEPS - HALF
    assert_same(one[f"{name} in {kind}"], alone[name])


@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_in_one_file_resumes_without_the_strategy(
    name: str, folder: Path, two: list[Results], alone: Results
) -> None:
    assert_same(fit(name, resumes=saved(folder, name, "one")), alone[name])


@pytest.mark.slow
def test_four_processes_train_and_resume_a_checkpoint_of_two(folder: Path, two: list[Results], alone: Results) -> None:
    going_on: dict[str, Run] = {
        f"{name} in {kind}": (name, {"resumes": saved(folder, name, kind), "distributed": kind != "one"})
        for name in RESUMED
        for kind in ("parts", "one")
    }
    four = launch(sharded_fit.together, 4, folder / "four", {**EVERY_MODE, **going_on}, None)
    for label in (*EVERY_MODE, *going_on):
        name = label.split()[0]
        assert_one(four, label)
        assert_same(four[0][label], alone[name] if name in alone else fit(name))
