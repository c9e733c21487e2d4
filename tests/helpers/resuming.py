"""Compare a resumed run with an uninterrupted one.

It works for any task that the command line can train.
"""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor

from modules.metrics import Metrics
from modules.modular_addition import ModularAddition
from tests.helpers.commands import Result, call, folders, metrics

STOP_AT = "ARS2_TEST_STOP_AT"
# Times; paths, as two runs have two folders; and entries that Lightning saves but never reads.
DIFFERS = {
    *("cost/training_seconds", "training_seconds", "wall_seconds", "dirpath", "best_model_path", "kth_best_model_path"),
    *("last_model_path", "best_k_models", "current_score"),
}


class Interrupt(L.Callback):
    """Send this process a signal at a step, both from the environment.

    The variable is ``SIGTERM:6``, for example. ``FAILURE:6`` is an error there, which nothing is saved before.
    """

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        name, _, step = os.environ.get(STOP_AT, "").partition(":")
        if name and trainer.global_step == int(step):
            if name == "FAILURE":
                raise RuntimeError("as the test wants it")
            signal.raise_signal(signal.Signals[name])


class Noise(L.Callback):
    """Draw from every generator in each pass.

    A resumed run must have all their states.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        module: Any = pl_module
        quiet = module.compute_loss

        def noisy(batch: Any, metrics: Metrics | None) -> Tensor:
            loss: Tensor = quiet(batch, metrics)
            if module.training:
                loss = loss * (1 + 0.1 * (random.random() + np.random.rand() + torch.rand(()).item()))
            return loss

        module.compute_loss = noisy


def fit(runs: Path, *arguments: object, stop: str = "") -> Result:
    """Run ``fit`` with the interrupting callback.

    Every run of a test has the same arguments but ``stop``.
    """
    options = ("--trainer.callbacks+=tests.helpers.resuming.Interrupt", "--runs", runs)
    os.environ[STOP_AT] = stop
    try:
        return call("fit", *arguments, *options)
    finally:
        del os.environ[STOP_AT]


def checkpoint(folder: Path, name: str = "last") -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / f"checkpoints/{name}.ckpt", weights_only=True)
    return loaded


def differences(actual: Any, expected: Any, where: str = "") -> Iterator[str]:
    """Yield the places where two checkpoints differ in a bit.

    Entries that depend on time and place are left out.
    """
    if isinstance(actual, dict) and isinstance(expected, dict):
        # The key of a checkpoint callback is its options, its folder among them.
        for key in actual.keys() | expected.keys():
            if key in DIFFERS:
                continue
            if key not in actual or key not in expected:
                yield f"{where}.{key}"
            else:
                yield from differences(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(actual, (list, tuple)) and isinstance(expected, (list, tuple)) and len(actual) == len(expected):
        for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
            yield from differences(a, b, f"{where}[{index}]")
    elif isinstance(actual, Tensor) and isinstance(expected, Tensor):
        if actual.dtype != expected.dtype or not torch.equal(actual, expected):
            yield where
    elif actual != expected and not (actual != actual and expected != expected):
        yield f"{where}: {actual!r} and {expected!r}"


def assert_same_run(actual: Path, expected: Path) -> None:
    """Check that two run folders have the same training.

    All that checkpoints have, every row of the log and all texts are compared.
    """
    for name in ("last", "best"):
        assert list(differences(checkpoint(actual, name), checkpoint(expected, name))) == [], name
    assert metrics(actual) == metrics(expected)
    header = [(folder / "metrics.csv").read_text().splitlines()[0] for folder in (actual, expected)]
    assert header[0] == header[1]
    for name in ("samples.txt", "hparams.yaml", "parameters.txt"):
        texts = [path.read_text() if path.exists() else None for path in (actual / name, expected / name)]
        assert texts[0] == texts[1], name


def only_folder(runs: Path) -> Path:
    (folder,) = folders(runs)
    return folder


class BrokenStep(ModularAddition):
    """Have a loss that is not a number in the third batch of training."""

    def compute_loss(self, batch: tuple[Tensor, Tensor], metrics: Metrics | None) -> Tensor:
        loss = super().compute_loss(batch, metrics)
        broken = self.trainer.training and self.global_step == 2 and self.skipped_steps == 0
        return loss * torch.nan if broken else loss
