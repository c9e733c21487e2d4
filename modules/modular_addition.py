"""Train modular addition, which predicts (x + y) mod p from x, y and "=".

The task is from Power et al. 2022, "Grokking".
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from modules.grokking_transformer import GrokkingTransformer
from modules.metrics import Metrics
from modules.two_pass import TwoPassModule


class ModularAddition(TwoPassModule):
    """Train the grokking transformer under cross-entropy, with accuracy.

    A batch is (tokens (batch, 3), answers (batch,)), both int64.

    Args:
        p: the modulus. The vocabulary is p numbers and the token "=".
        width, heads, mlp_width: of the network, see :class:`modules.grokking_transformer.GrokkingTransformer`.
        options: of the training step, see :class:`modules.two_pass.TwoPassModule`.
    """

    def __init__(self, p: int = 113, width: int = 128, heads: int = 4, mlp_width: int = 512, **options: Any) -> None:
        super().__init__(**options)
        self.p = p
        self.network = GrokkingTransformer(p + 1, width=width, heads=heads, mlp_width=mlp_width)
        self.set_metrics({"accuracy": MulticlassAccuracy(p + 1, average="micro", validate_args=False)})

    def setup(self, stage: str) -> None:
        """Check that the data has the same modulus.

        Raises:
            ValueError: the moduli differ.
        """
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and data.p != self.p:
            raise ValueError(
                f"the model has p = {self.p}, the data p = {data.p}: set model.p and data.p to the same value"
            )

    def compute_loss(self, batch: tuple[Tensor, Tensor], metrics: Metrics | None) -> Tensor:
        """Return the mean cross-entropy in nats."""
        tokens, answers = batch
        logits = self.network(tokens)
        if metrics is not None:
            metrics["accuracy"].update(logits.detach(), answers)
        return F.cross_entropy(logits, answers)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> list[str]:
        """Return one line for each question.

        It has the sum, the network's answer, and whether that is right.
        """
        tokens, answers = batch
        lines = []
        for (x, y, _), guess, answer in zip(
            tokens.tolist(), self.network(tokens).argmax(-1).tolist(), answers.tolist(), strict=True
        ):
            verdict = "right" if guess == answer else f"wrong, it is {answer}"
            lines.append(f"{x} + {y} = {guess} (mod {self.p}): {verdict}")
        return lines
