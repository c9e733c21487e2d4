"""Compare the chunked cross-entropy with torch's in float64.

The loss, the gradients and the memory that it saves are checked.
"""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.optimizer_step import peak_bytes
from modules.chunked_cross_entropy import chunked_cross_entropy
from tests.helpers.commands import ROOT


def example(
    dtype: torch.dtype = torch.float64, tokens: int = 37, width: int = 8, vocabulary: int = 50
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocabulary, (tokens,), generator=generator)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets)


def loss_and_gradients(function: object, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    loss = function(hidden, weight, targets)  # type: ignore[operator]
    return loss.detach(), *torch.autograd.grad(3 * loss, (hidden, weight))


@pytest.mark.parametrize("tokens_at_once", [1, 7, 37, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_equals_the_plain_one_whatever_the_chunk(dtype: torch.dtype, tolerance: float, tokens_at_once: int) -> None:
    expected = loss_and_gradients(plain, *example())

    def chunked(*arguments: Tensor) -> Tensor:
        return chunked_cross_entropy(*arguments, chunk_elements=50 * tokens_at_once)

    found = loss_and_gradients(chunked, *example(dtype))
    for actual, plain_one in zip(found, expected, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), plain_one, rtol=tolerance, atol=tolerance)


def test_a_tied_weight_gets_both_gradients() -> None:
    _, weight, targets = example()
    tokens = targets.flip(0)
    gradients = [
        torch.autograd.grad(loss(F.embedding(tokens, weight).tanh(), weight, targets), weight)[0]
        for loss in (plain, chunked_cross_entropy)
    ]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("needed", ["hidden", "weight"])
def test_only_inputs_that_need_a_gradient_get_one(needed: str) -> None:
    hidden, weight, targets = example()
    (weight if needed == "hidden" else hidden).requires_grad_(False)
    expected = torch.autograd.grad(plain(hidden, weight, targets), hidden if needed == "hidden" else weight)
    chunked_cross_entropy(hidden, weight, targets, 100).backward()
    found = hidden.grad if needed == "hidden" else weight.grad
    torch.testing.assert_close(found, expected[0], rtol=1e-14, atol=1e-14)
    assert (weight if needed == "hidden" else hidden).grad is None


def test_under_autocast_it_is_as_near_to_float64_as_the_plain_one() -> None:
    arguments = example(torch.float32, tokens=512, width=32, vocabulary=200)
    exact = loss_and_gradients(plain, *example(tokens=512, width=32, vocabulary=200))
    with torch.autocast("cpu", torch.bfloat16):
        plain_one = loss_and_gradients(plain, *arguments)
        actual = loss_and_gradients(lambda *rest: chunked_cross_entropy(*rest, chunk_elements=20_000), *arguments)
    for value, other, reference in zip(actual, plain_one, exact, strict=True):
        assert value.dtype == torch.float32
        assert (value - reference).norm() <= 1.5 * (other - reference).norm() + 1e-3 * reference.norm()


def test_products_run_in_the_dtype_of_autocast() -> None:
    arguments = example(torch.float32)
    full = chunked_cross_entropy(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        half = chunked_cross_entropy(*arguments)
    assert 1e-6 < (full - half).abs() < 1e-1


def test_without_gradients_none_are_made() -> None:
    hidden, weight, targets = example()
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden, weight, targets).detach())


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = example(torch.float32)
    expected = plain(1e4 * hidden, weight, targets)
    torch.testing.assert_close(chunked_cross_entropy(1e4 * hidden, weight, targets), expected)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_targets_may_be_of_any_integer_dtype(dtype: torch.dtype) -> None:
    hidden, weight, targets = example()
    loss = chunked_cross_entropy(hidden, weight, targets.to(dtype))
    torch.testing.assert_close(loss, plain(hidden, weight, targets))


def test_a_second_backward_pass_is_refused() -> None:
    loss = chunked_cross_entropy(*example())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="allows one backward pass"):
        loss.backward()


