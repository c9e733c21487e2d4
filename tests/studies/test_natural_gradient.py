from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ars2 import param_groups
from studies import natural_gradient as study
from studies.kronecker import average_weights, soap
from studies.natural_gradient import DRIVERS, OPTIMIZERS, compare, compare_all, shapes, trajectory
from studies.small_network import SCOPES, Layout, Network, flat, training_set

FACTORS = (1e-6, 1e-2)  # fewer dampings than the study's, for time


def plain_training(name: str, seed: int, steps: int) -> list[Tensor]:
    """Return the parameters before each step of a plain loop.

    It has one optimizer and measures nothing.
    """
    torch.manual_seed(seed)
    network = Network()
    kind, options, vector = OPTIMIZERS[name]
    optimizer = kind(param_groups(network, "all", vector=vector), **options)
    inputs, answers = training_set(seed)
    order, path = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        path.append(flat(network.parameters()))
        batch = torch.randperm(len(inputs), generator=order)[: study.BATCH]

        def closure(batch: Tensor = batch) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(network(inputs[batch]), answers[batch])
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_trajectory_is_that_of_the_driver_alone(driver: str) -> None:
    for (_, at, _, _), expected in zip(trajectory(driver, 1, 8), plain_training(driver, 1, 8), strict=True):
        torch.testing.assert_close(at, expected, rtol=1e-12, atol=1e-14)


