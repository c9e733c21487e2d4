"""The flatness half of ARS2-Neo: where to look for the second gradient, what to keep of it, and when to look again.

The adversarial point is SAM's (Foret et al. 2021) with ASAM's scaling (Kwon et al. 2021) in Adam's metric; keeping a
part of the second gradient between looks follows LookSAM (Liu et al. 2022).
"""

import math
import random
from typing import Any

import torch
from torch import Tensor

from ars2.sharded import Shards
from ars2.updates import Tensors

TINY = 1e-12


def adversarial_offsets(params: Tensors, grads: Tensors, roots: Tensors) -> Tensors:
    """Return the direction of each parameter's move to the adversarial point, ``n = g / root * |p|``.

    Args:
        params: tensors of any dtype.
        grads: gradients in the dtype of ``roots``.
        roots: ``sqrt(v_hat) + eps`` of the second moment before this step.
    """
    offsets = torch._foreach_div(grads, roots)
    magnitudes = torch._foreach_abs(params)
    torch._foreach_mul_(offsets, magnitudes)
    return offsets


def move_(params: Tensors, offsets: Tensors, lengths: Tensor, rho: float, grad_scale: float) -> None:
    """Move each parameter by ``rho * n / (|n| + 1e-12)``, in place; ``offsets`` are used up.

    Args:
        params: tensors of any dtype.
        offsets: n of each, from gradients multiplied by ``grad_scale``.
        lengths: |n| of each, a tensor (params,).
        rho: length of each tensor's move.
        grad_scale: what the loss was multiplied by; the move does not depend on it.
    """
    torch._foreach_mul_(offsets, list((rho / (lengths + TINY * grad_scale)).unbind()))
    torch._foreach_add_(params, offsets)


def norms(tensors: Tensors) -> Tensor:
    """Return the Euclidean norm of each tensor, a tensor (tensors,)."""
    return torch.stack(torch._foreach_norm(tensors))


def inner_products(left: Tensors, right: Tensors) -> Tensor:
    """Return the inner product of each pair, a tensor (pairs,)."""
    # dot() reads both once and keeps no product; it takes vectors, and a view of any dense layout will do.
    return torch.stack([torch.dot(*_flat(a, b)) for a, b in zip(left, right, strict=True)])


def _flat(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.is_contiguous() and b.is_contiguous():
        return a.view(-1), b.view(-1)
    return a.reshape(-1), b.reshape(-1)


def shear_forces(second: Tensors, first: Tensors, products: Tensor, lengths: Tensor, grad_scale: float) -> Tensors:
    """Return the part of each second gradient orthogonal to the first, ``s = g2 - <g2, g1> / (|g1|^2 + 1e-12) g1``.

    ``first`` is multiplied by ``grad_scale``, ``second`` is not; the result does not depend on it. ``products`` are the
    inner products of both, ``lengths`` the norms of ``first``, tensors (gradients,).
    """
    coefficients = products / (lengths**2 + TINY * grad_scale**2)
    parallel = torch._foreach_mul(first, list(coefficients.unbind()))
    return torch._foreach_sub(second, parallel)


def inject(grads: Tensors, shears: Tensors, alpha: float, grad_lengths: Tensor, shear_lengths: Tensor) -> Tensors:
    """Return ``g + alpha * |g| / (|s| + 1e-12) * s`` for each pair; the given gradients are left as they are.

    The lengths are the norms of both, tensors (gradients,).
    """
    scales = alpha * grad_lengths / (shear_lengths + TINY)
    return torch._foreach_addcmul(grads, shears, list(scales.unbind()))


def global_cosine(pairs: list[tuple[Tensors, Tensors]], grad_scale: float, shards: Shards | None = None) -> float:
    """Return phi, the cosine of all gradients with all cached shear forces, each side taken as one long vector.

    Tensors without a shear force (it is zero) do not count. Reads the device once, whatever the number of tensors.

    Args:
        pairs: lists of gradients (multiplied by ``grad_scale``) and of their shear forces, one pair of lists a group.
        grad_scale: what the loss was multiplied by.
        shards: the processes that hold the other rows of the tensors, if there are any.
    """
    columns = [torch.stack([inner_products(g, s), norms(g), norms(s)]) for g, s in pairs if g]
    if not columns:
        return 0.0
    numbers = torch.cat(columns, dim=1)
    if shards is not None:
        inner_of_all, lengths_of_all = shards.whole([numbers[:1]], [numbers[1:]])
        numbers = torch.cat([*inner_of_all, *lengths_of_all])
    inner, grad_lengths, shear_lengths = numbers.tolist()
    known = [index for index, length in enumerate(shear_lengths) if length != 0]
    grad_length: float = math.sqrt(math.fsum(grad_lengths[index] ** 2 for index in known)) / grad_scale
    shear_length: float = math.sqrt(math.fsum(shear_lengths[index] ** 2 for index in known))
    products = [inner[index] for index in known]
    # Infinities of both signs, as an overflow under a gradient scaler leaves them, have no sum.
    product: float = math.fsum(products) / grad_scale if all(map(math.isfinite, products)) else math.nan
    return product / (grad_length * shear_length + TINY)


def next_variance(group: dict[str, Any], phi: float, t: int) -> float:
    """Return AGA's running mean of phi^2 at step ``t``, ``group`` holding it as of the step before.

    The step right after a look does not count: its phi is biased by the fresh cache.
    """
    variance: float = group["phi_variance"]
    beta: float = group["phi_beta"]
    if t == 1:
        return phi**2
    if t - group["last_sync"] > 1:
        return beta * variance + (1 - beta) * phi**2
    return variance


def looks_again(group: dict[str, Any], t: int, phi: float, variance: float) -> bool:
    """Decide whether step ``t`` (counted from 1) evaluates a second gradient, by the mode of ``group``."""
    mode, k = group["mode"], int(group["k"])
    if mode == "sync":
        return True
    if mode == "periodic":
        return (t - 1) % k == 0
    if mode == "random":
        # Drawn from the seed and the step alone: the same on every rank, and after a resume, with no state to keep.
        return t == 1 or random.Random(f"{group['seed']}:{t}").random() < float(group["probability"])
    if mode == "aga":
        drifted = phi < -float(group["phi_lambda"]) * math.sqrt(variance)
        return drifted or t == 1 or (k > 1 and t - int(group["last_sync"]) >= k)
    return False
