import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from studies.fisher import damped_step, damping, fisher, gauss_newton, hessian, mean_loss

INPUTS, HIDDEN, CLASSES, EXAMPLES = 4, 3, 5, 7
SIZE = HIDDEN * INPUTS + CLASSES * HIDDEN


def logits(parameters: Tensor, inputs: Tensor) -> Tensor:
    first, second = parameters.split([HIDDEN * INPUTS, CLASSES * HIDDEN])
    return torch.tanh(inputs @ first.view(HIDDEN, INPUTS).T) @ second.view(CLASSES, HIDDEN).T


def linear_logits(parameters: Tensor, inputs: Tensor) -> Tensor:
    return inputs @ parameters.view(CLASSES, INPUTS).T


def problem(size: int = SIZE) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    parameters = torch.randn(size, dtype=torch.float64, generator=generator)
    inputs = torch.randn(EXAMPLES, INPUTS, dtype=torch.float64, generator=generator)
    return parameters, inputs, torch.randint(0, CLASSES, (EXAMPLES,), generator=generator)


def test_the_fisher_matrix_is_the_sum_of_outer_products_of_scores() -> None:
    parameters, inputs, _ = problem()
    expected = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    for example in inputs:
        at = parameters.clone().requires_grad_()
        log_probabilities = F.log_softmax(logits(at, example[None])[0], dim=0)
        for log_probability in log_probabilities:
            (score,) = torch.autograd.grad(log_probability, at, retain_graph=True)
            expected += log_probability.exp().item() * torch.outer(score, score) / EXAMPLES
    torch.testing.assert_close(fisher(logits, parameters, inputs), expected, rtol=1e-10, atol=1e-14)


def test_the_fisher_matrix_is_the_mean_square_of_gradients_on_sampled_labels() -> None:
    """Sample labels from the model, as in the definition."""
    parameters, inputs, _ = problem()
    generator = torch.Generator().manual_seed(1)
    probabilities = logits(parameters, inputs).softmax(1)
    answers = torch.multinomial(probabilities, 4000, replacement=True, generator=generator)
    gradient = torch.func.grad(mean_loss, argnums=1)
    scores = torch.func.vmap(lambda x, y: torch.func.vmap(lambda c: gradient(logits, parameters, x[None], c[None]))(y))(
        inputs, answers
    ).flatten(0, 1)
    sampled = scores.T @ scores / len(scores)
    exact = fisher(logits, parameters, inputs)
    assert ((sampled - exact).norm() / exact.norm()).item() < 0.03


def test_gauss_newton_equals_fisher_for_softmax_cross_entropy() -> None:
    parameters, inputs, answers = problem()
    matrices = gauss_newton(logits, parameters, inputs, answers), fisher(logits, parameters, inputs)
    torch.testing.assert_close(*matrices, rtol=1e-10, atol=1e-14)


def test_the_hessian_equals_autograd_and_gauss_newton_for_linear_logits() -> None:
    parameters, inputs, answers = problem()
    expected = torch.autograd.functional.hessian(lambda p: mean_loss(logits, p, inputs, answers), parameters)
    matrix = hessian(logits, parameters, inputs, answers)
    torch.testing.assert_close(matrix, expected, rtol=1e-10, atol=1e-14)
    assert not torch.allclose(matrix, gauss_newton(logits, parameters, inputs, answers), rtol=0.1)
    parameters, inputs, answers = problem(CLASSES * INPUTS)
    matrices = hessian(linear_logits, parameters, inputs, answers), fisher(linear_logits, parameters, inputs)
    torch.testing.assert_close(*matrices, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("factor", [1e-4, 1e-1, 10.0])
def test_a_damped_step_solves_the_damped_system(factor: float) -> None:
    parameters, inputs, answers = problem()
    gradient = torch.func.grad(mean_loss, argnums=1)(logits, parameters, inputs, answers)
    for matrix in (fisher(logits, parameters, inputs), hessian(logits, parameters, inputs, answers)):
        values = torch.linalg.eigvalsh(matrix)
        delta = factor * values.abs().max().item() + max(0.0, -values[0].item())
        assert damping(values, factor) == pytest.approx(delta)
        step = damped_step(matrix, gradient, delta)
        torch.testing.assert_close(matrix @ step + delta * step, gradient, rtol=1e-8, atol=1e-12)
        assert (step @ gradient).item() > 0  # downhill


def test_much_damping_leaves_the_gradient() -> None:
    parameters, inputs, answers = problem()
    gradient = torch.func.grad(mean_loss, argnums=1)(logits, parameters, inputs, answers)
    step = damped_step(fisher(logits, parameters, inputs), gradient, 1e6)
    assert torch.cosine_similarity(step, gradient, dim=0).item() == pytest.approx(1, abs=1e-10)
