"""Measure how close ARS2's direction comes to the exact natural gradient.

    python -m studies.natural_gradient                       # all of results/natural_gradient, six minutes of a core
    python -m studies.natural_gradient --report              # only the table and the picture, from cosines.csv.gz
    python -m studies.natural_gradient --seeds 2 --steps 30  # a quick check, printed but not written

The network is a two-layer MLP (tanh, 22-24-11, 827 parameters) on the sum of two one-hot numbers modulo 11, trained on
80 % of the 121 pairs in batches of 32, in float64, without weight decay. Each of five optimizers in turn drives the
training. At every step all optimizers compute their update from the same parameters and batch, with separate moments
(and for Sync a separate second gradient), but only the driver's update is applied. At chosen steps two kinds of
candidates are compared with two targets, which use the exact curvature at the same parameters and the gradient g over
the full training set:

- *step*: the update of the optimizer, divided by its learning rate. It includes momentum and the noise of the batch.
- *shape*: only the geometry, applied to g. The candidates are ``g``; Adam's ``u = g / sqrt(v_hat)``, with AdamW's v_hat
  on this trajectory; each with ``|x| NS(x)`` on the weight matrices ("orthogonal"); and the same with the diagonal d of
  the exact Fisher, as ``g / sqrt(d)`` and ``g / (d + damping)``. Three controls have more structure. SOAP is Adam in
  Shampoo's eigenbasis, from the same past gradients. K-FAC inverts a Kronecker product for each layer. "Fisher by
  layer" inverts the exact Fisher of each layer. Like the diagonals of the Fisher, the last two use the predictions on
  the full training set.

The targets are the natural gradient ``(F + damping)^-1 g`` with the exact Fisher over the model's predictions, and
the damped Newton step ``(H + damping)^-1 g``. The damping is a factor times the largest absolute eigenvalue. For H a
shift that makes it positive is added. Several factors are tried. K-FAC and "Fisher by layer" get the damping of F. The
scopes are all parameters, the weight matrices, and each of them. In a scope only its parameters move, so the damped
matrices and g are restricted to them. Two numbers are measured for a candidate d. A is the damped matrix of the target:

- *share*: ``(g.d)^2 / (d.A d) / (g.A^-1 g)``, which is 1 for the target and does not depend on the length of d. It is
  the greatest decrease of the quadratic model along d, relative to that along the target. For F it is the descent per
  KL divergence (damped): to descend as far as d, the natural gradient needs this share of the divergence of d. It is
  the square of the cosine in the metric A.
- *cosine*: the Euclidean cosine of d and the target.
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

from ars2 import ARS2Neo, Muon, param_groups
from studies import natural_gradient_report as report
from studies.fisher import damped_step, damping, fisher, hessian, mean_loss
from studies.kronecker import average_weights, kfac_matrix, soap
from studies.small_network import Layout, Network, flat, training_set

Rows: TypeAlias = list[dict[str, Any]]
FOLDER = Path(__file__).parent.parent / "results" / "natural_gradient"
BATCH, BETA, EPS = 32, 0.98, 1e-8
DAMPINGS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
CHECKPOINTS = (10, 30, 100, 300, 500)

_NEO = {"lr": 3e-3, "betas": (0.9, BETA), "weight_decay": 0.0, "ns_dtype": "float64"}
OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], dict[str, Any], dict[str, Any]]] = {
    # Class, options, and options of the vector track (biases).
    "SGD": (torch.optim.SGD, {"lr": 1.0}, {}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-2, "betas": (0.9, BETA), "weight_decay": 0.0}, {}),
    "Muon": (Muon, {"lr": 0.02, "momentum": 0.95, "ns_dtype": "float64"}, {"lr": 3e-3}),
    # ARS2 Base's momentum, so that the two differ by Adam's second moment and the length of each matrix.
    "Muon, momentum 0.9": (Muon, {"lr": 0.02, "momentum": 0.9, "nesterov": False, "ns_dtype": "float64"}, {"lr": 3e-3}),
    "ARS2 Base": (ARS2Neo, {**_NEO, "mode": "base"}, {}),
    "ARS2 Sync": (ARS2Neo, {**_NEO, "mode": "sync", "rho": 0.1}, {}),
}
DRIVERS = ("SGD", "AdamW", "Muon", "ARS2 Base", "ARS2 Sync")


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
    (to be subtracted), and the gradients (step, n) of the batches so far.
    """
    torch.manual_seed(seed)
    at = flat(Network().parameters())
    observers = {name: Observer(name) for name in OPTIMIZERS}
    inputs, answers = training_set(seed)
    order, past = torch.Generator().manual_seed(seed), torch.empty(steps, len(at), dtype=at.dtype)
    for step in range(1, steps + 1):
        batch = torch.randperm(len(inputs), generator=order)[:BATCH]
        after = {name: observer.step(at, inputs[batch], answers[batch]) for name, observer in observers.items()}
        updates = {name: (at - end) / observers[name].lr for name, end in after.items()}
        past[step - 1] = updates["SGD"]  # without momentum the gradient of the batch
        yield step, at, updates, past[:step]
        at = after[driver]