def test_all_optimizers_get_the_same_gradients_with_separate_moments() -> None:
    """Follow the update of AdamW from the gradients of SGD.

    SGD's update is the gradient of the batch, and AdamW's follows from all gradients by its formula.
    """
    layout, m, v = Layout(), torch.zeros(827, dtype=torch.float64), torch.zeros(827, dtype=torch.float64)
    for step, _, updates, past in trajectory("Muon", 0, 6):
        gradient = updates["SGD"]
        assert len(past) == step
        assert torch.equal(past[-1], gradient)
        m, v = 0.9 * m + 0.1 * gradient, 0.98 * v + 0.02 * gradient**2
        v_hat = v / (1 - 0.98**step)
        torch.testing.assert_close(average_weights(step, 0.98) @ past**2, v_hat, rtol=1e-6, atol=1e-18)
        expected = m / (1 - 0.9**step) / (v_hat.sqrt() + 1e-8)
        torch.testing.assert_close(updates["AdamW"], expected, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(updates["ARS2 Base"], layout.orthogonal(expected), rtol=1e-6, atol=1e-9)
        assert not torch.allclose(updates["ARS2 Sync"], updates["ARS2 Base"], rtol=1e-3)


def test_orthogonal_keeps_length_times_root_of_rank_and_leaves_biases() -> None:
    layout = Layout()
    vector = torch.randn(827, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = layout.orthogonal(vector)
    for name, s in layout.slices.items():
        if name.endswith("bias"):
            assert torch.equal(result[s], vector[s])
            continue
        values = torch.linalg.svdvals(result[s].view(layout.shapes[name])) / vector[s].norm()
        assert 0.6 < values.min().item() <= values.max().item() < 1.3


def test_logits_are_the_networks() -> None:
    network, layout = Network(), Layout()
    inputs, _ = training_set(0)
    torch.testing.assert_close(layout.logits(flat(network.parameters()), inputs), network(inputs))


def test_scopes_are_the_parts_of_their_names() -> None:
    layout = Layout()
    marked = torch.zeros(827)
    for number, s in enumerate(layout.slices.values()):
        marked[s] = number
    found = {scope: marked[index].unique().tolist() for scope, index in layout.scopes.items()}
    assert list(layout.slices) == ["hidden.weight", "hidden.bias", "output.weight", "output.bias"]
    assert found == {"all": [0, 1, 2, 3], "weights": [0, 2], "layer1": [0], "layer2": [2]}


def test_the_share_is_the_greatest_decrease_of_the_quadratic_model() -> None:
    """Search for the best length of a step, and for its KL divergence at the descent of the target."""
    generator = torch.Generator().manual_seed(0)
    root, gradient, candidate = (torch.randn(*size, generator=generator).double() for size in ((6, 6), (6,), (6,)))
    damped = root @ root.T + 0.1 * torch.eye(6).double()
    candidate *= (candidate @ gradient).sign()
    target = torch.linalg.solve(damped, gradient)

    def decrease(direction: Tensor) -> float:
        lengths = torch.linspace(0, 20, 200_001).double()
        return (lengths * (direction @ gradient) - lengths**2 * (direction @ damped @ direction) / 2).max().item()

    def divergence(direction: Tensor) -> float:
        unit = direction / (direction @ gradient)  # descends by 1
        return (unit @ damped @ unit / 2).item()

    cosine, share = compare(candidate, target, gradient, damped)
    assert 0.001 < share < 0.9
    assert share == pytest.approx(decrease(candidate) / decrease(target), rel=1e-4)
    assert share == pytest.approx(divergence(target) / divergence(candidate), rel=1e-9)
    assert cosine == pytest.approx(torch.cosine_similarity(candidate, target, dim=0).item())
    assert compare(3 * target, target, gradient, damped) == (pytest.approx(1), pytest.approx(1))
    assert compare(-candidate, target, gradient, damped) == (pytest.approx(-cosine), pytest.approx(-share))


def test_the_training_sets_are_sums_and_differ_by_seed() -> None:
    inputs, answers = training_set(0)
    assert inputs.shape == (96, 22)
    x, y = inputs[:, :11].argmax(1), inputs[:, 11:].argmax(1)
    assert torch.equal((x + y) % 11, answers)
    assert len({(int(a), int(b)) for a, b in zip(x, y, strict=True)}) == 96
    assert not torch.equal(inputs, training_set(1)[0])


@pytest.fixture(scope="module")
def compared() -> list[dict[str, Any]]:
    *_, (_, at, updates, past) = trajectory("AdamW", 0, 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "DAMPINGS", FACTORS)
        return compare_all(at, updates, past, training_set(0))


def test_every_candidate_is_compared_with_every_target(compared: list[dict[str, Any]]) -> None:
    names = {(row["kind"], row["candidate"]) for row in compared}
    assert {name for kind, name in names if kind == "step"} == set(OPTIMIZERS)
    assert len(compared) == len(names) * 2 * len(FACTORS)
    for row in compared:
        for scope in SCOPES:
            assert abs(row[f"cosine_{scope}"]) <= 1 + 1e-9
            assert abs(row[f"share_{scope}"]) <= 1 + 1e-9
    found = {(row["candidate"], row["damping"]): row for row in compared if row["target"] == "natural"}
    for factor in FACTORS:
        # The exact Fisher of a layer is better than its diagonal, and the best for a single layer.
        layered, kfac = found["Fisher by layer", factor], found["K-FAC", factor]
        assert layered["share_weights"] > found["1/diagonal Fisher", factor]["share_weights"]
        assert layered["share_layer1"] == pytest.approx(1)
        assert found["orthogonal Adam", factor]["share_layer1"] < kfac["share_layer1"] < 1
    gradients = [found["gradient", factor]["share_all"] for factor in FACTORS]
    assert gradients == sorted(gradients)


def test_shapes_are_made_of_the_full_gradient() -> None:
    layout = Layout()
    generator = torch.Generator().manual_seed(0)
    gradient, d = (torch.rand(827, dtype=torch.float64, generator=generator) + 0.1 for _ in range(2))
    past, weights = torch.rand(4, 827, dtype=torch.float64, generator=generator) + 0.1, average_weights(4, 0.98)
    found = shapes(gradient, past, d, 0.5, layout)
    adam = gradient / (weights[:, None] * past**2).sum(0).sqrt()
    torch.testing.assert_close(found["Adam"], adam, rtol=1e-6, atol=0)
    torch.testing.assert_close(found["1/diagonal Fisher"], gradient / (d + 0.5))
    torch.testing.assert_close(found["1/sqrt(diagonal Fisher)"], gradient / d.sqrt(), rtol=1e-6, atol=0)
    for name in ("gradient", "Adam", "1/diagonal Fisher", "1/sqrt(diagonal Fisher)"):
        torch.testing.assert_close(found[f"orthogonal {name}"], layout.orthogonal(found[name]))
    for name, s in layout.slices.items():
        expected = found["Adam"][s]
        if name.endswith("weight"):
            shape = layout.shapes[name]
            expected = soap(gradient[s].view(shape), past[:, s].reshape(4, *shape), weights, 1e-8).flatten()
        torch.testing.assert_close(found["SOAP"][s], expected)


def test_only_the_blocks_of_layers_are_kept() -> None:
    layout = Layout()
    mask = layout.by_layer(torch.ones(827, 827)).bool()
    first = 24 * 22 + 24
    assert mask[:first, :first].all()
    assert mask[first:, first:].all()
    assert not mask[:first, first:].any()
