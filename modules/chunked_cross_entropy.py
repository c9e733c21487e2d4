"""Compute the cross-entropy of an unembedding in chunks of tokens.

Logits and their gradient are the largest tensors of a small language model, with tokens times vocabulary entries. Here
only the logits of one chunk exist at a time. The forward pass computes the loss and the gradients of a chunk before the
next one, which is possible because the loss is the last operation. Nothing is computed twice, and the result is exact.
The loss can also be linearized in the logits at an earlier pass, whose softmax is recomputed chunk by chunk.
"""

from typing import Any

import torch
from torch import Tensor

Pass = tuple[Tensor, Tensor]  # last hidden states (tokens, width) and unembedding (vocabulary, width)
CHUNK_ELEMENTS = 1 << 23  # logits, 32 MiB in float32; smaller chunks slow the matrix products


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, first: Pass | None, chunk: int, gradients: bool
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.first = first
        device = hidden.device.type
        products = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        with torch.autocast(device, enabled=False):
            return _forward(ctx, hidden, weight, targets, first, chunk, gradients, products)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        if torch.is_grad_enabled():
            hidden, weight, targets = ctx.saved_tensors
            return (*_differentiable(hidden, weight, targets, ctx.first, gradient), None, None, None, None)
        if ctx.gradients is None:
            raise RuntimeError("chunked_cross_entropy allows one backward pass: evaluate the loss again")
        hidden, weight = ctx.gradients
        ctx.gradients = None
        for tensor in (hidden, weight):
            if tensor is not None:
                tensor.mul_(gradient / ctx.tokens)
        return hidden, weight, None, None, None, None


def _differentiable(hidden: Tensor, weight: Tensor, targets: Tensor, first: Pass | None, gradient: Tensor) -> Pass:
    """Compute the same gradients by differentiable operations.

    This serves create_graph and needs the logits of all tokens.
    """
    states, unembedding = first or (hidden, weight)
    slope = torch.softmax(states @ unembedding.mT, dim=1)
    slope = slope - torch.nn.functional.one_hot(targets.long(), len(weight)).to(slope.dtype)
    slope = slope * (gradient / len(hidden))
    return slope @ weight, slope.mT @ hidden


def _forward(
    ctx: Any,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    first: Pass | None,
    chunk: int,
    gradients: bool,
    products: torch.dtype,
) -> Tensor:
    statistics = torch.promote_types(products, torch.float32)
    unembedding = weight.to(products)
    first = None if first is None else (first[0], first[1].to(products))
    total = torch.zeros((), dtype=statistics, device=hidden.device)
    to_hidden = torch.empty_like(hidden) if gradients and ctx.needs_input_grad[0] else None
    to_weight = torch.zeros_like(weight) if gradients and ctx.needs_input_grad[1] else None
    for start in range(0, len(hidden), chunk):
        states = hidden[start : start + chunk].to(products)
        answers = targets[start : start + chunk].long().unsqueeze(1)
        logits = (states @ unembedding.mT).to(statistics)
        if first is None:
            logs = torch.log_softmax(logits, dim=1)
            total -= logs.gather(1, answers).sum()
            if to_hidden is None and to_weight is None:
                continue
        else:
            earlier = first[0][start : start + chunk].to(products) @ first[1].mT
            logs = torch.log_softmax(earlier.to(statistics), dim=1)
        # The gradient of the logits is the probabilities minus one at the target.
        slope = logs.exp_()
        slope.scatter_add_(1, answers, slope.new_full(answers.shape, -1.0))
        if first is not None:
            total += logits.mul_(slope).sum()
        slope = slope.to(products)
        if to_hidden is not None:
            to_hidden[start : start + chunk] = slope @ unembedding
        if to_weight is not None and to_weight.dtype == products:
            to_weight.addmm_(slope.mT, states)
        elif to_weight is not None:
            to_weight += slope.mT @ states
    ctx.gradients = (to_hidden, to_weight)
    ctx.tokens = len(hidden)
    return total / len(hidden)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_elements: int = CHUNK_ELEMENTS,
    first: Pass | None = None,
) -> Tensor:
    """Return the mean cross-entropy in nats of ``softmax(hidden @ weight.T)``.

    Loss and gradients equal those of ``F.cross_entropy(F.linear(hidden, weight), targets)`` up to rounding. Under
    autocast the products run in its dtype and the softmax in float32, as in torch. Only one backward pass is possible.

    Args:
        hidden: (tokens, width), at least one token.
        weight: (vocabulary, width), of the unembedding. It may be tied to an embedding.
        targets: (tokens,), of any integer dtype, in [0, vocabulary).
        chunk_elements: number of logits in a chunk, which has at least one token.
        first: hidden states and unembedding of an earlier pass with the same targets. With it, the loss is the sum of
            the logits times the gradient that the cross-entropy of the earlier pass has with respect to its logits.
            That gradient is a constant.

    Returns:
        A scalar in float32 (float64 for float64 weights).

    Raises:
        ValueError: the shapes do not match.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or len(hidden) == 0:
        raise ValueError(
            "hidden must be (tokens, width) with a token or more and weight (vocabulary, width), got"
            f" {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must have one entry a token, got {tuple(targets.shape)} for {len(hidden)} tokens")
    if first is not None and (first[0].shape, first[1].shape) != (hidden.shape, weight.shape):
        raise ValueError(
            "first must have the shapes of hidden and weight, got"
            f" {tuple(first[0].shape)} and {tuple(first[1].shape)} for {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    first = None if first is None else (first[0].detach(), first[1].detach())
    chunk = max(1, chunk_elements // len(weight))
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, targets, first, chunk, torch.is_grad_enabled())
    return loss
