"""Implement ARS2-Neo tensor by tensor, as a reference for optimizer_step.py.

One pass a step (mode "base"). A stack of matrices is orthogonalised by batched products; nothing else is joined.
"""

import math
from typing import Any

import torch
from torch import Tensor


def newton_schulz(u: Tensor, steps: int = 5) -> Tensor:
    """Make five quintic Newton-Schulz steps in bfloat16 on a stack of matrices."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (u / (u.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class PerTensorARS2:
    """ARS2-Neo Base with separate operations for every tensor.

    It takes the groups of :func:`ars2.param_groups`.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        self.matrices = {id(p) for group in groups if group["track"] == "matrix" for _, p in group["params"]}
        self.params: list[Tensor] = [p for group in groups for _, p in group["params"]]
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.params]
        self.t = 0

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        beta1, beta2 = self.betas
        for p, (m, v) in zip(self.params, self.moments, strict=True):
            g = p.grad
            if g is None:
                continue
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            denominator = (v.sqrt() / math.sqrt(1 - beta2**self.t)).add_(self.eps)
            u = m / (1 - beta1**self.t) / denominator
            if id(p) in self.matrices:
                energy = u.norm()
                stack = u if u.ndim == 3 else u.reshape(u.shape[0], -1)
                u = energy * newton_schulz(stack).to(p.dtype).view_as(p)
            p.mul_(1 - self.lr * self.weight_decay).add_(u, alpha=-self.lr)
