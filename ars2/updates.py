"""The arithmetic of one update over lists of tensors: Adam's statistics (energy), orthogonal directions (geometry)."""

import math
from typing import TypeAlias

import torch
from torch import Tensor

from ars2.orthogonalize import orthogonalize_all

Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]


def update_moments_(grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, betas: tuple[float, float]) -> None:
    """Take ``grads`` into both moments, in place: ``m <- b1 m + (1-b1) g``, ``v <- b2 v + (1-b2) g*g``."""
    torch._foreach_lerp_(exp_avgs, grads, 1 - betas[0])
    torch._foreach_mul_(exp_avg_sqs, betas[1])
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - betas[1])


def second_moment_root(exp_avg_sqs: Tensors, beta: float, step: int, eps: float) -> Tensors:
    """Return ``sqrt(v / (1 - beta^step)) + eps``; at step 0 nothing was seen, and the root is zero."""
    root = torch._foreach_sqrt(exp_avg_sqs)
    if step > 0:
        torch._foreach_div_(root, math.sqrt(1 - beta**step))
    torch._foreach_add_(root, eps)
    return root


def adam_directions(
    exp_avgs: Tensors, exp_avg_sqs: Tensors, betas: tuple[float, float], step: int, eps: float
) -> Tensors:
    """Return ``u = m_hat / (sqrt(v_hat) + eps)`` for moments that have seen ``step`` gradients (Kingma & Ba 2015)."""
    root = second_moment_root(exp_avg_sqs, betas[1], step, eps)
    torch._foreach_mul_(root, 1 - betas[0] ** step)
    return torch._foreach_div(exp_avgs, root)


def as_stack(tensor: Tensor, flatten: bool) -> Tensor:
    """View ``tensor`` as the stack (matrices, rows, cols) that is orthogonalised.

    2-D: one matrix. 3-D: a stack (heads, rows, cols), or with ``flatten`` the matrix (out, in*k). Above: (out, rest).
    """
    if tensor.ndim == 3 and not flatten:
        return tensor
    return tensor.reshape(1, tensor.shape[0], -1)


def orthogonal_directions(
    directions: Tensors, flatten: bool, steps: int, coefficients: str, dtype: torch.dtype
) -> Tensors:
    """Return each direction's orthogonal factor, stacks matrix by matrix, in the directions' shapes and dtype."""
    stacks = [as_stack(direction, flatten) for direction in directions]
    factors = orthogonalize_all(stacks, steps, coefficients, dtype)
    return [o.to(u.dtype).reshape(u.shape) for o, u in zip(factors, directions, strict=True)]


def energies(directions: Tensors) -> Tensors:
    """Return each tensor's Frobenius norm, a scalar tensor: one energy for the whole tensor, stacks included."""
    return torch._foreach_norm(directions)


def apply_(params: Tensors, directions: Tensors, lr: float, weight_decay: float) -> None:
    """Move the parameters with decoupled decay, in place: ``p <- (1 - lr*wd) p - lr*direction``."""
    if weight_decay != 0:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_add_(params, directions, alpha=-lr)
