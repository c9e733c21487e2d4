"""Measure an epoch of the grokking task against a hand-written loop.

    python -m benchmarks.loop_overhead [--epochs 20] [--rounds 3]

Both train the same network on the same batches with the same optimizer, validate after every epoch and keep the mean
loss and accuracy of both splits. The suite runs its command line, with CSV log, checkpoints, callbacks and counters.
The two alternate, and the table shows medians over the epochs of all rounds without each round's first epoch. Exits
with 1 if the ratio is above 1.25.
"""

import argparse
import contextlib
import io
import json
import platform
import statistics
import sys
import tempfile
import time

from launch.cli import main

import lightning.pytorch as L  # isort: skip  (after cli, which keeps heavy packages out of its import)
import torch
import torch.nn.functional as F

from ars2 import ARS2Neo, param_groups
from datamodules.modular_addition import ModularAdditionData
from modules.grokking_transformer import GrokkingTransformer

LARGEST_RATIO = 1.25


class EpochClock(L.Callback):
    """Time the intervals between the starts of epochs."""

    seconds: list[float] = []  # noqa: RUF012  (one list: the command line makes the callback)

    def __init__(self) -> None:
        self.start = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        now = time.perf_counter()
        if trainer.current_epoch > 1:
            EpochClock.seconds.append(now - self.start)
        self.start = now


def suite(epochs: int) -> list[float]:
    """Train with train.py, and return the seconds of the inner epochs.

    The first and the last epoch are left out.
    """
    EpochClock.seconds.clear()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = ["fit", "--config", "configs/grok_base.yaml", "--runs", folder, "--wandb", "false"]
        arguments += ["--trainer.max_epochs", str(epochs + 1)]
        if main([*arguments, "--trainer.callbacks+=benchmarks.loop_overhead.EpochClock"]):
            raise SystemExit(1)
    from benchmarks import loop_overhead  # the command line imported this file as benchmarks.loop_overhead

    return list(loop_overhead.EpochClock.seconds)


def by_hand(epochs: int) -> list[float]:
    """Train with a hand-written loop, and return the seconds of later epochs.

    The first epoch is left out.
    """
    torch.manual_seed(42)
    data, network = ModularAdditionData(), GrokkingTransformer(114)
    groups = param_groups(network, "all", vector={"betas": (0.9, 0.999), "weight_decay": 0.01})
    optimizer = ARS2Neo(groups, lr=1e-3, betas=(0.9, 0.98), weight_decay=1.0, mode="base")
    train, val = data.train_dataloader(), data.val_dataloader()
    history, seconds = [], []
    for _ in range(epochs):
        start = time.perf_counter()
        sums = torch.zeros(4)
        for tokens, answers in train:
            optimizer.zero_grad()
            logits = network(tokens)
            loss = F.cross_entropy(logits, answers)
            loss.backward()
            optimizer.step()
            correct = (logits.detach().argmax(1) == answers).sum()
            sums[:2] += torch.stack([loss.detach() * len(tokens), correct])
        with torch.no_grad():
            for tokens, answers in val:
                logits = network(tokens)
                loss = F.cross_entropy(logits, answers) * len(tokens)
                sums[2:] += torch.stack([loss, (logits.argmax(1) == answers).sum()])
        history.append(sums.tolist())
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def run(epochs: int, rounds: int) -> dict[str, float]:
    """Alternate between both loops, and return median times and their ratio.

    The times are milliseconds per epoch.
    """
    times: dict[str, list[float]] = {"suite": [], "by_hand": []}
    for _ in range(rounds):
        times["by_hand"] += by_hand(epochs)
        times["suite"] += suite(epochs)
    medians = {side: 1e3 * statistics.median(values) for side, values in times.items()}
    return {**medians, "ratio": medians["suite"] / medians["by_hand"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    options = parser.parse_args()
    result = run(options.epochs, options.rounds)
    if options.json:
        print(json.dumps(result))
    else:
        processor = platform.processor() or platform.machine()
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {processor}")
        print(f"hand-written loop   {result['by_hand']:7.1f} ms/epoch")
        print(f"command line        {result['suite']:7.1f} ms/epoch")
        print(f"ratio               {result['ratio']:7.3f}   (at most {LARGEST_RATIO})")
    sys.exit(result["ratio"] > LARGEST_RATIO)
