"""Compute updates on lists of tensors.

Adam's statistics give the energy of a matrix's update, Newton-Schulz its direction.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ars2.compiled import MaybeCompile, eager
from ars2.newton_schulz import Schedule
from ars2.orthogonalize import orthogonalize_all
from ars2.sharded import Shards
from ars2.sharing import Replicas, orthogonalize_replicated, orthogonalize_sharded

Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]
# A scalar tensor where the step is compiled or captured, so that the host never reads its value.
Number: TypeAlias = float | Tensor
# Below any nonzero float32 norm, since squares below 1e-45 are zero, and safe as a divisor.
LEAST_NORM = 1e-30


def ema_update_(means: Tensors, values: Tensors, beta: Number) -> None:
    """Update moving averages in place, ``m <- beta m + (1-beta) value``."""
    if isinstance(beta, Tensor):
        torch._foreach_mul_(means, beta)
        torch._foreach_add_(means, torch._foreach_mul(values, 1 - beta))
    else:
        torch._foreach_lerp_(means, values, 1 - beta)


def bias_correction(beta: Number, step: Number) -> Any:
    """Return ``1 - beta^step``, Adam's correction for moving averages from zero.

    For a ``step`` (tensors,) the result is a list of scalar tensors.
    """
    if not isinstance(step, Tensor):
        return 1 - beta**step
    # With a beta near 1, float32 would lose most digits.
    correction = 1 - beta ** step.double()
    return list(correction.unbind()) if step.ndim else correction


def adam_denominator(exp_avg_sqs: Tensors, beta: Number, step: Number, eps: Number) -> Tensors:
    """Return ``sqrt(v / (1 - beta^step)) + eps``.

    At step 0 the second moment is zero, and the result is ``eps``.
    """
    denominator = torch._foreach_sqrt(exp_avg_sqs)
    correction = bias_correction(beta, step)
    if isinstance(correction, list):
        torch._foreach_div_(denominator, [part.sqrt().clamp_min(1e-30) for part in correction])
    elif isinstance(correction, Tensor):
        torch._foreach_div_(denominator, correction.sqrt().clamp_min(1e-30))
    elif step > 0:
        torch._foreach_div_(denominator, math.sqrt(correction))
    torch._foreach_add_(denominator, eps)
    return denominator


def adam_directions(
    grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, betas: tuple[Number, Number], step: Number, eps: Number
) -> Tensors:
    """Update both moments in place and return Adam's direction.

    ``m <- b1 m + (1-b1) g``, ``v <- b2 v + (1-b2) g*g``, and ``u = m_hat / (sqrt(v_hat) + eps)`` (Kingma & Ba 2015).
    ``step`` counts the gradients, this one included. All tensors of one index must have the same dtype and strides.
    """
    if torch.compiler.is_compiling():  # The compiler fuses plain operations, but not the kernel below.
        ema_update_(exp_avgs, grads, betas[0])
        ema_update_(exp_avg_sqs, torch._foreach_mul(grads, grads), betas[1])
        denominators = adam_denominator(exp_avg_sqs, betas[1], step, eps)
        return torch._foreach_div(torch._foreach_div(exp_avgs, bias_correction(betas[0], step)), denominators)
    directions = [torch.zeros_like(exp_avg) for exp_avg in exp_avgs]
    # An AdamW step from zero with learning rate -1 and no decay yields u, in one pass over memory instead of ten.
    adamw_(directions, grads, exp_avgs, exp_avg_sqs, betas, step, eps, lr=-1.0, weight_decay=0.0)
    return directions


def momentum_directions(
    grads: Tensors, exp_avgs: Tensors, beta: Number, *, numels: Sequence[int], shards: Shards | None = None
) -> Tensors:
    """Update the first moment in place and return ``u = sqrt(numel) * m / |m|``.

    Its root mean square is 1. So its norm is that of Adam's direction at the first step, whose entries are 1 or -1.

    Args:
        grads, exp_avgs, beta: gradients, first moments and their decay.
        numels: number of entries of the full tensors.
        shards: the processes with the other rows of sharded tensors.
    """
    ema_update_(exp_avgs, grads, beta)
    lengths = torch._foreach_clamp_min(frobenius_norms(exp_avgs, shards), LEAST_NORM)
    directions = torch._foreach_div(exp_avgs, lengths)
    torch._foreach_mul_(directions, [math.sqrt(numel) for numel in numels])
    return directions


def adamw_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    betas: tuple[Any, Any],
    step: Number,
    eps: Any,
    lr: Any,
    weight_decay: Any,
) -> None:
    """Update both moments and the parameters in place, as AdamW.

    ``p <- (1 - lr*wd) p - lr*u``. All tensors of one index must have the same dtype and strides, which torch's fused
    kernel does not check.
    """
    if torch.compiler.is_compiling():
        directions = adam_directions(grads, exp_avgs, exp_avg_sqs, betas, step, eps)
        apply_(params, directions, None, lr, weight_decay)
        return
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, grad in enumerate(grads):
        kinds.setdefault((grad.device, grad.dtype), []).append(index)
    for (device, _), indices in kinds.items():
        lists: tuple[Tensors, Tensors, Tensors, Tensors] = (params, grads, exp_avgs, exp_avg_sqs)
        if len(kinds) > 1:
            p, g, m, v = ([tensors[index] for index in indices] for tensors in lists)
            lists = p, g, m, v
        if isinstance(step, Tensor) and step.ndim:
            all_counts = step.unbind()
            counts = [all_counts[index] for index in indices]
        else:
            count = step if isinstance(step, Tensor) else torch.full((), float(step), device=device)
            counts = [count] * len(indices)
        torch._fused_adamw_(
            lists[0],
            lists[1],
            lists[2],
            lists[3],
            [],
            counts,
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )


def momentum_update_(grads: Tensors, buffers: Tensors, momentum: Number, *, nesterov: bool) -> Tensors:
    """Update momentum ``buffers`` in place and return copies of them.

    With Nesterov, the result is ``momentum * b + (1 - momentum) * g``.
    """
    ema_update_(buffers, grads, momentum)
    if not nesterov:
        return [buffer.clone() for buffer in buffers]
    if isinstance(momentum, Tensor):
        return torch._foreach_add(torch._foreach_mul(buffers, momentum), torch._foreach_mul(grads, 1 - momentum))
    return torch._foreach_lerp(grads, buffers, momentum)


def as_stack(tensor: Tensor, flatten: bool) -> Tensor:
    """View ``tensor`` as the stack (matrices, rows, cols) to orthogonalise.

    A 2-D tensor is one matrix. A 3-D tensor is a stack (heads, rows, cols), or with ``flatten`` the matrix (out, in*k).
    Tensors with more dimensions are matrices (out, rest).
    """
    return tensor.reshape(stack_shape(tensor.shape, flatten))


def stack_shape(shape: torch.Size, flatten: bool) -> torch.Size:
    """Return the shape (matrices, rows, cols) of :func:`as_stack`."""
    if len(shape) == 3 and not flatten:
        return shape
    return torch.Size((1, shape[0], shape[1:].numel()))


def orthogonalize_(
    directions: Tensors,
    flatten: bool,
    steps: int,
    coefficients: Schedule,
    dtype: torch.dtype,
    algorithm: str,
    layout: Replicas | Shards | None = None,
    maybe_compile: MaybeCompile = eager,
    shapes: Sequence[torch.Size] = (),
) -> None:
    """Replace each direction by its orthogonal factor.

    Stacks are orthogonalised matrix by matrix, in ``dtype``.

    Args:
        directions: tensors, changed in place.
        flatten: as for :func:`as_stack`.
        steps, coefficients, dtype, algorithm: as for :func:`ars2.orthogonalize`.
        layout: the processes that share the work. With :class:`Shards` the directions are local rows.
        maybe_compile: wraps the iteration.
        shapes: of the full tensors, where they are sharded.
    """

    def orthogonalize(stacks: list[Tensor]) -> list[Tensor]:
        options = {"steps": steps, "coefficients": coefficients, "dtype": dtype, "algorithm": algorithm}
        # A compiled function would copy overwritten inputs back.
        factors: list[Tensor] = maybe_compile(orthogonalize_all)(stacks, **options, overwrite=maybe_compile is eager)
        return factors

    if isinstance(layout, Shards):
        sent = directions if layout.dtype is None else [direction.to(layout.dtype) for direction in directions]
        stacked, numels = [stack_shape(shape, flatten) for shape in shapes], [layout.numels(shape) for shape in shapes]
        factors = orthogonalize_sharded(sent, stacked, numels, orthogonalize, layout.dtype or dtype, layout.group)
        _copy_(directions, factors)
        return
    stacks = [as_stack(direction, flatten) for direction in directions]
    if layout is None:
        factors = orthogonalize(stacks)
    else:
        factors = orthogonalize_replicated(stacks, orthogonalize, layout.dtype or dtype, layout.group)
    _copy_(directions, factors)


def _copy_(tensors: Tensors, values: Tensors) -> None:
    torch._foreach_copy_(tensors, [value.reshape(t.shape) for t, value in zip(tensors, values, strict=True)])


def frobenius_norms(directions: Tensors, shards: Shards | None = None) -> Tensors:
    """Return each tensor's Frobenius norm as a scalar tensor.

    A stack of matrices has one norm. With ``shards`` the directions are local rows and the norms those of the full
    tensors.
    """
    lengths = torch._foreach_norm(directions)
    return lengths if shards is None else shards.all_reduce_norms([], lengths)[1]


def with_remainders(params: Tensors, remainders: Tensors) -> Tensors:
    """Return half-precision parameters in float32, with their rounding errors.

    If a user has replaced an entry, its remainder does not round to it and is ignored.
    """
    if not params:
        return []
    rounded = [param.float() for param in params]
    exact = torch._foreach_add(rounded, remainders)
    return [torch.where(e.to(p.dtype) == p, e, r) for e, p, r in zip(exact, params, rounded, strict=True)]


def round_(params: Tensors, remainders: Tensors, exact: Tensors) -> None:
    """Round float32 values into half-precision parameters and ``remainders``."""
    if not params:
        return
    torch._foreach_copy_(params, exact)
    torch._foreach_copy_(remainders, torch._foreach_sub(exact, [param.float() for param in params]))


def apply_(
    params: Tensors, directions: Tensors, scales: Tensors | list[float] | None, lr: Number, weight_decay: Number
) -> None:
    """Move the parameters with decoupled weight decay, in place.

    ``p <- (1 - lr*wd) p - lr*scale*direction``. ``scales`` are scalar tensors or numbers, one for each parameter;
    ``None`` means 1. The dtypes may differ.
    """
    if isinstance(weight_decay, Tensor) or weight_decay != 0:
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
