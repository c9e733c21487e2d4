"""Measure how close ARS2's direction comes to the exact natural gradient.

    python -m studies.natural_gradient                       # all of results/natural_gradient, about six minutes
    python -m studies.natural_gradient --report              # only the table and the picture, from cosines.csv.gz
    python -m studies.natural_gradient --seeds 2 --steps 30  # a quick check, printed but not written

The network is a two-layer MLP (tanh, 22-24-11, 827 parameters) on the sum of two one-hot numbers modulo 11, trained on
80 % of the 121 pairs in batches of 32, in float64, without weight decay. Each of five optimizers in turn drives the
training. At every step all five compute their update from the same parameters and batch, with separate moments (and
for Sync a separate second gradient), but only the driver's update is applied. At chosen steps two kinds of candidates
are compared with two targets, which use the exact curvature at the same parameters and the gradient g over the full
training set:

- *step*: the update of the optimizer, divided by its learning rate. It includes momentum and the noise of the batch.
- *shape*: only the geometry, applied to g. The candidates are ``g``; Adam's ``u = g / sqrt(v_hat)``, with AdamW's v_hat
  on this trajectory; each with ``|x| NS(x)`` on the weight matrices ("orthogonal"); the same with the diagonal d of the
  exact Fisher, as ``g / sqrt(d)`` and ``g / (d + damping)``; and the exact Fisher inverted layer by layer.

The targets are the natural gradient ``(F + damping)^-1 g`` with the exact Fisher over the model's predictions, and
the damped Newton step ``(H + damping)^-1 g``. The damping is a factor times the largest absolute eigenvalue. For H a
shift that makes it positive is added. Several factors are tried.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ars2 import ARS2Neo, Muon, orthogonalize, param_groups
from studies import natural_gradient_report as report
from studies.fisher import damped_step, damping, fisher, hessian, spectrum

Rows: TypeAlias = list[dict[str, Any]]
FOLDER = Path(__file__).parent.parent / "results" / "natural_gradient"
P, HIDDEN, TRAIN_FRACTION, BATCH = 11, 24, 0.8, 32
DAMPINGS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
CHECKPOINTS = (10, 30, 100, 300, 500)
SCOPES = ("all", "weights", "layer1", "layer2")
EPS = 1e-8

_NEO = {"lr": 3e-3, "betas": (0.9, 0.98), "weight_decay": 0.0, "ns_dtype": "float64"}
OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], dict[str, Any], dict[str, Any]]] = {
    # Class, options, and options of the vector track (biases).
    "SGD": (torch.optim.SGD, {"lr": 1.0}, {}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-2, "betas": (0.9, 0.98), "weight_decay": 0.0}, {}),
    "Muon": (Muon, {"lr": 0.02, "momentum": 0.95, "ns_dtype": "float64"}, {"lr": 3e-3}),
    "ARS2 Base": (ARS2Neo, {**_NEO, "mode": "base"}, {}),
    "ARS2 Sync": (ARS2Neo, {**_NEO, "mode": "sync", "rho": 0.1}, {}),
}


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


class Observer:
    """Make an optimizer's steps along another optimizer's trajectory."""

    def __init__(self, name: str) -> None:
        kind, options, vector = OPTIMIZERS[name]
        self.network, self.lr = Network(), options["lr"]
        self.optimizer = kind(param_groups(self.network, "all", vector=vector), **options)

    def step(self, at: Tensor, inputs: Tensor, answers: Tensor) -> Tensor:
        """Make one step from the parameters ``at``, and return the new parameters."""
        # Copied, because an update of views would change the vector that all observers share.
        nn.utils.vector_to_parameters(at.clone(), self.network.parameters())

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.network(inputs), answers)
            loss.backward()
            return loss

        step: Callable[..., Any] = self.optimizer.step
        step(closure)
        return flat(self.network.parameters())


def trajectory(driver: str, seed: int, steps: int) -> Iterator[tuple[int, Tensor, dict[str, Tensor], Tensor]]:
    """Train with ``driver`` while the others compute their steps from its parameters.

    Yields, for each step from 1: its number, the parameters before it, every optimizer's update over its learning rate
    (to be subtracted), and Adam's bias-corrected second moment after it.
    """
    torch.manual_seed(seed)
    observers = {name: Observer(name) for name in OPTIMIZERS}
    at = flat(Network().parameters())
    inputs, answers = training_set(seed)
    order, beta = torch.Generator().manual_seed(seed), OPTIMIZERS["AdamW"][1]["betas"][1]
    for step in range(1, steps + 1):
        batch = torch.randperm(len(inputs), generator=order)[:BATCH]
        after = {name: observer.step(at, inputs[batch], answers[batch]) for name, observer in observers.items()}
        adam = observers["AdamW"]
        states = [adam.optimizer.state[parameter] for parameter in adam.network.parameters()]
        second_moment = flat(state["exp_avg_sq"] for state in states) / (1 - beta**step)
        yield step, at, {name: (at - end) / observers[name].lr for name, end in after.items()}, second_moment
        at = after[driver]


class Layout:
    """Locate each tensor of the network in the flat vector."""

    def __init__(self) -> None:
        self.network = Network()
        self.shapes = {name: parameter.shape for name, parameter in self.network.named_parameters()}
        sizes = [shape.numel() for shape in self.shapes.values()]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self.slices = {name: slice(e - s, e) for name, e, s in zip(self.shapes, ends, sizes, strict=True)}
        weights = [torch.arange(s.start, s.stop) for name, s in self.slices.items() if name.endswith("weight")]
        self.scopes = dict(zip(SCOPES, (torch.arange(ends[-1]), torch.cat(weights), *weights), strict=True))

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
        for name, s in self.slices.items():
            if name.endswith("weight"):
                factor = orthogonalize(vector[s].view(self.shapes[name]), 5, "jordan", torch.float64, "standard")
                result[s] = vector[s].norm() * factor.flatten()
        return result

    def by_layer(self, matrix: Tensor) -> Tensor:
        """Return ``matrix`` with everything between the two layers set to zero."""
        first = slice(0, self.slices["hidden.bias"].stop)
        result = torch.zeros_like(matrix)
        for block in (first, slice(first.stop, len(matrix))):
            result[block, block] = matrix[block, block]
        return result


def shapes(
    gradient: Tensor, second_moment: Tensor, diagonal: Tensor, delta: float, layout: Layout
) -> dict[str, Tensor]:
    """Return the candidates that depend only on the full gradient."""
    plain = {
        "gradient": gradient,
        "Adam": gradient / (second_moment.sqrt() + EPS),
        "1/sqrt(diagonal Fisher)": gradient / (diagonal.sqrt() + EPS),
        "1/diagonal Fisher": gradient / (diagonal + delta),
    }
    return plain | {f"orthogonal {name}": layout.orthogonal(vector) for name, vector in plain.items()}


def compare(candidate: Tensor, target: Tensor, layout: Layout) -> dict[str, float]:
    """Return cosine and ratio of lengths (candidate over target) within each scope."""
    row = {}
    for scope, index in layout.scopes.items():
        left, right = candidate[index], target[index]
        row[f"cosine_{scope}"] = (left @ right / (left.norm() * right.norm())).item()
        row[f"ratio_{scope}"] = (left.norm() / right.norm()).item()
    return row


def compare_all(at: Tensor, steps: dict[str, Tensor], second_moment: Tensor, data: tuple[Tensor, Tensor]) -> Rows:
    """Compare all candidates with the targets at the parameters ``at``.

    The targets are the natural gradient and the damped Newton step.
    """
    layout = Layout()
    inputs, answers = data
    at = at.clone().requires_grad_()
    loss = F.cross_entropy(layout.logits(at, inputs), answers)
    (gradient,) = torch.autograd.grad(loss, at)
    at = at.detach()
    metric = fisher(layout.logits, at, inputs)
    layered, targets = spectrum(layout.by_layer(metric)), {"natural": spectrum(metric)}
    targets["newton"] = spectrum(hessian(layout.logits, at, inputs, answers))
    rows: Rows = []
    for target, factor in [(target, factor) for target in targets for factor in DAMPINGS]:
        goal = damped_step(targets[target], gradient, factor)
        delta = damping(targets["natural"].values, factor)
        candidates = [("step", name, vector) for name, vector in steps.items()]
        pure = shapes(gradient, second_moment, metric.diagonal(), delta, layout)
        # The same damping as for the full matrix, whose largest eigenvalue is not that of the blocks.
        pure["Fisher by layer"] = damped_step(layered, gradient, delta / layered.values.abs().max().item())
        candidates += [("shape", name, vector) for name, vector in pure.items()]
        for kind, name, vector in candidates:
            row = {"loss": loss.item(), "target": target, "damping": factor, "kind": kind, "candidate": name}
            rows.append(row | compare(vector, goal, layout))
    return rows


def study(seeds: int, checkpoints: tuple[int, ...]) -> Rows:
    """Run everything, and return one row for each measurement."""
    rows: Rows = []
    for seed in range(seeds):
        for driver in OPTIMIZERS:
            for step, at, updates, second_moment in trajectory(driver, seed, checkpoints[-1]):
                if step in checkpoints:
                    found = compare_all(at, updates, second_moment, training_set(seed))
                    rows += [{"seed": seed, "driver": driver, "step": step} | row for row in found]
            print(f"seed {seed}, driver {driver}: loss {rows[-1]['loss']:.4f} at step {rows[-1]['step']}", flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=math.inf, help="leave out checkpoints after this step")
    parser.add_argument("--report", action="store_true", help="write table and picture from cosines.csv.gz")
    options = parser.parse_args()
    if options.report:
        report.write(report.read(FOLDER / "cosines.csv.gz"), FOLDER)
    else:
        chosen = tuple(step for step in CHECKPOINTS if step <= options.steps)
        rows = study(options.seeds, chosen)
        if options.seeds >= 5 and chosen == CHECKPOINTS:
            report.save(rows, FOLDER / "cosines.csv.gz")
            report.write(report.read(FOLDER / "cosines.csv.gz"), FOLDER)
        else:
            print(report.table(rows))
