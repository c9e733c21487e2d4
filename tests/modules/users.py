"""Define modules as users write them.

One is complete, one knows Lightning but not this suite.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from modules.metrics import Metrics
from modules.two_pass import TwoPassModule


class Sums(TwoPassModule):
    """Classify the sums of modular addition by a linear layer.

    The module is complete.
    """

    def __init__(self, p: int = 7, **options: Any) -> None:
        super().__init__(**options)
        self.network = nn.Linear(3, p)
        self.set_metrics({})

    def compute_loss(self, batch: Any, metrics: Metrics | None) -> Tensor:
        return F.cross_entropy(self.network(batch[0].float()), batch[1])


class Tutorial(Sums):
    """Define training_step() itself, which the suite would never call."""

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        loss = self.compute_loss(batch, None)
        self.log("train_loss", loss)
        return loss
