"""Compute the exact Fisher, Gauss-Newton and Hessian matrix of a small network.

The matrices of n parameters are dense and n x n, so networks can have up to a few thousand parameters.
Parameters are one flat vector. ``logits`` maps it and the inputs (examples, ...) to logits (examples, classes).
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Logits: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def mean_loss(logits: Logits, parameters: Tensor, inputs: Tensor, answers: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats, a scalar."""
    return F.cross_entropy(logits(parameters, inputs), answers)


def fisher(logits: Logits, parameters: Tensor, inputs: Tensor) -> Tensor:
    """Return the exact Fisher matrix (n, n), mean of ``sum_c p_c s_c s_c^T``.

    ``p`` are the model's predicted probabilities, ``s_c`` the gradient of ``log p_c``. The expectation is over answers
    drawn from the model. Answers from the data would give the empirical Fisher.
    """

    def log_probabilities(at: Tensor) -> Tensor:
        return F.log_softmax(logits(at, inputs), dim=-1)

    scores: Tensor = torch.func.jacrev(log_probabilities)(parameters)
    weights = log_probabilities(parameters).exp().sqrt() / len(inputs) ** 0.5
    rows = (scores * weights.unsqueeze(-1)).flatten(0, 1)
    return rows.T @ rows


def gauss_newton(logits: Logits, parameters: Tensor, inputs: Tensor, answers: Tensor) -> Tensor:
    """Return the generalised Gauss-Newton matrix (n, n), the mean of ``J^T H J``.

    ``J`` is the Jacobian of the logits, ``H`` the Hessian of the cross-entropy by the logits (Martens 2020).
    """
    jacobian: Tensor = torch.func.jacrev(logits)(parameters, inputs)
    outer = torch.func.vmap(torch.func.hessian(F.cross_entropy))(logits(parameters, inputs), answers)
    return torch.einsum("ncp,ncd,ndq->pq", jacobian, outer, jacobian) / len(inputs)


def hessian(logits: Logits, parameters: Tensor, inputs: Tensor, answers: Tensor) -> Tensor:
    """Return the Hessian (n, n) of the mean cross-entropy."""
    matrix: Tensor = torch.func.hessian(mean_loss, argnums=1)(logits, parameters, inputs, answers)
    return matrix


def damping(values: Tensor, factor: float) -> float:
    """Return ``factor`` times the largest absolute of the eigenvalues (n,), in ascending order.

    Where the smallest eigenvalue is negative, its absolute value is added. The damped matrix is then positive definite,
    and its step is a descent direction.
    """
    return factor * values.abs().max().item() + max(0.0, -values[0].item())


def damped_step(matrix: Tensor, gradient: Tensor, delta: float) -> Tensor:
    """Return ``(A + delta I)^-1 gradient``.

    For the Fisher matrix this is the natural gradient (Amari 1998), for the Hessian the damped Newton step. It is
    subtracted from the parameters.
    """
    return torch.linalg.solve(matrix + delta * torch.eye(len(matrix), dtype=matrix.dtype), gradient)
