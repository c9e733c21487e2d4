"""Compute perturbation, shear force, injection and AGA's schedule.

The adversarial point is SAM's (Foret et al. 2021) with ASAM's scaling (Kwon et al. 2021) in Adam's metric. Reusing a
part of the second gradient on one-pass steps follows LookSAM (Liu et al. 2022).
"""

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ars2.batch import split_flat
from ars2.compiled import MaybeCompile, eager
from ars2.sharded import Shards, local
from ars2.sharing import Replicas
from ars2.updates import LEAST_NORM, Number, Tensors


def norms(tensors: Tensors) -> Tensor:
    """Return the Euclidean norm of each tensor, a tensor (tensors,)."""
    return torch.stack(torch._foreach_norm(tensors))


def move_to_adversarial_point_(params: Tensors, grads: Tensors, denominators: Tensors | None, rho: Number) -> None:
    """Move each parameter by ``rho * n / |n|`` with ``n = g / denominator * |p|``.

    Args:
        params: tensors of any dtype, changed in place.
        grads: gradients in the dtype of ``denominators``. Their scale cancels.
        denominators: ``sqrt(v_hat) + eps`` of the second moment before this step, or ``None``, which counts as 1.
        rho: length of each tensor's move.
    """
    offsets = adversarial_offsets(params, grads, denominators)
    move_along_(params, offsets, norms(offsets), rho)


def adversarial_offsets(params: Tensors, grads: Tensors, denominators: Tensors | None) -> Tensors:
    """Return ``n = g / denominator * |p|`` of each parameter."""
    magnitudes = torch._foreach_abs(params)
    if denominators is None:
        return torch._foreach_mul(grads, magnitudes)
    offsets = torch._foreach_div(grads, denominators)
    torch._foreach_mul_(offsets, magnitudes)
    return offsets


def move_along_(params: Tensors, offsets: Tensors, lengths: Tensor, rho: Number) -> None:
    """Move each parameter by ``rho * n / |n|``, in place.

    For chunks of one tensor, the length is that of the full tensor.

    Args:
        params: tensors or flat chunks.
        offsets: the n, overwritten.
        lengths: the norms |n|, a tensor (params,).
        rho: length of each tensor's move.
    """
    torch._foreach_mul_(offsets, list((rho / lengths.clamp_min(LEAST_NORM)).unbind()))
    torch._foreach_add_(params, offsets)


def inner_products(left: Tensors, right: Tensors) -> Tensor:
    """Return the inner product of each pair, a tensor (pairs,)."""
    # dot() reads both tensors once and needs no temporary tensor. It takes vectors; the order of entries is irrelevant.
    return torch.stack([torch.dot(*_flat(a, b)) for a, b in zip(left, right, strict=True)])


