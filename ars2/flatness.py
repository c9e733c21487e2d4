"""Compute the adversarial point, shear forces, their injection and phi.

The adversarial point is SAM's (Foret et al. 2021) with ASAM's scaling (Kwon et al. 2021) in Adam's metric. Reusing a
part of the second gradient on one-pass steps follows LookSAM (Liu et al. 2022).

Functions named ``..._sums`` return sums over the entries of each tensor, a float64 tensor (sums, tensors). Sums over
chunks and shards of a tensor add up to its sums, from which the other functions continue.
"""

import math

import torch
from torch import Tensor

from ars2.kernels import Number, Tensors, norms
from ars2.orthogonalize import LEAST_NORM


def adversarial_offsets(params: Tensors, grads: Tensors, denominators: Tensors | None) -> Tensors:
    """Return ``n = g / denominator * |p|`` of each parameter.

    Args:
        params: tensors of any dtype.
        grads: gradients in the dtype of ``denominators``, at any scale.
        denominators: ``sqrt(v_hat) + eps`` of the second moment before this step, or ``None``, which counts as 1.
    """
    magnitudes = torch._foreach_abs(params)
    if denominators is None:
        return torch._foreach_mul(grads, magnitudes)
    offsets = torch._foreach_div(grads, denominators)
    torch._foreach_mul_(offsets, magnitudes)
    return offsets


def offset_sums(offsets: Tensors, params: Tensors | None = None) -> Tensor:
    """Return ``|n|^2`` of each tensor and, of ``params`` if given, ``|p|^2``."""
    lists = [offsets]
    if params is not None:  # a norm has the dtype of its tensor, here not a parameter's half precision
        lists.append([param.to(n.dtype) for param, n in zip(params, offsets, strict=True)])
    return torch.stack([norms(tensors) for tensors in lists]).square()


def move_along_(params: Tensors, offsets: Tensors, squares: Tensor, rho: Number) -> None:
    """Move each parameter by ``rho * n / |n|``, and overwrite the ``offsets`` n.

    ``squares`` are the ``|n|^2``, a tensor (params,). ``rho`` is the length of every move, or such a tensor of lengths.
    """
    scales = rho / squares.sqrt().clamp_min(LEAST_NORM)
    torch._foreach_mul_(offsets, list(scales.unbind()))
    torch._foreach_add_(params, offsets)


def inner_products(left: Tensors, right: Tensors) -> Tensor:
    """Return the inner product of each pair, a float64 tensor (pairs,)."""
    # dot() reads both tensors once and needs no temporary tensor. It takes vectors; the order of entries is irrelevant.
    return torch.stack([torch.dot(*_flat(a, b)) for a, b in zip(left, right, strict=True)]).double()


def _flat(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.is_contiguous() and b.is_contiguous():
        return a.view(-1), b.view(-1)
    return a.reshape(-1), b.reshape(-1)


def shear_sums(second: Tensors, first: Tensors) -> Tensor:
    """Return ``<g2, g1>`` and ``|g1|^2`` of each pair of gradients."""
    return torch.stack([inner_products(second, first), norms(first).square()])


def shear_forces(second: Tensors, first: Tensors, sums: Tensor) -> Tensors:
    """Return the part of each second gradient that is orthogonal to the first.

    This is ``s = g2 - <g2, g1> / |g1|^2 g1``, with the ``sums`` of :func:`shear_sums`. The scale of ``first`` cancels.
    """
    coefficients = sums[0] / sums[1].clamp_min(LEAST_NORM**2)
    return torch._foreach_sub(second, torch._foreach_mul(first, list(coefficients.unbind())))


def injection_sums(grads: Tensors, shears: Tensors) -> Tensor:
    """Return ``|g|^2`` and ``|s|^2`` of each gradient and its shear force."""
    return torch.stack([norms(grads), norms(shears)]).square()


def with_shears(grads: Tensors, shears: Tensors, sums: Tensor, alpha: Number) -> Tensors:
    """Return ``g + alpha |g| / |s| s``, with ``sums`` of :func:`injection_sums`."""
    lengths = sums.sqrt()
    scales = alpha * lengths[0] / lengths[1].clamp_min(LEAST_NORM)
    # Next to a scale in float64 the gradient of a scalar parameter would become float64.
    return torch._foreach_addcmul(grads, shears, [s.to(g.dtype) for s, g in zip(scales.unbind(), grads, strict=True)])


def cosine_sums(grads: Tensors, shears: Tensors) -> Tensor:
    """Return ``<g, s>``, ``|g|^2`` and ``|s|^2`` of each gradient and its shear force."""
    return torch.cat([inner_products(grads, shears).unsqueeze(0), injection_sums(grads, shears)])


def global_cosine(sums: Tensor) -> float:
    """Return phi, the cosine of all gradients with all cached shear forces.

    Each side counts as one long vector. Tensors whose shear force is zero are left out. ``sums`` are those of
    :func:`cosine_sums` for all tensors. They are read from the device at once.
    """
    known = [column for column in zip(*sums.tolist(), strict=True) if column[2] != 0]
    products = [product for product, _, _ in known]
    # fsum fails on infinities of both signs, which an overflow under a gradient scaler leaves.
    product = math.fsum(products) if all(map(math.isfinite, products)) else math.nan
    lengths = math.sqrt(sum(g for _, g, _ in known)) * math.sqrt(sum(s for _, _, s in known))
    return product / lengths if lengths != 0 else 0.0
