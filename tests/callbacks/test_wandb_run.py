"""Read the contents of an offline run of Weights & Biases from its file."""

import json
from pathlib import Path
from typing import Any

import pytest

from analysis.run_pictures import draw
from callbacks.wandb_run import WandbRun
from tests.callbacks.fits import ars2, data, fit, module
from tests.helpers.commands import AGA, TINY, folders, python, train_py
from tests.helpers.commands import fit as run

# Prints every record that the tests need as one line of JSON.
READ = """
import json, pathlib, sys
from google.protobuf.json_format import MessageToDict
from wandb.proto.wandb_internal_pb2 import Record
from tests.experiment.test_loggers import records
for content in records(pathlib.Path(sys.argv[1])):
    record = Record.FromString(content)
    kind = record.WhichOneof("record_type")
    if kind in ("run", "metric", "artifact", "history", "summary"):
        message = MessageToDict(getattr(record, kind), preserving_proto_field_name=True)
        print(json.dumps({"kind": kind, **message}))
"""


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run's offline file.

    Another process reads them, so that this one imports no wandb.
    """
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    process = python("-c", READ, file, home=folder)
    assert process.code == 0, process.err
    return [json.loads(line) for line in process.out.splitlines()]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Return the folder and the records of a tiny run."""
    home = tmp_path_factory.mktemp("home")
    tiny = (*TINY[: TINY.index("--wandb")], "--wandb", "true", "--seed_everything", "0", "--data.seed", "0")
    result = train_py("fit", *AGA, *tiny, "--internals.every_n_steps", "1", "--runs", home / "runs", home=home)
    assert (result.code, result.err) == (0, ""), result.err
    (folder,) = folders(home / "runs")
    return folder, read(folder)


def of(kind: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]


def test_it_is_named_grouped_and_tagged(recorded: tuple[Path, list[dict[str, Any]]]) -> None:
    run = of("run", recorded[1])[0]
    assert run["display_name"] == "grok_aga, seed 0"
    assert run["run_group"].startswith("grok_aga (")
    assert run["tags"][:2] == ["modular_addition", "ars2_aga"]
    assert run["tags"][2].startswith("protocol ")


def test_its_config_has_nested_keys(recorded: tuple[Path, list[dict[str, Any]]]) -> None:
    run = of("run", recorded[1])[0]
    config = {item["key"]: json.loads(item["value_json"]) for item in run["config"]["update"]}
    assert config["model"]["optimizer"]["class"] == "ars2.ARS2Neo"
    assert config["model"]["optimizer"]["phi_lambda"] == 0.1
    assert config["data"]["p"] == 7
    assert (config["task"], config["optimizer"], config["seed"]) == ("modular_addition", "ars2_aga", "0")
    assert (config["row"], config["group"]) == ("grok_aga", run["run_group"])


def test_its_metrics_have_best_values_and_axes(recorded: tuple[Path, list[dict[str, Any]]]) -> None:
    metrics = {record.get("name") or record["glob_name"]: record for record in of("metric", recorded[1])}
    assert metrics["val/loss"]["summary"] == {"min": True, "last": True}
    assert metrics["val/accuracy"]["summary"] == {"max": True, "last": True}
    steps = {name: metric.get("step_metric") for name, metric in metrics.items()}
    assert steps["val/loss"] == steps["train/*"] == steps["milestone/*"] == "epoch"
    assert steps["flatness/*"] == steps["optimizer/*"] == "cost/optimizer_steps"
    assert {"epoch", "cost/gradient_evaluations", "cost/training_seconds", "cost/flops"} <= metrics.keys()


def test_its_pictures_and_files_are_recorded(recorded: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, records = recorded
    logged = {item["nested_key"][0] for row in of("history", records) for item in row["item"] if "nested_key" in item}
    assert {"pictures/curves", "pictures/second_passes"} <= logged
    for name in ("curves", "second_passes"):
        assert (folder / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    (artifact,) = of("artifact", records)
    assert artifact["type"] == "run"
    contents = {entry["path"] for entry in artifact["manifest"]["contents"]}
    files = {"config.yaml", "protocol.yaml", "parameters.txt", "metrics.csv", "summary.json"}
    assert contents == files | {"pictures/curves.png", "pictures/second_passes.png"}


def test_an_axis_is_in_every_row_that_is_drawn_over_it(recorded: tuple[Path, list[dict[str, Any]]]) -> None:
    rows = []
    for record in of("history", recorded[1]):
        rows.append({key for item in record["item"] for key in (item.get("nested_key") or [item.get("key")])[:1]})
    drawn = 0
    for row in rows:
        if any(key.startswith(("val/", "train/", "optimizer/", "flatness/")) for key in row):
            assert {"epoch", "cost/optimizer_steps", "cost/gradient_evaluations"} <= row
            drawn += 1
    assert drawn >= 6


def test_without_w_and_b_the_run_is_drawn_too(tmp_path: Path) -> None:
    folder = run(tmp_path, *AGA, *TINY, "--internals.every_n_steps", "1", pictures=True)
    assert {path.name for path in (folder / "pictures").iterdir()} == {"curves.png", "second_passes.png"}


def test_a_trial_and_a_run_without_a_config_are_not_drawn(tmp_path: Path) -> None:
    sweep = ("--sweep.name", "search", "--sweep.optimizer", "aga", "--sweep.trial", "0")
    assert not (run(tmp_path / "trial", *AGA, *TINY, *sweep, pictures=True) / "pictures").exists()
    fit(module(ars2("aga")), data(), [WandbRun(draw)], tmp_path / "alone", epochs=1)
    assert not (tmp_path / "alone" / "pictures").exists()


def test_a_folder_without_a_config_cannot_be_drawn(tmp_path: Path) -> None:
    fit(module(), data(), [], tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"no config\.yaml"):
        draw(tmp_path)
