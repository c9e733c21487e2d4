"""Perplexities as torchmetrics, from mean losses alone: logits are never kept for them."""

import math

import torch
from torch import Tensor

from modules.metrics import MeanLoss


class Perplexity(MeanLoss):
    """``exp`` of the mean loss over tokens, as torchmetrics' own, which wants the logits of all of them."""

    def compute(self) -> Tensor:
        """Return the perplexity per token so far."""
        return super().compute().exp()


class _PerText(MeanLoss):
    """A loss summed over a whole text, per unit of that text; NaN unless all its tokens were seen.

    Args:
        tokens: that the text has.
        units: that the text has, words or bytes.
    """

    def __init__(self, tokens: int, units: int) -> None:
        super().__init__()
        self.tokens, self.units = tokens, units

    def nats(self) -> Tensor:
        """Return the summed loss per unit."""
        return torch.where(self.examples == self.tokens, self.total / self.units, torch.nan)


class WordPerplexity(_PerText):
    """Perplexity per word of the text, which does not depend on how it was cut into tokens."""

    def compute(self) -> Tensor:
        """Return ``exp(total nats / words)``."""
        return self.nats().exp()


class BitsPerByte(_PerText):
    """Bits per byte of the text in UTF-8."""

    def compute(self) -> Tensor:
        """Return ``total nats / ln 2 / bytes``."""
        return self.nats() / math.log(2)
