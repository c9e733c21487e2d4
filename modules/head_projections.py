"""Store query, key and value weights as stacks of one matrix per head.

Optimizers of matrices then treat each head separately.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class HeadProjection(nn.Module):
    """Apply a linear map whose weight is (heads, head_dim, width).

    It has no bias. The usual shape is (heads * head_dim, width).

    Args:
        linear: provides the weight.
        head_dim: rows of each head.
    """

    def __init__(self, linear: nn.Linear, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().unflatten(0, (-1, head_dim)).clone())

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (..., width) to (..., heads * head_dim), as the linear map did."""
        return F.linear(inputs, self.weight.flatten(0, 1))


def split_heads(network: Any) -> None:
    """Replace the query, key and value projections of a Qwen3, in place.

    The network of transformers computes the same function.
    """
    for layer in network.model.layers:
        attention = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, name, HeadProjection(getattr(attention, name), attention.head_dim))
