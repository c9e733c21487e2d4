"""Train with ARS2-Neo in a loop of Hugging Face Accelerate.

    torchrun --nproc_per_node 2 -m examples.accelerate_loop

The loop has bf16, clipping, accumulation and second passes. accelerator.accumulate() spreads a step over iterations of
the loop over batches, which a second pass could not repeat. This loop takes the micro-batches of a step together.
"""

from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ars2 import ARS2Neo, param_groups
from examples.tiny_task import loader, network, windows

ACCUMULATE, CLIP = 4, 1.0


def train(epochs: int = 20, precision: str = "bf16", **options: Any) -> tuple[nn.Module, list[float]]:
    """Return the network and this process's first-pass loss of each step."""
    # Without cpu=True, processes on CPUs would each train alone.
    accelerator = Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    model = network()
    groups = param_groups(model, policy="hidden", vector={"lr": 1e-2, "weight_decay": 0.0})
    optimizer = ARS2Neo(groups, lr=2e-3, weight_decay=0.1, **options)
    # Accelerate's wrapper has no passes(), so the loop keeps the optimizer too; prepared.optimizer is the same object.
    model, prepared, batches = accelerator.prepare(model, optimizer, loader())
    if accelerator.num_processes > 1:
        optimizer.distribute(torch.distributed.group.WORLD)  # all processes decide alike, and share Newton-Schulz

    losses = []
    for epoch in range(epochs):
        # Each process draws its own dropout masks.
        torch.manual_seed(epoch * accelerator.num_processes + accelerator.process_index)
        for window in windows(batches, ACCUMULATE):
            losses.append(0.0)
            prepared.zero_grad()
            for number in optimizer.passes(model):  # 1 and, in a two-pass step, 2
                for index, (inputs, targets) in enumerate(window, start=1):
                    # The processes exchange the gradient once in each pass.
                    with nullcontext() if index == len(window) else accelerator.no_sync(model):
                        loss = nn.functional.mse_loss(model(inputs), targets) / len(window)
                        accelerator.backward(loss)
                    losses[-1] += loss.item() if number == 1 else 0.0
            accelerator.clip_grad_norm_(model.parameters(), CLIP)
            prepared.step()
        accelerator.print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}")
    return accelerator.unwrap_model(model), losses


if __name__ == "__main__":
    train(mode="aga", rho=0.05, k=5)
