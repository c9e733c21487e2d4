import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from callbacks.last_checkpoint import LastCheckpoint
from callbacks.training_state import RandomStates, random_states, set_random_states
from tests.callbacks.fits import data, fit, module


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]


def test_every_generator_is_restored_exactly_also_from_a_checkpoint(tmp_path: Path) -> None:
    random.gauss(0, 1), np.random.randn()  # both keep a second value for the next call
    torch.save(random_states(), tmp_path / "states")
    expected = draws()
    draws()
    set_random_states(torch.load(tmp_path / "states", weights_only=True))
    assert draws() == expected


class Generators:
    """Stand for torch.mps or torch.xpu, with two devices."""

    def __init__(self) -> None:
        self.of = [torch.Generator().manual_seed(i) for i in range(2)]

    def get_rng_state(self, device: torch.device) -> torch.Tensor:
        return self.of[device.index].get_state()

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        self.of[device.index].set_state(state)


def test_the_generators_of_any_accelerator_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Generators()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_device_module", lambda device: there)
    states = random_states()
    expected = [torch.rand(3, generator=generator) for generator in there.of]
    set_random_states(states)
    again = [torch.rand(3, generator=generator) for generator in there.of]
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    set_random_states({**states, "xpu": states["xpu"][:1]})  # of a machine with another number of devices


class Draws(RandomStates):
    """Draw random numbers in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[list[float]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.drawn.append(draws())


def test_a_resumed_run_draws_like_an_uninterrupted_one(tmp_path: Path) -> None:
    def run(epochs: int, callback: Draws, folder: str, ckpt_path: str | None = None) -> list[list[float]]:
        saving = LastCheckpoint(1, str(tmp_path / folder))
        fit(module(), data(), [callback, saving], None, epochs, ckpt_path=ckpt_path, enable_checkpointing=True)
        return callback.drawn

    start = random_states()
    uninterrupted = run(4, Draws(), "uninterrupted")
    set_random_states(start)
    first = run(2, Draws(), "half")
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    assert first + run(4, Draws(), "rest", str(tmp_path / "half/last.ckpt")) == uninterrupted
