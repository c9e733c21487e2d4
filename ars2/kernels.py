"""Compute updates on lists of tensors.

Adam's statistics give the energy of a matrix's update, Newton-Schulz its direction. All functions are pure, or change
only the arguments that they name, and work on lists with one entry for each tensor.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ars2.orthogonalize import LEAST_NORM

Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]
# A scalar tensor where the step is compiled or captured, so that the host never reads its value.
Number: TypeAlias = float | Tensor


def ema_update_(means: Tensors, values: Tensors, beta: Number) -> None:
    """Update moving averages in place, ``m <- beta m + (1-beta) value``."""
    if isinstance(beta, Tensor):
        torch._foreach_mul_(means, beta)
        torch._foreach_add_(means, torch._foreach_mul(values, 1 - beta))
    else:
        torch._foreach_lerp_(means, values, 1 - beta)


def bias_corrections(beta: Number, counts: Sequence[Number]) -> list[Any]:
    """Return ``1 - beta^count`` for each tensor, Adam's correction of averages."""
    # With a beta near 1, float32 would lose most digits.
    return [1 - beta ** (count.double() if isinstance(count, Tensor) else count) for count in counts]


def adam_denominators(exp_avg_sqs: Tensors, beta: Number, counts: Sequence[Number], eps: Number) -> Tensors:
    """Return ``sqrt(v / (1 - beta^count)) + eps``.

    After no gradient the second moment is zero, and the result is ``eps``.
    """
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    corrections = bias_corrections(beta, counts)
    if isinstance(corrections[0], Tensor):
        torch._foreach_div_(denominators, [c.sqrt().clamp_min(LEAST_NORM) for c in corrections])
    else:
        torch._foreach_div_(denominators, [math.sqrt(c) or 1.0 for c in corrections])
    torch._foreach_add_(denominators, eps)
    return denominators


def adam_directions(
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    betas: tuple[Number, Number],
    counts: Sequence[Number],
    eps: Number,
) -> Tensors:
    """Update both moments in place and return Adam's directions.

    ``m <- b1 m + (1-b1) g``, ``v <- b2 v + (1-b2) g*g``, and ``u = m_hat / (sqrt(v_hat) + eps)`` (Kingma & Ba 2015).
    ``counts`` are the numbers of gradients, these included. All tensors of one index must have the same dtype and
    strides.
    """
    if torch.compiler.is_compiling():  # The compiler fuses plain operations, but not the kernel below.
        ema_update_(exp_avgs, grads, betas[0])
        ema_update_(exp_avg_sqs, torch._foreach_mul(grads, grads), betas[1])
        denominators = adam_denominators(exp_avg_sqs, betas[1], counts, eps)
        return torch._foreach_div(torch._foreach_div(exp_avgs, bias_corrections(betas[0], counts)), denominators)
    directions = [torch.zeros_like(exp_avg) for exp_avg in exp_avgs]
    # An AdamW step from zero with learning rate -1 and no decay yields u, in one pass over memory instead of ten.
    adamw_(directions, grads, exp_avgs, exp_avg_sqs, betas, counts, eps, lr=-1.0, weight_decay=0.0)
    return directions


def adamw_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    betas: tuple[Any, Any],
    counts: Sequence[Number],
    eps: Any,
    lr: Any,
    weight_decay: Any,
) -> None:
    """Update both moments and the parameters in place, as AdamW.

    ``p <- (1 - lr*wd) p - lr*u``. All tensors of one index must have the same dtype and strides, which torch's fused
    kernel does not check.
    """
    if torch.compiler.is_compiling():
        apply_update_(params, adam_directions(grads, exp_avgs, exp_avg_sqs, betas, counts, eps), None, lr, weight_decay)
        return
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, grad in enumerate(grads):
        kinds.setdefault((grad.device, grad.dtype), []).append(index)
    for (device, _), indices in kinds.items():
        lists: list[Tensors] = [params, grads, exp_avgs, exp_avg_sqs]
        if len(kinds) > 1:
            lists = [[tensors[index] for index in indices] for tensors in lists]
        fills = {c: torch.full((), c, device=device) for c in set(counts) if not isinstance(c, Tensor)}
        torch._fused_adamw_(
            lists[0],
            lists[1],
            lists[2],
            lists[3],
            [],
            [c if isinstance(c, Tensor) else fills[c] for c in (counts[index] for index in indices)],
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )


def momentum_directions(grads: Tensors, buffers: Tensors, momentum: Number, *, nesterov: bool) -> Tensors:
    """Update momentum ``buffers`` in place and return copies of them.

    With Nesterov, the result is ``momentum * b + (1 - momentum) * g``.
    """
    ema_update_(buffers, grads, momentum)
    if not nesterov:
        return [buffer.clone() for buffer in buffers]
    if isinstance(momentum, Tensor):
        return torch._foreach_add(torch._foreach_mul(buffers, momentum), torch._foreach_mul(grads, 1 - momentum))
    return torch._foreach_lerp(grads, buffers, momentum)


def norms(tensors: Tensors) -> Tensor:
    """Return the Frobenius norm of each tensor, a float64 tensor (tensors,)."""
    return torch.stack(torch._foreach_norm(tensors)).double()


def apply_update_(
    params: Tensors,
    directions: Tensors,
    scales: Tensors | list[float] | None,
    lr: Number,
    weight_decay: Number,
    *,
    cautious: bool = False,
) -> None:
    """Move the parameters with decoupled weight decay, in place.

    ``p <- (1 - lr*wd) p - lr*scale*direction``. The dtypes may differ.

    Args:
        params, directions: of equal shapes.
        scales: positive scalar tensors or numbers, one for each parameter; ``None`` means 1.
        lr, weight_decay: numbers, or scalar tensors where the step is compiled or captured.
        cautious: whether to decay only entries that the update does not move away from zero.
    """
    if cautious:
        for param, direction in zip(params, directions, strict=True):
            param.sub_(torch.where(direction * param >= 0, param, 0.0) * (lr * weight_decay))
    elif isinstance(weight_decay, Tensor) or weight_decay != 0:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    if isinstance(lr, Tensor):
        factors = [-lr] * len(params) if scales is None else [-lr * scale for scale in scales]
        torch._foreach_addcmul_(params, directions, factors)
    elif scales is None:
        torch._foreach_add_(params, directions, alpha=-lr)
    elif isinstance(scales[0], Tensor):
        torch._foreach_addcmul_(params, directions, scales, value=-lr)
    else:
        for param, direction, scale in zip(params, directions, scales, strict=True):
            param.add_(direction, alpha=-lr * scale)


def with_remainders(params: Tensors, remainders: Tensors) -> Tensors:
    """Return half-precision parameters in float32, with their rounding errors.

    If a user has replaced an entry, its remainder does not round to it and is ignored.
    """
    rounded = [param.float() for param in params]
    exact = [r + remainder for r, remainder in zip(rounded, remainders, strict=True)]
    return [torch.where(e.to(p.dtype) == p, e, r) for e, p, r in zip(exact, params, rounded, strict=True)]


def round_(params: Tensors, remainders: Tensors, exact: Tensors) -> None:
    """Round float32 values into half-precision parameters and ``remainders``."""
    for param, remainder, value in zip(params, remainders, exact, strict=True):
        param.copy_(value)
        torch.sub(value, param.float(), out=remainder)