def _flat(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.is_contiguous() and b.is_contiguous():
        return a.view(-1), b.view(-1)
    return a.reshape(-1), b.reshape(-1)


def shear_forces(second: Tensors, first: Tensors) -> Tensors:
    """Return the part of each second gradient that is orthogonal to the first.

    This is ``s = g2 - <g2, g1> / |g1|^2 g1``. The scale of ``first`` cancels.
    """
    return without_parallel(second, first, inner_products(second, first), norms(first))


def without_parallel(second: Tensors, first: Tensors, products: Tensor, lengths: Tensor) -> Tensors:
    """Return the shear forces, given inner products and norms.

    Args:
        second, first: gradients of both passes.
        products: the inner products ``<g2, g1>``, a tensor (gradients,).
        lengths: the norms ``|g1|``, a tensor (gradients,).
    """
    lengths = lengths.clamp_min(LEAST_NORM)
    coefficients = products / lengths / lengths  # the square may overflow or underflow float32
    parallel = torch._foreach_mul(first, list(coefficients.unbind()))
    return torch._foreach_sub(second, parallel)


def keep_shear_(
    params: list[Tensor],
    grads: Tensors,
    states: list[dict[str, Tensor]],
    first: dict[Tensor, Tensor],
    maybe_compile: MaybeCompile = eager,
) -> None:
    """Store the shear force of each parameter that has a first gradient.

    The state of other parameters stays unchanged.

    Args:
        params, grads, states: parameters, their second gradients in the dtype of the state, and their states.
        first: gradients of the first pass by parameter, at any scale.
        maybe_compile: wraps the function that works on tensors.
    """
    second, firsts, shears = both_gradients(params, grads, states, first)
    if not second:
        return
    if maybe_compile is not eager:
        torch._foreach_copy_(shears, maybe_compile(shear_forces)(second, firsts))
        return
    products, lengths = inner_products(second, firsts), norms(firsts)
    for second_chunk, first_chunk, shear_chunk in split_flat(second, firsts, shears):
        torch._foreach_copy_(shear_chunk, without_parallel(second_chunk, first_chunk, products, lengths))


def both_gradients(
    params: list[Tensor], grads: Tensors, states: list[dict[str, Tensor]], first: dict[Tensor, Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return second gradients, first gradients and the stored shear forces.

    Only parameters with both gradients are included. First gradients are cast to the dtype of the second ones. For
    sharded parameters all three lists contain the local rows.
    """
    both = [index for index, param in enumerate(params) if param in first]
    second = [grads[index] for index in both]
    firsts = [local(first[params[index]]).to(grad.dtype) for index, grad in zip(both, second, strict=True)]
    return second, firsts, [states[index]["shear"] for index in both]


def injection_scales(alpha: Number, grad_lengths: Tensor, shear_lengths: Tensor) -> Tensor:
    """Return ``alpha * |g| / |s|``, the factor of each shear force.

    Lengths and result are tensors (gradients,).
    """
    return alpha * grad_lengths / shear_lengths.clamp_min(LEAST_NORM)


def with_shears(grads: Tensors, shears: Tensors, scales: Tensor) -> Tensors:
    """Return ``g + scale * s`` for each gradient as new tensors."""
    return torch._foreach_addcmul(grads, shears, list(scales.unbind()))


def products_and_lengths(pairs: list[tuple[Tensors, Tensors]]) -> Tensor:
    """Return inner product and norms of each gradient and its shear force.

    The result is a tensor (3, tensors).
    """
    return torch.cat([torch.stack([inner_products(g, s), norms(g), norms(s)]) for g, s in pairs], dim=1)


def global_cosine(
    pairs: Sequence[tuple[Tensors, Tensors]],
    maybe_compile: MaybeCompile = eager,
    layout: Replicas | Shards | None = None,
) -> float:
    """Return phi, the cosine of all gradients with all cached shear forces.

    Each side counts as one long vector. Tensors whose shear force is zero are left out. The device is read once, for
    any number of tensors.

    Args:
        pairs: lists of gradients, at any scale, and of their shear forces, in any number of chunks.
        maybe_compile: wraps the function that works on tensors.
        layout: the processes with the other rows of sharded tensors, or with replicas of the tensors. Every process
            returns the same number, bit for bit.
    """
    pairs = [(grads, shears) for grads, shears in pairs if grads]
    if not pairs:
        return 0.0
    numbers: Tensor = maybe_compile(products_and_lengths)(pairs)
    if isinstance(layout, Shards):
        products_of_whole, lengths_of_whole = layout.all_reduce_norms([numbers[:1]], [numbers[1:]])
        numbers = torch.cat([*products_of_whole, *lengths_of_whole])
    elif layout is not None:
        # Kernels may round differently on each rank. All ranks must agree, or the next collective deadlocks.
        dist.broadcast(numbers, group=layout.group, group_src=0)
    inner, grad_lengths, shear_lengths = numbers.tolist()
    known = [index for index, length in enumerate(shear_lengths) if length != 0]
    grad_length: float = math.sqrt(math.fsum(grad_lengths[index] ** 2 for index in known))
    shear_length: float = math.sqrt(math.fsum(shear_lengths[index] ** 2 for index in known))
    products = [inner[index] for index in known]
    # fsum fails on infinities of both signs, which an overflow under a gradient scaler leaves.
    product: float = math.fsum(products) if all(map(math.isfinite, products)) else math.nan
    lengths = grad_length * shear_length
    return product / lengths if lengths != 0 else 0.0


def next_variance(group: dict[str, Any], phi: float, t: int) -> float:
    """Return AGA's running mean of phi^2 at step ``t``.

    The step right after a sync step does not count, because the fresh cache biases its phi.

    Args:
        group: the first group, with the counters of the previous step.
        phi: the global cosine of this step.
        t: number of the step, from 1.
    """
    variance: float = group["phi_variance"]
    beta: float = group["phi_beta"]
    if t == 1:
        return phi**2
    if t - group["last_sync"] > 1:
        return beta * variance + (1 - beta) * phi**2
    return variance


def is_sync_step(group: dict[str, Any], t: int, phi: float, variance: float) -> bool:
    """Decide by the mode of ``group`` whether step ``t`` makes a second pass.

    Steps count from 1.
    """
    mode, k = group["mode"], int(group["k"])
    if mode == "sync":
        return True
    if mode == "periodic":
        return (t - 1) % k == 0
    if mode == "random":
        # Seed and step determine the draw, so that all ranks and a resumed run agree without any state.
        return t == 1 or random.Random(f"{group['seed']}:{t}").random() < float(group["probability"])
    if mode == "aga":
        drifted = phi < -float(group["phi_lambda"]) * math.sqrt(variance)
        return drifted or t == 1 or (k > 1 and t - int(group["last_sync"]) >= k)
    return False


def diagnostics(group: dict[str, Any], keeps_shear: bool) -> dict[str, float]:
    """Return the numbers of :meth:`ars2.ARS2Neo.diagnostics`.

    ``group`` is the first group, which has the counters.
    """
    steps, sync_steps = int(group["step"]), int(group["sync_steps"])
    report = {
        "steps": float(steps),
        "sync_steps": float(sync_steps),
        "gradient_evaluations": float(steps + sync_steps),
        "effective_k": steps / sync_steps if sync_steps else math.inf,
    }
    if keeps_shear:
        report["alpha"] = group["injected_alpha"]
    if group["mode"] == "aga":
        deviation = math.sqrt(group["phi_variance"])
        report |= {"phi": group["phi"], "phi_deviation": deviation, "threshold": -group["phi_lambda"] * deviation}
    return report
