import pytest
import torch
from torch import Tensor, nn

from studies.fisher import fisher
from studies.kronecker import average_weights, kfac_matrix, soap


def tiny() -> tuple[nn.Sequential, Tensor]:
    """Return a network of 35 parameters, 15 of them in the first layer, and seven inputs."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5)).double()
    return network, torch.randn(7, 4, dtype=torch.float64)


def test_kfac_multiplies_each_layer_by_both_factors() -> None:
    """Compare with ``G X A`` for X = [weight | bias], from factors made one example and answer at a time."""
    network, inputs = tiny()
    matrix, vector = kfac_matrix(network, inputs), torch.randn(35, dtype=torch.float64)
    assert not matrix[:15, 15:].any() and not matrix[15:, :15].any()
    for index, (start, rows, cols) in {0: (0, 3, 4), 2: (15, 5, 3)}.items():
        left, right = torch.zeros(rows, rows).double(), torch.zeros(cols + 1, cols + 1).double()
        for example in inputs:
            at = network[:index](example).detach()
            out = network[index](at).detach().requires_grad_()
            for log_probability in network[index + 1 :](out).log_softmax(0):
                (score,) = torch.autograd.grad(log_probability, out, retain_graph=True)
                left += log_probability.exp().item() * torch.outer(score, score) / len(inputs)
            extended = torch.cat([at, torch.ones(1).double()])
            right += torch.outer(extended, extended) / len(inputs)
        part = slice(start, start + rows * (cols + 1))
        weight, bias = vector[part].split([rows * cols, rows])
        product = left @ torch.cat([weight.view(rows, cols), bias[:, None]], dim=1) @ right
        expected = torch.cat([product[:, :-1].flatten(), product[:, -1]])
        torch.testing.assert_close(matrix[part, part] @ vector[part], expected, rtol=1e-10, atol=1e-14)


def test_kfac_is_the_exact_fisher_of_each_layer_for_a_single_example() -> None:
    network, inputs = tiny()
    shapes = {name: p.shape for name, p in network.named_parameters()}

    def logits(flat: Tensor, inputs: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        tensors = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
        result: Tensor = torch.func.functional_call(network, tensors, (inputs,))
        return result

    exact = fisher(logits, nn.utils.parameters_to_vector(network.parameters()).detach(), inputs[:1])
    exact[:15, 15:] = exact[15:, :15] = 0
    torch.testing.assert_close(kfac_matrix(network, inputs[:1]), exact, rtol=1e-10, atol=1e-14)
    assert not torch.allclose(kfac_matrix(network, inputs[:2])[:15, :15], exact[:15, :15], rtol=0.1)


def test_soap_is_adam_in_the_dense_basis_of_shampoos_factors() -> None:
    """Compare with an explicit rotation of flat vectors and the diagonal of their mean outer product."""
    generator = torch.Generator().manual_seed(0)
    past = torch.randn(20, 3, 4, dtype=torch.float64, generator=generator)
    gradient, weights = torch.randn(3, 4, dtype=torch.float64, generator=generator), average_weights(20, 0.9)
    left, right, second = (torch.zeros(n, n).double() for n in (3, 4, 12))
    for weight, old in zip(weights, past, strict=True):
        left += weight * old @ old.T
        right += weight * old.T @ old
        second += weight * torch.outer(old.flatten(), old.flatten())
    basis = torch.kron(torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1])
    variances = (basis.T @ second @ basis).diagonal()
    expected = basis @ (basis.T @ gradient.flatten() / (variances.sqrt() + 1e-3))
    torch.testing.assert_close(soap(gradient, past, weights, 1e-3).flatten(), expected, rtol=1e-9, atol=1e-12)


def test_soap_is_adam_where_the_basis_is_that_of_the_entries() -> None:
    """Use gradients with a single entry each, for which both of Shampoo's factors are diagonal."""
    past = torch.eye(6, dtype=torch.float64).view(6, 2, 3) * torch.arange(1.0, 7.0)[:, None, None]
    gradient, weights = torch.ones(2, 3, dtype=torch.float64), average_weights(6, 0.5)
    adam = gradient / (torch.einsum("t,tij->ij", weights, past**2).sqrt() + 1e-8)
    torch.testing.assert_close(soap(gradient, past, weights, 1e-8), adam, rtol=1e-9, atol=0)


def test_average_weights_are_adams_bias_corrected_ones() -> None:
    average, values = 0.0, (3.0, 1.0, 4.0)
    for value in values:
        average = 0.98 * average + 0.02 * value
    found = average_weights(3, 0.98) @ torch.tensor(values).double()
    assert found.item() == pytest.approx(average / (1 - 0.98**3), rel=1e-12)
