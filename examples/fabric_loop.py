"""Train with ARS2-Neo in a loop of Lightning Fabric.

    PYTHONPATH=. fabric run --devices 2 --strategy ddp examples/fabric_loop.py

The loop has bf16, clipping, accumulation, second passes and checkpoints. Repeat the command to continue after
the last complete epoch.
"""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn

from ars2 import ARS2Neo, param_groups
from examples.tiny_task import loader, network, windows

ACCUMULATE, CLIP = 4, 1.0


def train(checkpoint: Path, epochs: int = 20, **options: Any) -> tuple[nn.Module, list[float]]:
    """Return the network and this process's first-pass loss of each new step."""
    fabric = Fabric(precision="bf16-mixed")
    torch.manual_seed(0)
    model = network()
    groups = param_groups(model, policy="hidden", vector={"lr": 1e-2, "weight_decay": 0.0})
    model, optimizer = fabric.setup(model, ARS2Neo(groups, lr=2e-3, weight_decay=0.1, **options))
    batches = fabric.setup_dataloaders(loader())
    if fabric.world_size > 1:
        optimizer.distribute(torch.distributed.group.WORLD)  # all processes decide alike, and share Newton-Schulz
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "epoch": 0}
    if checkpoint.exists():
        fabric.load(checkpoint, state)

    losses = []
    for epoch in range(state["epoch"], epochs):
        # Each process draws its own dropout masks, and a resumed run draws those of an uninterrupted one.
        torch.manual_seed(epoch * fabric.world_size + fabric.global_rank)
        for window in windows(batches, ACCUMULATE):
            losses.append(0.0)
            optimizer.zero_grad()
            for number in optimizer.passes(model):  # 1 and, in a two-pass step, 2
                for index, (inputs, targets) in enumerate(window, start=1):
                    # The processes exchange the gradient once in each pass.
                    with fabric.no_backward_sync(model, enabled=index < len(window)):
                        loss = nn.functional.mse_loss(model(inputs), targets) / len(window)
                        fabric.backward(loss)
                    losses[-1] += loss.item() if number == 1 else 0.0
            fabric.clip_gradients(model, optimizer, max_norm=CLIP)
            optimizer.step()
        fabric.save(checkpoint, {**state, "epoch": epoch + 1})
        fabric.print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}")
    return model.module, losses


if __name__ == "__main__":
    train(Path("runs/fabric_loop.ckpt"), mode="aga", rho=0.05, k=5)
