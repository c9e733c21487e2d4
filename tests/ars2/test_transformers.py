"""The Trainer of transformers makes the steps of a loop over ``passes``, bit for bit."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from ars2 import ARS2Neo, param_groups
from ars2.transformers import TwoPassTrainer

STEPS, SIZE = 6, 4
MODES: dict[str, dict[str, Any]] = {
    "base": {"mode": "base"},
    "sync": {"mode": "sync", "rho": 0.1},
    "aga": {"mode": "aga", "rho": 0.1, "k": 3},
}


class Network(nn.Module):
    """Classify three tokens, with dropout and running statistics."""

    accepts_loss_kwargs = False

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding, self.hidden = nn.Embedding(20, 8), nn.Linear(24, 16)
        self.statistics, self.dropout, self.classifier = nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 4)
        for param in self.parameters():
            nn.init.normal_(param, std=0.5, generator=generator)

    def forward(self, tokens: Tensor, labels: Tensor, num_items_in_batch: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.statistics(self.hidden(self.embedding(tokens).flatten(1)))
        logits = self.classifier(self.dropout(hidden))
        if num_items_in_batch is None:
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch
        return {"loss": loss, "logits": logits}


class CountingNetwork(Network):
    """Divide the loss by the number of labels of the update."""

    accepts_loss_kwargs = True


class Examples(IterableDataset[dict[str, Tensor]]):
    """Give random tokens, of which some have no label."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        while True:
            tokens = torch.randint(0, 20, (3,), generator=generator)
            unlabelled = torch.rand((), generator=generator) < 0.2
            yield {"tokens": tokens, "labels": torch.tensor(-100) if unlabelled else tokens.sum() % 4}


def batches() -> Iterator[dict[str, Tensor]]:
    examples = iter(Examples())
    while True:
        rows = [next(examples) for _ in range(SIZE)]
        yield {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class SeedAtStart(TrainerCallback):
    """Seed when the first batch was loaded, because loaders draw a number too."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            torch.manual_seed(0)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": SIZE,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return TrainingArguments(**{**defaults, **options})


def optimizer_of(model: nn.Module, **options: Any) -> ARS2Neo:
    return ARS2Neo(param_groups(model, "hidden", head="classifier"), lr=0.01, ns_dtype="float32", **options)


def trained(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    base: type[Trainer] = TwoPassTrainer,
    **options: Any,
) -> Trainer:
    trainer = base(
        model=model,
        args=arguments(folder, **options),
        train_dataset=Examples(),
        optimizers=(optimizer, None),
        callbacks=[SeedAtStart()],
    )
    trainer.train()
    return trainer


def train_by_hand(model: nn.Module, optimizer: ARS2Neo, micro_batches: int, clip: float) -> list[float]:
    """Return the loss of each step."""
    source, losses = batches(), []
    torch.manual_seed(0)
    model.train()
    for _ in range(STEPS):
        window = [next(source) for _ in range(micro_batches)]
        items = torch.stack([batch["labels"].ne(-100).sum() for batch in window]).sum()
        optimizer.zero_grad()
        for number in optimizer.passes(model):
            total = torch.tensor(0.0)
            for batch in window:
                if model.accepts_loss_kwargs:
                    loss = model(**batch, num_items_in_batch=items)["loss"]
                else:
                    loss = model(**batch)["loss"] / micro_batches
                loss.backward()
                total += loss.detach()
            if number == 1:
                losses.append(total.item())
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return losses


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for (name, value), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize(("mode", "micro_batches"), [("base", 2), ("sync", 1), ("sync", 3), ("aga", 2)])
@pytest.mark.parametrize("network", [Network, CountingNetwork])
def test_the_trainer_makes_the_steps_of_a_plain_loop(
    mode: str, micro_batches: int, network: type[nn.Module], tmp_path: Path
) -> None:
    model, expected = network(), network()
    optimizer, by_hand = optimizer_of(model, **MODES[mode]), optimizer_of(expected, **MODES[mode])
    trainer = trained(tmp_path, model, optimizer, max_grad_norm=0.5, gradient_accumulation_steps=micro_batches)
    losses = train_by_hand(expected, by_hand, micro_batches, 0.5)
    assert_same(model, expected)
    assert optimizer.diagnostics() == by_hand.diagnostics()
    assert model.statistics.num_batches_tracked == STEPS * micro_batches
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in logs] == pytest.approx(losses, rel=1e-6)
    assert trainer.state.global_step == STEPS
    if mode != "base":
        assert 0 < optimizer.diagnostics()["sync_steps"] <= STEPS


def test_without_transformers_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "ars2.transformers")
    with pytest.raises(ImportError, match=r"pip install 'ars2\[transformers\]'"):
        importlib.import_module("ars2.transformers")
