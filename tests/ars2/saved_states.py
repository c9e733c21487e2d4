"""Make the optimizers of the states in tests/ars2/saved.

They were saved before parameters had separate step counts.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from ars2 import ARS2Neo, Muon

FOLDER = Path(__file__).with_name("saved")
KINDS = ("base", "aga", "muon")


def make(kind: str) -> tuple[list[nn.Parameter], ARS2Neo | Muon]:
    """Make a matrix, a vector, and their optimizer."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (4,))]
    groups = [{"params": [params[0]], "track": "matrix"}, {"params": [params[1]], "track": "vector"}]
    if kind == "muon":
        return params, Muon(groups, ns_dtype="float32")
    return params, ARS2Neo(groups, lr=0.01, mode=kind, ns_dtype="float32")  # type: ignore[arg-type]


def steps(params: list[nn.Parameter], optimizer: ARS2Neo | Muon, numbers: Iterable[int]) -> None:
    """Make the steps of these numbers, each with a different input."""
    for number in numbers:
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(number))

        def closure(inputs: torch.Tensor = inputs) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (inputs @ params[0] + params[1]).tanh().square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
