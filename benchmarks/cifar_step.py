"""Measure Lightning's training step on CIFAR-10 against a hand-written loop.

    python -m benchmarks.cifar_step [--steps 4] [--rounds 3]

Both train ResNet-18 on the same augmented batches of 256 (random bytes for images) with ARS2-Neo Base and keep mean
loss and accuracy. They alternate, and the table shows medians over all steps except each round's first. Exits with 1 if
the ratio is above 1.03.
"""

import argparse
import functools
import logging
import os
import platform
import statistics
import sys
import time
import warnings
from typing import Any

from launch.lean_imports import without_heavy_packages

with without_heavy_packages():
    import lightning.pytorch as L
import torch
import torch.nn.functional as F

from ars2 import ARS2Neo, param_groups
from callbacks.cost_counters import CostCounters
from callbacks.optimizer_internals import OptimizerInternals
from datamodules.augmentation import ImageBatches
from datamodules.cifar10 import CIFAR10Data
from modules.cifar_resnet import CIFARResNet18
from modules.image_classifier import ImageClassifier

LARGEST_RATIO = 1.03
BATCH = 256
make_optimizer = functools.partial(ARS2Neo, lr=1e-3, betas=(0.9, 0.999), weight_decay=5e-4, mode="base")
VECTOR = {"weight_decay": 0.01}


class RandomImages(CIFAR10Data):
    """Provide random images in the place of CIFAR-10."""

    def prepare_data(self) -> None:
        """Download nothing."""

    def setup(self, stage: str) -> None:
        """Create the images."""
        torch.manual_seed(0)
        images = torch.randint(256, (BATCH * 8, 3, 32, 32), dtype=torch.uint8)
        self.train_set = self.val_set = images, torch.randint(10, (len(images),))


class StepClock(L.Callback):
    """Time the intervals between the ends of steps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.mark: float | None = None

    def on_train_batch_end(self, *_: Any) -> None:
        now = time.perf_counter()
        if self.mark is not None:
            self.seconds.append(now - self.mark)
        self.mark = now


def suite(steps: int) -> list[float]:
    """Train with Lightning, and return the seconds of all steps but the first."""
    torch.manual_seed(42)
    clock = StepClock()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps + 1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[CostCounters(), OptimizerInternals(), clock],
    )
    module = ImageClassifier(optimizer=make_optimizer, vector=VECTOR)
    trainer.fit(module, datamodule=RandomImages(batch_size=BATCH))
    return clock.seconds


def by_hand(steps: int) -> list[float]:
    """Train with a hand-written loop, and return the seconds of later steps.

    The first step is left out.
    """
    torch.manual_seed(42)
    data, network = RandomImages(batch_size=BATCH), CIFARResNet18()
    data.setup("fit")
    optimizer = make_optimizer(param_groups(network, "all", vector=VECTOR))
    batches: ImageBatches = data.train_dataloader()
    sums, seconds = torch.zeros(2), []
    start = time.perf_counter()
    for step, batch in enumerate(batches):
        images, labels = data.augmentation.apply(batch.images, batch.draws), batch.labels  # type: ignore[attr-defined]
        optimizer.zero_grad()
        logits = network(images)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        sums += torch.stack([loss.detach() * len(images), (logits.detach().argmax(1) == labels).sum()])
        now = time.perf_counter()
        seconds.append(now - start)
        start = now
        if step == steps:
            break
    return seconds[1:]


def main() -> int:
    """Alternate between both loops, print the ratio, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    times: dict[str, list[float]] = {"by hand": [], "Lightning": []}
    for number in range(options.rounds):
        sides = [("by hand", by_hand), ("Lightning", suite)]
        for name, side in sides if number % 2 == 0 else sides[::-1]:
            times[name] += side(options.steps)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["Lightning"] / medians["by hand"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores, {platform.machine()}")
    for name, values in times.items():
        print(f"{name:<12}{medians[name]:8.3f} s/step ({min(values):.3f} to {max(values):.3f}, {len(values)} steps)")
    print(f"ratio       {ratio:8.3f}   (at most {LARGEST_RATIO})")
    return int(ratio > LARGEST_RATIO)


if __name__ == "__main__":
    sys.exit(main())
