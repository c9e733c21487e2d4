"""CIFAR-10 is found, fetched, verified and split.

Missing or damaged data is an error of one sentence.
"""

import functools
import hashlib
import http.server
import os
import pickle
import shutil
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from datamodules.augmentation import ImageBatches
from datamodules.cifar10 import CLASSES, MEAN, ROOT_VARIABLE, STD, CIFAR10Data, stratified_order
from tests.datamodules.tiny_cifar10 import TEST, TRAIN, accept, tiny_cifar10, tiny_files  # noqa: F401
from tests.helpers.commands import call

FIT = ("fit", "--config", "configs/cifar_adamw.yaml", "--wandb", "false")
FOLDER = "cifar-10-batches-py"


def data(stage: str = "fit", **options: Any) -> CIFAR10Data:
    module = CIFAR10Data(**options)
    module.prepare_data()
    module.setup(stage)
    return module


def contents(loader: ImageBatches) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all images and labels of a loader that augments nothing."""
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.fixture
def copy(tiny_cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """Copy the data set, so that it may be damaged.

    The environment variable names the copy.
    """
    root = tmp_path / "spoilt"
    shutil.copytree(tiny_cifar10, root)
    monkeypatch.setenv(ROOT_VARIABLE, str(root))
    return root


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")


def test_images_and_labels_are_those_that_torchvision_reads(tiny_cifar10: Path) -> None:  # noqa: F811
    module = data(root=str(tiny_cifar10))
    for train, (images, labels) in ((True, module.train_set), (False, module.test_set)):
        reference = CIFAR10(tiny_cifar10, train=train)
        assert len(images) == len(reference) == (TRAIN if train else TEST)
        assert images.dtype == torch.uint8 and images.is_contiguous()
        assert labels.tolist() == reference.targets
        for i in (0, 7, len(images) - 1):
            assert Image.fromarray(images[i].permute(1, 2, 0).numpy()).tobytes() == reference[i][0].tobytes()
        assert tuple(reference.classes) == CLASSES


def test_the_environment_variable_names_the_root_and_the_option_overrides_it(
    tiny_cifar10: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert CIFAR10Data().root == tiny_cifar10
    assert CIFAR10Data(root="elsewhere").root == Path("elsewhere")
    monkeypatch.delenv(ROOT_VARIABLE)
    assert CIFAR10Data().root == Path("data/cifar10")


@pytest.mark.usefixtures("tiny_cifar10")
def test_published_validation_is_the_test_set_and_training_uses_every_image() -> None:
    module = data()
    assert torch.equal(contents(module.val_dataloader())[0], module.test_set[0])
    assert len(module.train_set[0]) == TRAIN
    assert module.description() == {
        "train": "training set (200 of 200 images)",
        "val": "test set, as published (40 images)",
    }


@pytest.mark.usefixtures("tiny_cifar10")
def test_a_validation_split_is_stratified_seeded_and_never_trained_on() -> None:
    module = data(validation="holdout", holdout_examples=50)
    val, labels = contents(module.val_dataloader())
    assert labels.bincount().tolist() == [5] * 10
    assert module.train_set[1].bincount().tolist() == [15] * 10
    together = torch.cat([module.train_set[0], val]).flatten(1)
    assert len(together.unique(dim=0)) == len(CIFAR10(module.root).data) == TRAIN
    assert module.description()["val"] == "hold-out from the training set, stratified, seed 42 (50 images)"
    for other, same in ((42, True), (43, False)):
        again = data(validation="holdout", holdout_examples=50, seed=other)
        assert torch.equal(again.val_set[0], val) == same
    assert torch.equal(contents(data("validate", validation="holdout", holdout_examples=50).val_dataloader())[0], val)
    # The test set is tested on in any case.
    assert torch.equal(contents(module.test_dataloader())[0], module.test_set[0])


@pytest.mark.usefixtures("tiny_cifar10")
def test_fewer_training_images_are_balanced_and_leave_the_validation_split() -> None:
    module = data(validation="holdout", holdout_examples=50, train_examples=100)
    assert module.train_set[1].bincount().tolist() == [10] * 10
    assert torch.equal(module.val_set[0], data(validation="holdout", holdout_examples=50).val_set[0])
    assert module.description()["train"] == "training set (100 of 200 images)"


@pytest.mark.parametrize("count", range(1, 12))
def test_every_beginning_of_a_stratified_order_is_balanced(count: int) -> None:
    labels = torch.tensor([0, 1, 2] * 5)
    order = stratified_order(labels, seed=count)
    assert sorted(order.tolist()) == list(range(15))
    counts = labels[order[:count]].bincount(minlength=3)
    assert counts.max() - counts.min() <= 1


@pytest.mark.usefixtures("tiny_cifar10")
def test_training_batches_are_augmented_and_others_only_normalised() -> None:
    module = data(batch_size=16)
    batch = next(iter(module.train_dataloader()))
    images, labels = module.on_after_batch_transfer(batch, 0)
    assert images.shape == (16, 3, 32, 32) and images.dtype == torch.float32 and labels.shape == (16,)
    assert (images == 0).flatten(1).sum(1).min() >= 3 * 8 * 8  # the smallest piece of a square that a corner leaves
    raw = next(iter(module.val_dataloader()))
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    torch.testing.assert_close(
        module.on_after_batch_transfer(raw, 0)[0], (raw[0] / 255 - mean) / std, rtol=0, atol=2e-6
    )


def test_a_data_set_that_is_not_there_is_fetched_and_verified(
    tiny_cifar10: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    archive = tmp_path / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(tiny_cifar10 / FOLDER, FOLDER)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        module = data(root=str(tmp_path / "new" / "cifar10"))
        server.shutdown()
    assert len(module.train_set[0]) == TRAIN


@pytest.mark.usefixtures("no_network", "tiny_cifar10")
def test_without_data_and_network_one_sentence_names_both_remedies(tmp_path: Path) -> None:
    root, runs = tmp_path / "new" / "cifar10", tmp_path / "runs"
    error = call(*FIT, "--data.root", root, "--runs", runs).error
    assert f"CIFAR-10 is not complete in {root} ({FOLDER}/data_batch_1 is missing)" in error
    assert "cannot be downloaded" in error and "Connection refused" in error
    assert "run once with network access, or set --data.root or ARS2_CIFAR10_ROOT to a folder that has it" in error
    assert not (tmp_path / "new").exists()
    assert not list(runs.glob("*/*"))


@pytest.mark.usefixtures("tiny_cifar10")
def test_nothing_is_fetched_where_that_is_switched_off(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.download is false"):
        data(root=str(tmp_path / "new"), download=False)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_damaged_file_is_named_and_not_trained_on(name: str, copy: Path, tmp_path: Path) -> None:
    file = copy / FOLDER / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    error = call(*FIT, "--runs", tmp_path / "runs").error
    assert f"{file} is damaged (its MD5 sum is not the official one): delete it" in error
    assert not list((tmp_path / "runs").glob("*/*"))


@pytest.mark.usefixtures("no_network")
def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / FOLDER / "data_batch_5").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_5 is missing"):
        data()


def test_a_file_that_runs_code_when_read_is_refused_before_that(copy: Path, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "harm"),)

    (copy / FOLDER / "data_batch_1").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(ValueError, match="data_batch_1 is damaged"):
        data()
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"validation": "train"},
        {"holdout_examples": 0},
        {"train_examples": 0},
        {"padding": -1},
        {"cutout": 15},
        {"cutout": -2},
    ],
)
def test_options_out_of_range_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must"):
        CIFAR10Data(**options)


@pytest.mark.usefixtures("tiny_cifar10")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_examples": 300}, "0 held-out images leave 200 of the 200 .* at most 200 train_examples, got 300"),
        ({"validation": "holdout", "holdout_examples": 60, "train_examples": 160}, "at most 140 train_examples"),
        ({"validation": "holdout", "holdout_examples": 201}, "leave 0 of the 200 .* choose fewer holdout_examples"),
    ],
)
def test_more_images_than_there_are_cannot_be_trained_on(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(**options)


real = pytest.mark.skipif(ROOT_VARIABLE not in os.environ, reason=f"{ROOT_VARIABLE} names no folder with CIFAR-10")


@pytest.mark.real_data
@real
def test_the_real_data_set_has_the_published_sizes_and_statistics() -> None:
    module = data(validation="holdout")
    assert module.train_set[1].bincount().tolist() == [4500] * 10
    assert module.val_set[1].bincount().tolist() == [500] * 10
    assert module.test_set[1].bincount().tolist() == [1000] * 10
    pixels = torch.cat([module.train_set[0], module.val_set[0]]).transpose(0, 1).flatten(1)
    for channel, mean in zip(pixels, MEAN, strict=True):
        assert channel.float().mean().item() / 255 == pytest.approx(mean, abs=1e-3)
    sizes = [len(labels) for _, labels in map(module.on_after_batch_transfer, data().train_dataloader(), [0] * 196)]
    assert sizes == [256] * 195 + [80]


def test_two_runs_that_start_at_once_fetch_the_data_once(
    tiny_files: tuple[Path, dict[str, str]],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    source, sums = tiny_files
    accept(sums, monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fetched = []

    def download(dataset: CIFAR10) -> None:
        fetched.append(dataset.root)
        time.sleep(0.2)
        shutil.copytree(source, dataset.root, dirs_exist_ok=True)

    monkeypatch.setattr(CIFAR10, "download", download)
    with ThreadPoolExecutor(2) as pool:
        modules = [CIFAR10Data(root=str(tmp_path / "new")) for _ in range(2)]
        list(pool.map(lambda module: module.prepare_data(), modules))
    assert len(fetched) == 1
