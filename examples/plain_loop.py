"""Train with ARS2-Neo in a plain loop.

    python -m examples.plain_loop

The loop has gradient scaling, clipping, accumulation and second passes. It needs only torch and ars2. It is the same
in all modes; with mode="base" every step makes one pass.
"""

from typing import Any

import torch
from torch import nn

from ars2 import ARS2Neo, param_groups
from examples.tiny_task import loader, network, windows

ACCUMULATE, CLIP = 4, 1.0


def train(epochs: int = 20, **options: Any) -> tuple[nn.Module, list[float]]:
    """Return the network and the first-pass loss of each step."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = network().to(device)
    # Biases, gains and, under policy "hidden", the output head are vectors. They get AdamW, here with separate options.
    groups = param_groups(model, policy="hidden", vector={"lr": 1e-2, "weight_decay": 0.0})
    optimizer = ARS2Neo(groups, lr=2e-3, weight_decay=0.1, **options)
    scaler = torch.amp.GradScaler(device)

    losses = []
    for epoch in range(epochs):
        for window in windows(loader(), ACCUMULATE):
            losses.append(0.0)
            optimizer.zero_grad()
            for number in optimizer.passes(model):  # 1 and, in a two-pass step, 2
                for inputs, targets in window:
                    with torch.autocast(device, torch.float16):
                        outputs = model(inputs.to(device))
                        loss = nn.functional.mse_loss(outputs.float(), targets.to(device)) / len(window)
                    scaler.scale(loss).backward()
                    losses[-1] += loss.item() if number == 1 else 0.0
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            scaler.step(optimizer)  # skips a step whose gradient is not finite
            scaler.update()
        print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}")
    print(f"gradient evaluations: {optimizer.diagnostics()['gradient_evaluations']:.0f} in {len(losses)} steps")
    return model, losses


if __name__ == "__main__":
    train(mode="aga", rho=0.05, k=5)
