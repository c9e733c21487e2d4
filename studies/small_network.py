"""Define the network and data of studies/natural_gradient.py, with its parameters as one flat vector."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ars2 import orthogonalize

P, HIDDEN, TRAIN_FRACTION = 11, 24, 0.8
SCOPES = ("all", "weights", "layer1", "layer2")


class Network(nn.Module):
    """Return logits (examples, p) of x + y for one-hot inputs (examples, 2p)."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * P, HIDDEN, dtype=torch.float64)
        self.output = nn.Linear(HIDDEN, P, dtype=torch.float64)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.output(torch.tanh(self.hidden(inputs)))
        return logits


def training_set(seed: int) -> tuple[Tensor, Tensor]:
    """Return the inputs (96, 22) and answers (96,) of a random 80 % of the sums."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(P * P, generator=generator)[: int(TRAIN_FRACTION * P * P)]
    x, y = chosen // P, chosen % P
    return torch.cat([F.one_hot(x, P), F.one_hot(y, P)], dim=1).double(), (x + y) % P


def flat(tensors: Any) -> Tensor:
    """Join tensors to one vector."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


class Layout:
    """Locate each tensor of the network in the flat vector."""

    def __init__(self) -> None:
        self.network = Network()
        self.shapes = {name: parameter.shape for name, parameter in self.network.named_parameters()}
        sizes = [shape.numel() for shape in self.shapes.values()]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self.slices = {name: slice(e - s, e) for name, e, s in zip(self.shapes, ends, sizes, strict=True)}
        weights = [torch.arange(s.start, s.stop) for s, _ in self.matrices()]
        self.scopes = dict(zip(SCOPES, (torch.arange(ends[-1]), torch.cat(weights), *weights), strict=True))

    def matrices(self) -> list[tuple[slice, torch.Size]]:
        """Return the place and shape of each weight matrix."""
        return [(s, self.shapes[name]) for name, s in self.slices.items() if name.endswith("weight")]

    def logits(self, parameters: Tensor, inputs: Tensor) -> Tensor:
        """Return the network's logits at a flat vector of parameters."""
        tensors = {name: parameters[s].view(self.shapes[name]) for name, s in self.slices.items()}
        logits: Tensor = torch.func.functional_call(self.network, tensors, (inputs,))
        return logits

    def orthogonal(self, vector: Tensor) -> Tensor:
        """Return ``vector`` with each weight matrix x replaced by ``|x| NS(x)``.

        Biases stay as they are, as in ARS2.
        """
        result = vector.clone()
        for s, shape in self.matrices():
            factor = orthogonalize(vector[s].view(shape), 5, "jordan", torch.float64, "standard")
            result[s] = vector[s].norm() * factor.flatten()
        return result

    def by_layer(self, matrix: Tensor) -> Tensor:
        """Return ``matrix`` with everything between the two layers set to zero."""
        first = slice(0, self.slices["hidden.bias"].stop)
        result = torch.zeros_like(matrix)
        for block in (first, slice(first.stop, len(matrix))):
            result[block, block] = matrix[block, block]
        return result
