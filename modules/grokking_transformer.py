"""Define the one-block transformer of grokking experiments.

It follows Nanda et al. (2023), with learned positions and without normalisation.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GrokkingTransformer(nn.Module):
    """Apply attention and a ReLU MLP to a few tokens.

    Only the last position has logits. It attends to every position, so causal masking would not change it. Queries, MLP
    and logits of the other positions are never computed.

    Weights are normal with deviation 1/sqrt(width), those of the unembedding with 1/sqrt(vocabulary). Biases are zero.

    Args:
        vocabulary: number of tokens and of logits.
        context: number of positions.
        width: of the residual stream.
        heads: number of attention heads, a divisor of ``width``.
        mlp_width: of the MLP's hidden layer.

    Raises:
        ValueError: ``heads`` does not divide ``width``.
    """

    def __init__(
        self, vocabulary: int, context: int = 3, width: int = 128, heads: int = 4, mlp_width: int = 512
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads must divide width, got heads={heads} and width={width}")
        self.heads = heads
        # skip_init draws no random numbers for a default initialisation that would be overwritten.
        self.token_embedding = nn.utils.skip_init(nn.Embedding, vocabulary, width)
        self.position_embedding = nn.utils.skip_init(nn.Embedding, context, width)
        self.query = nn.Parameter(torch.empty(heads, width // heads, width))
        self.key = nn.Parameter(torch.empty(heads, width // heads, width))
        self.value = nn.Parameter(torch.empty(heads, width // heads, width))
        self.attention_output = nn.utils.skip_init(nn.Linear, width, width, bias=False)
        self.mlp_in = nn.utils.skip_init(nn.Linear, width, mlp_width)
        self.mlp_out = nn.utils.skip_init(nn.Linear, mlp_width, width)
        self.unembedding = nn.utils.skip_init(nn.Linear, width, vocabulary, bias=False)
        embeddings = self.token_embedding.weight, self.position_embedding.weight
        attention = self.query, self.key, self.value, self.attention_output.weight
        for weight in (*embeddings, *attention, self.mlp_in.weight, self.mlp_out.weight):
            nn.init.normal_(weight, std=1 / math.sqrt(width))
        nn.init.normal_(self.unembedding.weight, std=1 / math.sqrt(vocabulary))
        nn.init.zeros_(self.mlp_in.bias)
        nn.init.zeros_(self.mlp_out.bias)

    def get_output_embeddings(self) -> nn.Module:
        """Return the unembedding, under the method name of transformers."""
        return self.unembedding

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, context) to logits (batch, vocabulary) of the last position."""
        stream = self.token_embedding(tokens) + self.position_embedding.weight
        last = stream[:, -1]
        query = F.linear(last, self.query.flatten(0, 1)).unflatten(-1, (self.heads, -1))
        key = F.linear(stream, self.key.flatten(0, 1)).unflatten(-1, (self.heads, -1))
        value = F.linear(stream, self.value.flatten(0, 1)).unflatten(-1, (self.heads, -1))
        scores = (key * query.unsqueeze(1)).sum(-1) / math.sqrt(query.shape[-1])
        mixed = (scores.softmax(dim=1).unsqueeze(-1) * value).sum(1).flatten(1)
        last = last + self.attention_output(mixed)
        last = last + self.mlp_out(F.relu(self.mlp_in(last)))
        logits: Tensor = self.unembedding(last)
        return logits