@pytest.mark.parametrize(
    ("hidden", "weight", "targets", "named"),
    [((4, 3), (9, 2), (4,), "width"), ((4, 3), (9, 3), (5,), "target"), ((0, 3), (9, 3), (0,), "a token or more")],
)
def test_shapes_that_do_not_fit_are_refused(
    hidden: tuple[int, ...], weight: tuple[int, ...], targets: tuple[int, ...], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        chunked_cross_entropy(torch.zeros(hidden), torch.zeros(weight), torch.zeros(targets, dtype=torch.int64))


def test_peak_memory_is_at_most_half_of_the_plain_ones() -> None:
    peaks = []
    for function in (plain, chunked_cross_entropy):
        arguments = example(torch.float32, tokens=512, width=8, vocabulary=5000)
        chunk = () if function is plain else (500_000,)
        peaks.append(peak_bytes(lambda: function(*arguments, *chunk).backward()))  # noqa: B023
    assert peaks[0] > 2 * 512 * 5000 * 4, "the plain one holds its logits more than once"
    assert peaks[1] <= 0.5 * peaks[0], peaks


@pytest.mark.slow
def test_peak_memory_is_at_most_half_of_the_plain_ones_at_the_published_size() -> None:
    """Measure a vocabulary of 40,479 and 8 x 255 tokens.

    Each is measured in a separate process, relative to the memory in use before.
    """
    peaks = {}
    for kind in ("plain", "chunked"):
        command = [sys.executable, "-m", "benchmarks.cross_entropy", "--peak", kind, "--width", "128"]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
        peaks[kind] = float(process.stdout)
    assert peaks["plain"] > 3 * 2040 * 40_479 * 4 / 2**20 * 0.6, "the plain one holds its logits more than once"
    assert peaks["chunked"] <= 0.5 * peaks["plain"], peaks


def test_can_be_differentiated_twice() -> None:
    """Differentiate twice, as a probe of the Hessian does."""
    products = []
    for loss in (plain, chunked_cross_entropy):
        hidden, weight, targets = example()
        first = torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight), create_graph=True)
        along = sum((gradient * gradient.detach().sin()).sum() for gradient in first)
        products.append(torch.autograd.grad(along, (hidden, weight)))
    for actual, plain_one in zip(products[1], products[0], strict=True):
        torch.testing.assert_close(actual, plain_one, rtol=1e-12, atol=1e-14)


def linearized(hidden: Tensor, weight: Tensor, targets: Tensor, first: tuple[Tensor, Tensor]) -> Tensor:
    logits = F.linear(first[0].detach(), first[1].detach()).requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(logits, targets), logits)
    return (F.linear(hidden, weight) * slope).sum()


def moved(*tensors: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(t.detach() + torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors)


@pytest.mark.parametrize("tokens_at_once", [1, 7, 1000])
def test_linearized_at_an_earlier_pass_it_equals_the_plain_one(tokens_at_once: int) -> None:
    hidden, weight, targets = example()
    earlier, first_weight = moved(hidden, weight)
    first = (earlier, first_weight.requires_grad_())  # a constant nevertheless

    def chunked(*arguments: Tensor) -> Tensor:
        return chunked_cross_entropy(*arguments, chunk_elements=50 * tokens_at_once, first=first)

    def plain_one(*arguments: Tensor) -> Tensor:
        return linearized(*arguments, first)

    def tied(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda hidden, weight, targets: loss(hidden + weight[targets].tanh(), weight, targets)

    for kind in (lambda loss: loss, tied):
        expected = loss_and_gradients(kind(plain_one), hidden, weight, targets)
        found = loss_and_gradients(kind(chunked), hidden, weight, targets)
        for actual, other in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, other, rtol=1e-13, atol=1e-14)
    expected_value = plain_one(hidden, weight, targets).detach()
    with torch.no_grad():
        torch.testing.assert_close(chunked(hidden, weight, targets), expected_value)


def test_linearized_at_itself_it_has_the_gradients_of_the_cross_entropy_bit_for_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, targets = example(torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            losses = [chunked_cross_entropy(hidden, weight, targets, 500, first) for first in (None, (hidden, weight))]
        for loss, other in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in losses), strict=True):
            assert torch.equal(loss, other)


def test_linearized_it_can_be_differentiated_twice() -> None:
    hidden, weight, targets = example()
    first = (hidden * 2, weight * 3)
    products = []
    for loss in (linearized(hidden, weight, targets, first), chunked_cross_entropy(hidden, weight, targets, 90, first)):
        gradients = torch.autograd.grad(loss, (hidden, weight), create_graph=True)
        products.append(torch.autograd.grad(sum((g * g).sum() for g in gradients), (hidden, weight)))
    for actual, plain_one in zip(products[1], products[0], strict=True):
        torch.testing.assert_close(actual, plain_one, rtol=1e-12, atol=1e-14)


def test_an_earlier_pass_of_other_tokens_is_refused() -> None:
    hidden, weight, targets = example()
    with pytest.raises(ValueError, match="first must have the shapes of hidden and weight"):
        chunked_cross_entropy(hidden, weight, targets, first=(hidden[1:], weight))
