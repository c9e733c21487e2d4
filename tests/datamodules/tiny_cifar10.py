"""Make a small data set in CIFAR-10's official layout.

A test can make it, and torchvision accepts its files.
"""

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from torchvision.datasets import CIFAR10

from datamodules.cifar10 import CLASSES, ROOT_VARIABLE

TRAIN, TEST = 200, 40


def images(count: int, seed: int) -> tuple[torch.Tensor, list[int]]:
    """Return noise (count, 3072) uint8 around a grey level, and the labels.

    The level depends on the class, and all classes have as many images.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randperm(count, generator=generator) % len(CLASSES)
    noise = torch.randint(-20, 20, (count, 3072), generator=generator)
    return (20 + 24 * labels.unsqueeze(1) + noise).clamp(0, 255).to(torch.uint8), labels.tolist()


def write(root: Path) -> dict[str, str]:
    """Write the data set below ``root``; return the MD5 sums of its files by name."""
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    contents: dict[str, object] = {CIFAR10.meta["filename"]: {"label_names": list(CLASSES)}}
    for number, (name, _) in enumerate([*CIFAR10.train_list, *CIFAR10.test_list]):
        pixels, labels = images(TEST if name == "test_batch" else TRAIN // 5, number)
        contents[name] = {"data": pixels.numpy(), "labels": labels}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    return {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in contents}


def accept(sums: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Set these as the MD5 sums that torchvision checks."""
    for table in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, table, [[name, sums[name]] for name, _ in getattr(CIFAR10, table)])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums[CIFAR10.meta["filename"]]})


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Return the root of the data set and its MD5 sums.

    The files are only read.
    """
    root = tmp_path_factory.mktemp("cifar10")
    return root, write(root)


@pytest.fixture
def tiny_cifar10(tiny_files: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the root of the data set.

    torchvision accepts it, and the environment variable names it.
    """
    root, sums = tiny_files
    accept(sums, monkeypatch)
    monkeypatch.setenv(ROOT_VARIABLE, str(root))
    return root
