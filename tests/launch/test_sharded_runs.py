"""Run the command with the overlay of sharded runs over two processes.

They run on CPUs instead of GPUs.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from experiment.checkpoints import check_checkpoint
from tests.helpers.commands import AGA, TINY, Result, call, changed_by, folders, metrics, train_py

OVERLAY = ("--config", "configs/overlays/fsdp.yaml")
# The options of a machine without GPUs that differ from the overlay.
CPUS_ARE = "--trainer.accelerator cpu --trainer.devices 2 --trainer.strategy.data_parallel_size 2"
CPUS = (*OVERLAY, *CPUS_ARE.split(" "))
IN_PARTS = ("--trainer.strategy.save_distributed_checkpoint", "true")


def test_the_overlay_changes_accelerator_devices_and_strategy_only() -> None:
    assert changed_by(OVERLAY, *AGA) == {
        "accelerator: gpu",
        "devices: 8",
        "strategy:",
        "class_path: lightning.pytorch.strategies.ModelParallelStrategy",
        "data_parallel_size: 8",
        "tensor_parallel_size: 1",
        "save_distributed_checkpoint: false",
        "process_group_backend: null",
        "timeout: 0:30:00",
    }


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Return a folder as the strategy leaves it, but for the tensors."""
    folder = tmp_path / "last.ckpt"
    folder.mkdir()
    (folder / ".metadata").write_bytes(b"")
    torch.save({"pytorch-lightning_version": "2.6.6", "lr_schedulers": []}, folder / "meta.pt")
    return folder


def test_a_folder_of_shards_resumes_under_its_strategy_only(parts: Path) -> None:
    check_checkpoint(parts, resume=True, sharded=True)
    with pytest.raises(ValueError, match=r"is a sharded checkpoint: add --config configs/overlays/fsdp\.yaml"):
        check_checkpoint(parts, resume=True)
    assert "is a sharded checkpoint" in call("fit", *AGA, *TINY, "--ckpt_path", parts).error


@pytest.mark.parametrize("missing", [".metadata", "meta.pt"])
def test_a_folder_that_was_cut_short_is_damaged(missing: str, parts: Path) -> None:
    shutil.copytree(parts, parts.with_name("last-previous.ckpt"))
    (parts / missing).unlink()
    with pytest.raises(ValueError, match=r"is damaged, .*; the previous one is intact: give .*last-previous\.ckpt"):
        check_checkpoint(parts, resume=True, sharded=True)


def test_sharded_weights_without_state_cannot_be_resumed(parts: Path) -> None:
    torch.save({"pytorch-lightning_version": "2.6.6"}, parts / "meta.pt")
    check_checkpoint(parts, resume=False, sharded=True)
    with pytest.raises(ValueError, match="contains only weights"):
        check_checkpoint(parts, resume=True, sharded=True)


def went_well(result: Result) -> None:
    assert result.code == 0, result.err
    assert result.out.count("Run finished") == 1


def numbers(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of epochs, without the columns of each process."""
    rows = [{k: float(v) for k, v in row.items() if k != "cost/flops"} for row in metrics(folder)]
    return [row for row in rows if "val/loss" in row or "train/loss" in row]


@pytest.mark.slow
def test_one_process_can_resume_a_run_of_two(tmp_path: Path) -> None:
    task = (*AGA, *TINY, "--model.optimizer.ns_dtype", "float32", "--trainer.callbacks", "null")
    longer = ("--trainer.max_epochs", "4")
    went_well(train_py("fit", *task, *longer, "--runs", tmp_path / "alone", home=tmp_path))
    (alone,) = folders(tmp_path / "alone")
    for kind, options in (("one", ()), ("parts", IN_PARTS)):
        runs = tmp_path / kind
        went_well(train_py("fit", *task, *CPUS, *options, "--runs", runs, home=tmp_path))
        (first,) = folders(runs)
        last = first / "checkpoints/last.ckpt"
        assert last.is_file() if kind == "one" else (last / ".metadata").is_file()
        more = () if kind == "one" else (*CPUS, *options)
        went_well(
            train_py(
                "fit", *task, *longer, *more, "--ckpt_path", last, "--runs", tmp_path / f"{kind} on", home=tmp_path
            )
        )
        (second,) = folders(tmp_path / f"{kind} on")
        for row, expected in zip([*numbers(first), *numbers(second)], numbers(alone), strict=True):
            assert row == pytest.approx(expected, rel=1e-4)