def shapes(gradient: Tensor, past: Tensor, diagonal: Tensor, delta: float, layout: Layout) -> dict[str, Tensor]:
    """Return the candidates that apply a diagonal, Newton-Schulz or SOAP to the full gradient.

    ``past`` (steps, n) are the gradients of the batches so far.
    """
    weights = average_weights(len(past), BETA)
    adam = gradient / ((weights @ past**2).sqrt() + EPS)
    plain = {
        "gradient": gradient,
        "Adam": adam,
        "1/sqrt(diagonal Fisher)": gradient / (diagonal.sqrt() + EPS),
        "1/diagonal Fisher": gradient / (diagonal + delta),
    }
    orthogonal = {f"orthogonal {name}": layout.orthogonal(vector) for name, vector in plain.items()}
    rotated = adam.clone()
    for s, shape in layout.matrices():
        rotated[s] = soap(gradient[s].view(shape), past[:, s].view(-1, *shape), weights, EPS).flatten()
    return plain | orthogonal | {"SOAP": rotated}


def compare(candidate: Tensor, target: Tensor, gradient: Tensor, damped: Tensor) -> tuple[float, float]:
    """Return cosine with the target ``damped^-1 gradient``, and share of its decrease.

    The share is negative where the candidate leads uphill.
    """
    descent = candidate @ gradient
    share = descent * descent.abs() / (candidate @ damped @ candidate) / (target @ gradient)
    return (candidate @ target / (candidate.norm() * target.norm())).item(), share.item()


def compare_all(at: Tensor, steps: dict[str, Tensor], past: Tensor, data: tuple[Tensor, Tensor]) -> Rows:
    """Compare all candidates with the natural gradient and the damped Newton step at ``at``."""
    layout = Layout()
    inputs, answers = data
    nn.utils.vector_to_parameters(at.clone(), layout.network.parameters())
    gradient, loss = torch.func.grad_and_value(mean_loss, argnums=1)(layout.logits, at, inputs, answers)
    targets = {"natural": fisher(layout.logits, at, inputs), "newton": hessian(layout.logits, at, inputs, answers)}
    metric, spectra = targets["natural"], {name: torch.linalg.eigvalsh(matrix) for name, matrix in targets.items()}
    controls = {"K-FAC": kfac_matrix(layout.network, inputs), "Fisher by layer": layout.by_layer(metric)}
    rows: Rows = []
    for factor in DAMPINGS:
        deltas = {target: damping(values, factor) for target, values in spectra.items()}
        vectors = {("step", name): vector for name, vector in steps.items()}
        pure = shapes(gradient, past, metric.diagonal(), deltas["natural"], layout)
        vectors |= {("shape", name): vector for name, vector in pure.items()}
        found: dict[tuple[str, str, str], dict[str, float]] = {}
        for scope, index in layout.scopes.items():
            slope = gradient[index]
            parts = {key: vector[index] for key, vector in vectors.items()}
            for name, matrix in controls.items():
                parts["shape", name] = damped_step(matrix[index][:, index], slope, deltas["natural"])
            for target, matrix in targets.items():
                block = matrix[index][:, index]
                goal = damped_step(block, slope, deltas[target])
                damped = block + deltas[target] * torch.eye(len(index), dtype=block.dtype)
                for (kind, name), part in parts.items():
                    row = found.setdefault((target, kind, name), {})
                    row[f"cosine_{scope}"], row[f"share_{scope}"] = compare(part, goal, slope, damped)
        for (target, kind, name), row in found.items():
            base = {"loss": loss.item(), "target": target, "damping": factor, "kind": kind, "candidate": name}
            rows.append(base | row)
    return rows


def study(seeds: int, checkpoints: tuple[int, ...]) -> Rows:
    """Run everything, and return one row for each measurement."""
    rows: Rows = []
    for seed in range(seeds):
        for driver in DRIVERS:
            for step, at, updates, past in trajectory(driver, seed, checkpoints[-1]):
                if step in checkpoints:
                    found = compare_all(at, updates, past, training_set(seed))
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
