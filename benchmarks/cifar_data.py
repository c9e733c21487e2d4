"""Measure the CIFAR-10 data path against torchvision's per-sample pipeline.

    python -m benchmarks.cifar_data [--batches 40] [--rounds 3]

Both pipelines crop, flip, normalise and cut out, on batches of 256 of the same 50,000 images of random bytes. The
per-sample pipeline follows torchvision's documentation, in a DataLoader with 0 and with 2 workers. They alternate, and
the table shows medians over all rounds. Starting the workers is not timed. A step
is forward and backward of ResNet-18 at full width on one batch, in float32, without an optimizer. Exits with 1 if the
data path is not 10 times as fast as 0 workers, or takes 5 % of the step.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from datamodules.augmentation import Augmentation, ImageBatches
from datamodules.cifar10 import MEAN, STD
from modules.cifar_resnet import CIFARResNet18

BATCH = 256
LEAST_SPEEDUP, LARGEST_SHARE = 10, 0.05


class Cutout:
    """Set a 16 x 16 square around a uniform centre to zero, clipped at the border."""

    def __call__(self, image: Tensor) -> Tensor:
        row, column = torch.randint(32, (2,)).tolist()
        image[:, max(row - 8, 0) : row + 8, max(column - 8, 0) : column + 8] = 0
        return image


class PerSample(Dataset[tuple[Tensor, int]]):
    """Apply the transforms to a PIL image, as torchvision's CIFAR10 does."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.arrays, self.labels = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        self.transform = v2.Compose(
            [
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
                Cutout(),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.arrays[index])), self.labels[index]


def rate(batches: Iterable[object], count: int) -> float:
    """Return images per second over ``count`` batches after two warm-up batches."""
    iterator: Iterator[object] = iter(batches)
    for _ in range(2):
        next(iterator)
    start = time.perf_counter()
    for _ in range(count):
        next(iterator)
    return count * BATCH / (time.perf_counter() - start)


def seconds_of_a_step(repeats: int) -> float:
    """Return the median seconds of forward and backward at full width."""
    network, times = CIFARResNet18(), []
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    for _ in range(repeats):
        start = time.perf_counter()
        F.cross_entropy(network(images), labels).backward()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> int:
    """Measure and print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(10, (50_000,))
    augmentation = Augmentation(MEAN, STD)

    def whole_batches() -> Iterator[Tensor]:
        for batch in ImageBatches(images, labels, BATCH, 0, augmentation):
            yield augmentation.apply(batch.images, batch.draws)  # type: ignore[attr-defined]

    def per_sample(workers: int) -> DataLoader[tuple[Tensor, int]]:
        return DataLoader(PerSample(images, labels), BATCH, shuffle=True, num_workers=workers)

    sides: dict[str, tuple[Callable[[], Iterable[object]], int]] = {
        "this suite": (whole_batches, options.batches),
        "per sample, 0 workers": (lambda: per_sample(0), max(options.batches // 8, 1)),
        "per sample, 2 workers": (lambda: per_sample(2), max(options.batches // 4, 1)),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, (make, count) in sides.items():
            rates[name].append(rate(make(), count))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ours = medians["this suite"]
    step = seconds_of_a_step(3)
    share = BATCH / ours / step
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores, {platform.machine()}")
    for name, median in medians.items():
        spread = f"{min(rates[name]):,.0f} to {max(rates[name]):,.0f}"
        times = "" if name == "this suite" else f"; this suite is {ours / median:.1f} times as fast"
        print(f"{name:<24}{median:>10,.0f} images/s ({spread}){times}")
    print(f"ResNet-18 step          {step:>10.3f} s; data {1e3 * BATCH / ours:.2f} ms a batch, {share:.3%} of it")
    return int(ours < LEAST_SPEEDUP * medians["per sample, 0 workers"] or share >= LARGEST_SHARE)


if __name__ == "__main__":
    sys.exit(main())
