"""Sample continuations of a text from a language model."""

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def continuation(
    network: Any, tokens: Tensor, length: int, context: int, temperature: float, top_k: int | None, seed: int
) -> Tensor:
    """Sample ``length`` tokens that follow ``tokens``.

    A separate generator makes the draws, so the same call returns the same tokens, and the random numbers of training
    do not change.

    Args:
        network: a causal language model of transformers.
        tokens: (1, tokens), any integer dtype.
        length: number of tokens to sample.
        context: largest number of tokens that the network sees, the last ones of a longer text.
        temperature: divisor of the logits; 0 selects the likeliest token each time.
        top_k: sample from this many likeliest tokens; ``None`` from all.
        seed: of the draws.

    Returns:
        The sampled tokens (length,), int64.
    """
    generator = torch.Generator().manual_seed(seed)
    text = tokens.long()
    was_training = network.training
    network.eval()
    try:
        for _ in range(length):
            logits = (
                network(input_ids=text[:, -context:], use_cache=False, logits_to_keep=1).logits[0, -1].float().cpu()
            )
            if temperature == 0:
                following = logits.argmax(keepdim=True)
            else:
                if top_k is not None and top_k < len(logits):
                    logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
                following = torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)
            text = torch.cat([text, following.to(text.device).unsqueeze(0)], dim=1)
    finally:
        network.train(was_training)
    return text[0, tokens.shape[1] :]
