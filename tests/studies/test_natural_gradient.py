from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ars2 import param_groups
from studies import natural_gradient as study
from studies.natural_gradient import (
    OPTIMIZERS,
    Layout,
    Network,
    compare,
    compare_all,
    flat,
    shapes,
    training_set,
    trajectory,
)


def plain_training(name: str, seed: int, steps: int) -> list[Tensor]:
    """Return the parameters before each step of a plain loop.

    It has one optimizer and measures nothing.
    """
    torch.manual_seed(seed)
    for _ in OPTIMIZERS:
        Network()  # as many random numbers as the study draws before it
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


@pytest.mark.parametrize("driver", OPTIMIZERS)
def test_the_trajectory_is_that_of_the_driver_alone(driver: str) -> None:
    for (_, at, _, _), expected in zip(trajectory(driver, 1, 8), plain_training(driver, 1, 8), strict=True):
        torch.testing.assert_close(at, expected, rtol=1e-12, atol=1e-14)


def test_all_optimizers_get_the_same_gradients_with_separate_moments() -> None:
    """Follow the update of AdamW from the gradients of SGD.

    SGD's update is the gradient of the batch, and AdamW's follows from all gradients by its formula.
    """
    layout, m, v = Layout(), torch.zeros(827, dtype=torch.float64), torch.zeros(827, dtype=torch.float64)
    for step, _, updates, second_moment in trajectory("Muon", 0, 6):
        gradient = updates["SGD"]
        m, v = 0.9 * m + 0.1 * gradient, 0.98 * v + 0.02 * gradient**2
        v_hat = v / (1 - 0.98**step)
        torch.testing.assert_close(second_moment, v_hat, rtol=1e-6, atol=1e-18)
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
    target = torch.ones(827, dtype=torch.float64)
    candidate = target.clone()
    candidate[layout.slices["output.weight"]] *= -2
    row = compare(candidate, target, layout)
    assert row["cosine_layer1"] == pytest.approx(1)
    assert row["cosine_layer2"] == pytest.approx(-1)
    assert (row["ratio_layer1"], row["ratio_layer2"]) == (pytest.approx(1), pytest.approx(2))
    first, second = 24 * 22, 11 * 24
    assert row["cosine_weights"] == pytest.approx(
        (first - 2 * second) / ((first + second) * (first + 4 * second)) ** 0.5
    )


def test_the_training_sets_are_sums_and_differ_by_seed() -> None:
    inputs, answers = training_set(0)
    assert inputs.shape == (96, 22)
    x, y = inputs[:, :11].argmax(1), inputs[:, 11:].argmax(1)
    assert torch.equal((x + y) % 11, answers)
    assert len({(int(a), int(b)) for a, b in zip(x, y, strict=True)}) == 96
    assert not torch.equal(inputs, training_set(1)[0])


@pytest.fixture(scope="module")
def compared() -> list[dict[str, Any]]:
    *_, (_, at, updates, second_moment) = trajectory("AdamW", 0, 20)
    return compare_all(at, updates, second_moment, training_set(0))


def test_every_candidate_is_compared_with_every_target(compared: list[dict[str, Any]]) -> None:
    names = {(row["kind"], row["candidate"]) for row in compared}
    assert {name for kind, name in names if kind == "step"} == set(OPTIMIZERS)
    assert len(compared) == len(names) * 2 * len(study.DAMPINGS)
    cosines = {(row["candidate"], row["damping"]): row["cosine_all"] for row in compared if row["target"] == "natural"}
    for row in compared:
        assert all(-1 - 1e-9 <= row[f"cosine_{scope}"] <= 1 + 1e-9 for scope in study.SCOPES)
    # Inverting the blocks of the Fisher alone gets nearer than any diagonal, and damping brings the gradient nearer.
    for factor in study.DAMPINGS:
        assert cosines["Fisher by layer", factor] > cosines["1/diagonal Fisher", factor]
    gradients = [cosines["gradient", factor] for factor in study.DAMPINGS]
    assert gradients == sorted(gradients)


def test_shapes_are_made_of_the_full_gradient() -> None:
    layout = Layout()
    generator = torch.Generator().manual_seed(0)
    gradient, v, d = (torch.rand(827, dtype=torch.float64, generator=generator) + 0.1 for _ in range(3))
    found = shapes(gradient, v, d, 0.5, layout)
    torch.testing.assert_close(found["Adam"], gradient / v.sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found["1/diagonal Fisher"], gradient / (d + 0.5))
    torch.testing.assert_close(found["1/sqrt(diagonal Fisher)"], gradient / d.sqrt(), rtol=1e-6, atol=0)
    for name in ("gradient", "Adam", "1/diagonal Fisher", "1/sqrt(diagonal Fisher)"):
        torch.testing.assert_close(found[f"orthogonal {name}"], layout.orthogonal(found[name]))


def test_only_the_blocks_of_layers_are_kept() -> None:
    layout = Layout()
    mask = layout.by_layer(torch.ones(827, 827)).bool()
    first = 24 * 22 + 24
    assert mask[:first, :first].all()
    assert mask[first:, first:].all()
    assert not mask[:first, first:].any()
