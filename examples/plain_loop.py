"""Train a small network with ARS2-Neo in a plain loop.

    python examples/plain_loop.py

The loop has gradient scaling, clipping, accumulation and two passes. It needs only torch and ars2. With mode="base" a
step makes one pass, and you can remove the block of the second pass.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ars2 import ARS2Neo, param_groups, repeatable

STEPS, MICRO_BATCHES, MICRO_BATCH, CLIP = 150, 4, 64, 1.0


def train(steps: int = STEPS, **options: Any) -> list[float]:
    """Return the first-pass loss of each step; the options are those of ARS2Neo."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = torch.float16 if device == "cuda" else torch.bfloat16
    model = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 1))
    model.to(device)
    # Biases, gains and, under policy "hidden", the output head are vectors. They get AdamW, here with separate options.
    groups = param_groups(model, policy="hidden", vector={"lr": 1e-2, "weight_decay": 0.0})
    optimizer = ARS2Neo(groups, lr=2e-3, weight_decay=0.1, **options)
    scaler = torch.amp.GradScaler(device)

    def backward(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device, half):
            loss = nn.functional.mse_loss(model(inputs).float(), targets) / MICRO_BATCHES
        scaler.scale(loss).backward()
        return loss.detach()

    losses = []
    for _ in range(steps):
        passes = []
        for _ in range(MICRO_BATCHES):
            inputs = torch.randn(MICRO_BATCH, 16, device=device)
            targets = inputs[:, :2].prod(dim=1, keepdim=True)
            # The second call uses the same dropout masks and does not update BatchNorm's running statistics.
            passes.append(repeatable(functools.partial(backward, inputs, targets), model))

        optimizer.zero_grad()
        losses.append(sum(one_pass().item() for one_pass in passes))
        if optimizer.wants_second_pass():  # it does not need unscaled gradients
            optimizer.perturb()
            try:
                for one_pass in passes:
                    one_pass()
            finally:
                optimizer.restore()  # bit for bit
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)  # skips a step whose gradient is not finite
        scaler.update()
    print(f"mean loss: {sum(losses[:10]) / 10:.3f} in the first ten steps, {sum(losses[-10:]) / 10:.3f} in the last")
    print(f"gradient evaluations: {optimizer.diagnostics()['gradient_evaluations']:.0f} in {steps} steps")
    return losses


if __name__ == "__main__":
    train(mode="aga", rho=0.05, k=5)
