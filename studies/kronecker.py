"""Compute K-FAC's matrix and SOAP's direction, which treat a layer as a Kronecker product."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def kfac_matrix(network: nn.Module, inputs: Tensor) -> Tensor:
    """Return K-FAC's approximation (n, n) of the Fisher matrix (Martens and Grosse 2015).

    It is zero between the linear layers. For a layer it is the Kronecker product of two means over the examples. The
    first is of the outer products of the gradients of ``log p_c`` by the layer's outputs, over answers c drawn from the
    model. The second is of the outer products of the layer's inputs, with a 1 for the bias.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def record(layer: nn.Module, arguments: Any, outputs: Tensor) -> None:
        seen.append((F.pad(arguments[0].detach(), (0, 1), value=1.0), outputs))

    hooks = [layer.register_forward_hook(record) for layer in network.modules() if isinstance(layer, nn.Linear)]
    log_probabilities = F.log_softmax(network(inputs), dim=-1)
    for hook in hooks:
        hook.remove()
    weights, blocks = log_probabilities.detach().exp() / len(inputs), []
    for extended, outputs in seen:
        # An example's outputs affect no other example, so the gradient of the sum contains the gradient of each.
        scores = torch.stack(
            [torch.autograd.grad(column.sum(), outputs, retain_graph=True)[0] for column in log_probabilities.T]
        )
        left = torch.einsum("nc,cni,cnj->ij", weights, scores, scores)
        right = extended.T @ extended / len(inputs)
        product = torch.einsum("ij,kl->ikjl", left, right).reshape(len(left) * len(right), -1)
        # Parameters are stored as weight, then bias. The product has the bias as the last column of each row.
        places = torch.arange(len(product)).view(len(left), -1)
        order = torch.cat([places[:, :-1].flatten(), places[:, -1]])
        blocks.append(product[order][:, order])
    return torch.block_diag(*blocks)


def soap(gradient: Tensor, past: Tensor, weights: Tensor, eps: float) -> Tensor:
    """Return ``gradient`` (rows, cols), divided as by Adam in Shampoo's eigenbasis.

    ``past`` (steps, rows, cols) are the gradients of the batches and ``weights`` (steps,) their weights in every
    average. The second moments are those of all past gradients in the newest basis, while SOAP (Vyas et al. 2024)
    leaves them in the basis of their time.
    """
    left = torch.linalg.eigh(torch.einsum("t,tij,tkj->ik", weights, past, past))[1]
    right = torch.linalg.eigh(torch.einsum("t,tji,tjk->ik", weights, past, past))[1]
    second_moment = torch.einsum("t,tij->ij", weights, (left.T @ past @ right) ** 2)
    return left @ (left.T @ gradient @ right / (second_moment.sqrt() + eps)) @ right.T


def average_weights(steps: int, beta: float) -> Tensor:
    """Return the weight of each step in Adam's bias-corrected average after ``steps``."""
    weights = beta ** torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    return weights / weights.sum()
