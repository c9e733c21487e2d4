"""Define a small deterministic problem for the tests of the optimizers.

It has every kind of parameter that the optimizers treat differently.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

EXAMPLES = 48
BATCH = 16
CLASSES = 7
VOCABULARY = 11
TOKENS = 4


class SmallProblem(nn.Module):
    """Classify (image, tokens) pairs of fixed data smoothly.

    Matrices: a convolution (4, 3, 3, 3), a stack of heads (2, 5, 8), an embedding (11, 8), a tall (40, 26) and a wide
    (7, 40) linear layer. Vectors: three biases; the last one starts at zero, where the adversarial move vanishes.

    The initial values and the data depend on `seed` only and are exact in float32, so that a float32 and a float64
    copy start from the very same numbers.
    """

    images: Tensor
    tokens: Tensor
    targets: Tensor

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, kernel_size=3)
        self.heads = nn.Parameter(torch.empty(2, 5, 8))
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.tall = nn.Linear(26, 40)
        self.wide = nn.Linear(40, CLASSES)

        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                # Not too small, or the loss is nearly linear around the start and the two gradients are nearly equal.
                p.copy_(torch.randn(p.shape, generator=generator) * (0.4 if p.ndim > 1 else 0.1))
            self.wide.bias.zero_()
        self.register_buffer("images", torch.randn(EXAMPLES, 3, 6, 6, generator=generator))
        self.register_buffer("tokens", torch.randint(VOCABULARY, (EXAMPLES, TOKENS), generator=generator))
        self.register_buffer("targets", torch.randint(CLASSES, (EXAMPLES,), generator=generator))
        self.to(dtype)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        seen = torch.tanh(functional.avg_pool2d(self.convolution(images), 2)).flatten(1)
        read = torch.tanh(torch.einsum("btc,hrc->bthr", self.embedding(tokens), self.heads)).mean(1).flatten(1)
        return self.wide(functional.gelu(self.tall(torch.cat([seen, read], dim=1))))

    def loss(self, step: int) -> Tensor:
        """Return the mean cross-entropy of the batch for `step` (from 0).

        Steps take the batches in order and begin again after the last one.
        """
        start = step * BATCH % EXAMPLES
        rows = slice(start, start + BATCH)
        return functional.cross_entropy(self(self.images[rows], self.tokens[rows]), self.targets[rows])


def split_by_track(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Split trainable parameters into "matrix" (two dimensions or more) and "vector"."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return {
        "matrix": [p for p in trainable if p.ndim >= 2],
        "vector": [p for p in trainable if p.ndim < 2],
    }


def problem_groups(
    model: nn.Module, matrix: dict[str, Any] | None = None, vector: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Return a matrix group and a vector group with every option set.

    `matrix` and `vector` override single options of their group. The two tracks differ in every option on purpose:
    mixing them up must show.
    """
    params = split_by_track(model)
    return [
        {
            "params": params["matrix"],
            "track": "matrix",
            "lr": 2e-3,
            "betas": (0.9, 0.98),
            "eps": 1e-8,
            "weight_decay": 0.5,
            "rho": 0.1,
            "flatten": False,
            **(matrix or {}),
        },
        {
            "params": params["vector"],
            "track": "vector",
            "lr": 3e-3,
            "betas": (0.85, 0.99),
            "eps": 1e-7,
            "weight_decay": 0.01,
            "rho": 0.05,
            **(vector or {}),
        },
    ]


def gradients(model: SmallProblem, groups: list[dict[str, Any]], step: int) -> list[Tensor | None]:
    """Return the loss gradients of `step` at the current parameters.

    They are in flat order over `groups`. .grad is left unchanged.
    """
    params = [p for group in groups for p in group["params"]]
    return list(torch.autograd.grad(model.loss(step), params, allow_unused=True))
