"""Train the task of the examples with passes made by hand.

One process computes any number of processes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ars2 import ARS2Neo, param_groups
from examples.tiny_task import loader, network, windows

EPOCHS = 4
MODES: dict[str, dict[str, Any]] = {
    "base": {"mode": "base"},
    "sync": {"mode": "sync", "rho": 0.05},
    "aga": {"mode": "aga", "rho": 0.05, "k": 3, "alpha": 0.3},
}
Batch = list[Tensor]


def every_nth_batch(ranks: int) -> list[list[Batch]]:
    """Return the batches of each process as Accelerate distributes them."""
    return [list(loader())[rank::ranks] for rank in range(ranks)]


def every_nth_example(ranks: int) -> list[list[Batch]]:
    """Return the batches of each process as Fabric's sampler distributes them."""
    dataset, size = loader().dataset, loader().batch_size
    parts = [dataset[rank::ranks] for rank in range(ranks)]
    return [
        [list(batch) for batch in zip(*(part.split(size) for part in parts[rank]), strict=True)]
        for rank in range(ranks)
    ]


class Replicas:
    """Compute the mean gradient of several replicas.

    Each has its random numbers and buffers. ``unexchanged`` counts the micro-batches after which DDP need not
    exchange gradients.
    """

    unexchanged = 0

    def __init__(self, ranks: int, dtype: torch.dtype, scale: Callable[[Tensor], Tensor]) -> None:
        self.dtype, self.scale, self.models, self.random = dtype, scale, [], []
        for _ in range(ranks):
            torch.manual_seed(0)
            self.models.append(network())
            self.random.append(torch.get_rng_state())

    def draw(self, function: Callable[[], Any]) -> None:
        """Call a function with the random numbers of each replica."""
        for rank, state in enumerate(self.random):
            torch.set_rng_state(state)
            function()
            self.random[rank] = torch.get_rng_state()

    def one_pass(self, batches: list[list[Batch]]) -> list[float]:
        """Leave the mean gradient in the first replica; return the loss of each."""
        first, losses = self.models[0], []
        self.unexchanged += len(batches[0]) - 1
        for rank, model in enumerate(self.models):
            for param, source in zip(model.parameters(), first.parameters(), strict=True):
                param.data.copy_(source.data)
            torch.set_rng_state(self.random[rank])
            losses.append(0.0)
            for inputs, targets in batches[rank]:
                with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
                    outputs = model(inputs)
                loss = nn.functional.mse_loss(outputs.float(), targets) / len(batches[rank])
                self.scale(loss).backward()
                losses[-1] += loss.item()
            self.random[rank] = torch.get_rng_state()
        for params in zip(*(model.parameters() for model in self.models), strict=True):
            params[0].grad = torch.stack([p.grad for p in params]).sum(0) / len(params)
            for param in params[1:]:
                param.grad = None
        return losses

    def second_pass(self, batches: list[list[Batch]], random: list[Tensor]) -> None:
        after, self.random = self.random, list(random)
        buffers = [[buffer.clone() for buffer in model.buffers()] for model in self.models]
        self.one_pass(batches)
        for model, saved in zip(self.models, buffers, strict=True):
            for buffer, copy in zip(model.buffers(), saved, strict=True):
                buffer.copy_(copy)
        self.random = after


def train(
    dtype: torch.dtype,
    ranks: int = 1,
    shares: Callable[[int], list[list[Batch]]] = every_nth_batch,
    seed_epochs: bool = False,
    scaler: torch.amp.GradScaler | None = None,
    **options: Any,
) -> tuple[nn.Module, list[list[float]], int]:
    """Return the first network, the losses by step and process, and ``unexchanged``."""
    replicas = Replicas(ranks, dtype, (lambda loss: loss) if scaler is None else scaler.scale)
    model = replicas.models[0]
    groups = param_groups(model, policy="hidden", vector={"lr": 1e-2, "weight_decay": 0.0})
    optimizer = ARS2Neo(groups, lr=2e-3, weight_decay=0.1, **options)
    losses = []
    for epoch in range(EPOCHS):
        if seed_epochs:
            replicas.random = [torch.manual_seed(epoch * ranks + rank).get_state() for rank in range(ranks)]
        replicas.draw(lambda: iter(loader()))  # a DataLoader draws a seed for its workers
        for window in zip(*(windows(batches, 4) for batches in shares(ranks)), strict=True):
            optimizer.zero_grad()
            before = list(replicas.random)
            losses.append(replicas.one_pass(list(window)))
            if optimizer.wants_second_pass():
                optimizer.perturb()
                replicas.second_pass(list(window), before)
                optimizer.restore()
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
    return model, losses, replicas.unexchanged
