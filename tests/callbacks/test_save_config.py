"""A run records its data, and resuming checks the protocol."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from callbacks.save_config import recorded_data
from experiment.identity import RunIdentity
from tests.helpers.commands import ADAMW, TINY, call, fit
from tests.helpers.marks import slow
from tests.helpers.text import SMALL_TEXT, write_corpus

NANO = ("--config", "configs/wikitext2_nano_adamw.yaml")


class Described:
    places = ("root",)
    words = ("corpus",)

    def __init__(self, digest: str) -> None:
        self.digest = digest

    def description(self) -> dict[str, Any]:
        return {"corpus": "in words", "sha256": self.digest, "splits": {"train": 3}}


def config_of(**options: Any) -> dict[str, Any]:
    model = {"class_path": "nets.Net", "init_args": {"optimizer": {"class_path": "torch.optim.SGD"}}}
    return {"model": model, "data": {"class_path": "mine.data.Tables", "init_args": options}}


def protocol_digest(data: Any, **options: Any) -> str:
    config = config_of(**options)
    return RunIdentity(config, *recorded_data(data, config)).protocol_digest


def test_files_that_differ_make_another_protocol_and_the_same_elsewhere_do_not(tmp_path: Path) -> None:
    for name, text in (("a.csv", "1,2"), ("b.csv", "1,3"), ("copy.csv", "1,2"), ("x/1.csv", "1"), ("y/1.csv", "1")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    a, b, copy = (protocol_digest(None, train_file=str(tmp_path / f"{name}.csv")) for name in ("a", "b", "copy"))
    assert a == copy != b
    x, y = (protocol_digest(None, tables=str(tmp_path / name) + "/") for name in ("x", "y"))
    assert x == y
    (tmp_path / "y" / "1.csv").write_text("2")
    assert protocol_digest(None, tables=str(tmp_path / "y") + "/") != x


def test_an_option_counts_whatever_its_name_ends_in() -> None:
    assert protocol_digest(None, profile="narrow") != protocol_digest(None, profile="wide")
    assert protocol_digest(None, column_file="first") != protocol_digest(None, column_file="second")


def test_the_description_of_a_data_module_counts_and_its_paths_do_not(tmp_path: Path) -> None:
    here = protocol_digest(Described("a"), root=str(tmp_path), rows=3)
    assert here == protocol_digest(Described("a"), root="nowhere", rows=3)
    assert here != protocol_digest(Described("b"), root=str(tmp_path), rows=3)
    assert here != protocol_digest(Described("a b"), root=str(tmp_path), rows=3)
    assert here != protocol_digest(Described("a"), root=str(tmp_path), rows=4)


@pytest.mark.slow
def test_runs_on_two_corpora_are_of_two_protocols_and_a_copy_is_of_the_same(tmp_path: Path) -> None:
    digests = []
    for name, articles in (("one", 20), ("other", 21), ("copy", 20)):
        root = write_corpus(tmp_path / name, articles)
        folder = fit(tmp_path / "runs", *NANO, *SMALL_TEXT, "--data.root", root, "--data.cache", tmp_path / "cache")
        protocol = yaml.safe_load((folder / "protocol.yaml").read_text())
        digests.append(protocol["digest"])
        assert len(protocol["contents.tokenizer_sha256"]) == 64
        assert "data.root" not in protocol and "data.cache" not in protocol
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.parametrize("subcommand", ["fit", slow("test"), slow("predict")])
def test_a_checkpoint_of_another_corpus_is_refused(subcommand: str, tmp_path: Path) -> None:
    places = ("--data.cache", tmp_path / "cache", "--runs", tmp_path / "runs")
    root, other = (write_corpus(tmp_path / name, articles) for name, articles in (("one", 20), ("other", 21)))
    folder = fit(tmp_path / "runs", *NANO, *SMALL_TEXT, "--data.root", root, "--data.cache", tmp_path / "cache")
    checkpoint = next((folder / "checkpoints").glob("last.ckpt" if subcommand == "fit" else "best.ckpt"))
    moved = tmp_path / "moved.ckpt"  # without the record of its run
    moved.write_bytes(checkpoint.read_bytes())
    resumed = ("--trainer.max_epochs", 9) if subcommand == "fit" else ()
    result = call(subcommand, *NANO, *SMALL_TEXT, *resumed, *places, "--data.root", other, "--ckpt_path", moved)
    assert result.code == 1
    assert "the checkpoint was trained with another corpus" in result.err


def test_resuming_with_other_options_of_the_protocol_is_refused(tmp_path: Path) -> None:
    folder = fit(tmp_path, *ADAMW, *TINY)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    longer = ("--trainer.max_epochs", 4, "--ckpt_path", checkpoint, "--runs", tmp_path)
    refused = call("fit", *ADAMW, *TINY, *longer, "--data.batch_size", 7)
    assert refused.code == 1
    assert "is of a run with other options: data.batch_size (" in refused.err and " there, 7 here)" in refused.err
    for option, value in (("model.optimizer.lr", "0.5"), ("data.seed", "9")):
        refused = call("fit", *ADAMW, *TINY, *longer, f"--{option}", value)
        assert refused.code == 1 and f"is of a run with other options: {option} (" in refused.err
    assert call("fit", *ADAMW, *TINY, *longer).code == 0
