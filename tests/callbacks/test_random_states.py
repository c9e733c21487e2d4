import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from callbacks.last_checkpoint import LastCheckpoint
from callbacks.random_states import RandomStates, random_states, set_random_states
from tests.callbacks.fits import data, fit, module


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]


def test_every_generator_goes_back_exactly_also_through_a_checkpoint(tmp_path: Path) -> None:
    random.gauss(0, 1), np.random.randn()  # both keep a second value for the next call
    torch.save(random_states(), tmp_path / "states")
    expected = draws()
    draws()
    set_random_states(torch.load(tmp_path / "states", weights_only=True))
    assert draws() == expected


class Draws(RandomStates):
    """Draws in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[list[float]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.drawn.append(draws())


def test_a_resumed_run_draws_what_the_whole_one_would(tmp_path: Path) -> None:
    def run(epochs: int, callback: Draws, folder: str, ckpt_path: str | None = None) -> list[list[float]]:
        saving = LastCheckpoint(1, str(tmp_path / folder))
        fit(module(), data(), [callback, saving], None, epochs, ckpt_path=ckpt_path, enable_checkpointing=True)
        return callback.drawn

    start = random_states()
    whole = run(4, Draws(), "whole")
    set_random_states(start)
    first = run(2, Draws(), "half")
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    assert first + run(4, Draws(), "rest", str(tmp_path / "half/last.ckpt")) == whole
