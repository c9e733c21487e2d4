"""Check the float64 reference against values by hand and against torch."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ars2.problems import SmallProblem, gradients, problem_groups
from tests.ars2.reference import JORDAN, Gradients, ReferenceARS2, polar_factor, reference_newton_schulz


def group(*params: Tensor, **options: Any) -> dict[str, Any]:
    plain = {"track": "vector", "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "rho": 0.1}
    return {"params": list(params), **plain, **options}


def script(*values: list[Any] | None) -> Callable[[], Gradients]:
    """Return a function that yields the given gradients of one parameter in turn.

    It ignores the value of the parameter.
    """
    remaining = iter(values)

    def gradient_function() -> Gradients:
        value = next(remaining)
        return [None if value is None else torch.tensor(value, dtype=torch.float64)]

    return gradient_function


def train(reference: ReferenceARS2, model: SmallProblem, groups: list[dict[str, Any]], steps: int) -> None:
    for step in range(steps):
        reference.step(partial(gradients, model, groups, step))


def quintic(x: float, steps: int = 5) -> float:
    a, b, c = JORDAN
    for _ in range(steps):
        x = a * x + b * x**3 + c * x**5
    return x


# --- orthogonalisation ---


@pytest.mark.parametrize("shape", [(6, 6), (4, 27), (40, 26), (1, 9), (9, 1)])
def test_newton_schulz_keeps_the_singular_vectors_and_moves_the_values_by_the_quintic(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    u, values, v_transposed = torch.linalg.svd(matrix, full_matrices=False)
    moved = torch.tensor([quintic(value / values.norm().item()) for value in values.tolist()], dtype=torch.float64)
    expected = u @ torch.diag(moved) @ v_transposed
    torch.testing.assert_close(reference_newton_schulz(matrix), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (4, 27), (40, 26), (7, 40)])
def test_newton_schulz_lands_in_the_band_around_the_polar_factor(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        matrix = torch.randn(shape, dtype=torch.float64, generator=generator)
        # In the basis of the polar factor the result is symmetric, with the singular values as its eigenvalues.
        result, polar = reference_newton_schulz(matrix), polar_factor(matrix)
        small = result @ polar.T if shape[0] <= shape[1] else polar.T @ result
        torch.testing.assert_close(small, small.T, rtol=0, atol=1e-10)
        eigenvalues = torch.linalg.eigvalsh(small)
        assert eigenvalues.min() > 0.68 and eigenvalues.max() < 1.2


def test_polar_factor_is_the_rotation_of_a_rotated_diagonal() -> None:
    rotation = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    stretch = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(polar_factor(rotation @ stretch), rotation, rtol=0, atol=1e-14)


# --- the update ---


def test_vector_track_is_torch_adamw() -> None:
    model, adamw_model = SmallProblem(torch.float64), SmallProblem(torch.float64)
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.3}
    groups = [group(*model.parameters(), **options)]
    adamw_groups = [group(*adamw_model.parameters())]
    reference = ReferenceARS2(groups, mode="base")
    adamw = torch.optim.AdamW(adamw_model.parameters(), **options)
    for step in range(20):
        reference.step(partial(gradients, model, groups, step))
        for p, g in zip(adamw_model.parameters(), gradients(adamw_model, adamw_groups, step), strict=True):
            p.grad = g
        adamw.step()
    for p, q in zip(model.parameters(), adamw_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)
    assert reference.history[-1]["t"] == 20 and not any(record["synced"] for record in reference.history)


def test_first_matrix_step_by_hand() -> None:
    # Bias correction makes u the sign of the gradient: diag(1, -1), of norm sqrt(2), so both singular values enter the
    # quintic as 1 / sqrt(2).
    p = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    reference = ReferenceARS2([group(p, track="matrix", lr=0.1, weight_decay=0.5, eps=1e-12)], mode="base")
    reference.step(script([[3.0, 0.0], [0.0, -4.0]]))
    move = 0.1 * math.sqrt(2) * quintic(1 / math.sqrt(2))
    expected = torch.tensor([[0.95 - move, 1.9], [2.85, 3.8 + move]], dtype=torch.float64)
    torch.testing.assert_close(p, expected, rtol=0, atol=1e-6)


def test_second_matrix_step_by_hand() -> None:
    p = torch.zeros(1, 2, dtype=torch.float64)
    reference = ReferenceARS2([group(p, track="matrix", betas=(0.5, 0.75))], mode="base")
    reference.step(script([[1.0, 1.0]]))
    before = p.clone()
    reference.step(script([[1.0, -2.0]]))
    # m = (0.75, -0.75), v = (0.4375, 1.1875), both divided by 1 - beta^2.
    m_hat = torch.tensor([[0.75, -0.75]], dtype=torch.float64) / 0.75
    v_hat = torch.tensor([[0.4375, 1.1875]], dtype=torch.float64) / 0.4375
    u = m_hat / v_hat.sqrt()
    # One row: its only singular value is 1 after normalisation, so |u| * O is u times the quintic at 1.
    torch.testing.assert_close(p - before, -0.1 * u * quintic(1.0), rtol=0, atol=1e-6)


def test_stack_has_one_energy_and_a_geometry_a_matrix() -> None:
    g = torch.zeros(2, 2, 3, dtype=torch.float64)
    g[0, 0, 0], g[1, 0, 0], g[1, 1, 1] = 5.0, 7.0, 7.0
    stack, flat = torch.zeros_like(g), torch.zeros_like(g)
    options = {"track": "matrix", "lr": 1.0, "eps": 1e-12}
    ReferenceARS2([group(stack, **options)], mode="base").step(lambda: [g])
    ReferenceARS2([group(flat, **options, flatten=True)], mode="base").step(lambda: [g])
    # u is 1 where the gradient is: the energy is sqrt(3) for both; matrix 0 has one singular value, matrix 1 has two.
    energy = math.sqrt(3)
    assert stack[0, 0, 0].item() == pytest.approx(-energy * quintic(1.0), abs=1e-6)
    assert stack[1, 0, 0].item() == pytest.approx(-energy * quintic(1 / math.sqrt(2)), abs=1e-6)
    assert stack[1, 1, 1].item() == pytest.approx(-energy * quintic(1 / math.sqrt(2)), abs=1e-6)
    # Read as (2, 6): rows (1, 0, ...) and (1, 0, 0, 0, 1, 0).
    rows = torch.tensor([[1.0, 0, 0, 0, 0, 0], [1.0, 0, 0, 0, 1.0, 0]], dtype=torch.float64)
    torch.testing.assert_close(flat.reshape(2, 6), -energy * reference_newton_schulz(rows), rtol=0, atol=1e-6)


# --- the second pass ---


def test_adversarial_point_by_hand_and_exact_return() -> None:
    p = torch.tensor([0.1, -2.0, 0.0], dtype=torch.float64)
    start, seen = p.clone(), []
    supply = script([3.0, 4.0, 5.0], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0])

    def gradient_function() -> Gradients:
        seen.append(p.clone())
        return supply()

    reference = ReferenceARS2([group(p, lr=0.0, rho=0.5, betas=(0.9, 0.75), eps=1.0)], mode="sync")
    reference.step(gradient_function)
    assert torch.equal(p, start) and torch.equal(seen[0], start)
    # First step: no second moment yet, so the direction is g * |p|, and eps cancels.
    n = torch.tensor([0.3, 8.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(seen[1], start + 0.5 * n / n.norm(), rtol=0, atol=1e-12)
    # Second step: the moment left by the first one, made of the second gradients (1, 2, 3), unbiased to their squares.
    # An eps as large as the moments, because only beside it does their scale (the bias correction) matter at all.
    reference.step(gradient_function)
    n = torch.tensor([0.1 / (1.0 + 1.0), 2.0 / (2.0 + 1.0), 0.0], dtype=torch.float64)
    torch.testing.assert_close(seen[3], start + 0.5 * n / n.norm(), rtol=0, atol=1e-12)
    assert torch.equal(p, start)


def test_return_survives_an_error_in_the_second_pass() -> None:
    p = torch.tensor([0.1, 0.7], dtype=torch.float64)
    start = p.clone()
    with pytest.raises(StopIteration):
        ReferenceARS2([group(p)], mode="sync").step(script([1.0, 2.0]))
    assert torch.equal(p, start)


def test_periodic_injects_the_shear_force() -> None:
    p = torch.ones(2, dtype=torch.float64)
    reference = ReferenceARS2([group(p, betas=(0.9, 0.99))], mode="periodic", k=2, alpha=0.25)
    reference.step(script([2.0, 0.0], [7.0, 3.0]))
    torch.testing.assert_close(reference.shear[0], torch.tensor([0.0, 3.0]).double(), rtol=0, atol=1e-9)
    reference.step(script([4.0, 3.0]))
    # |g| = 5, the shear's direction is (0, 1): the gradient becomes (4, 3 + 0.25 * 5).
    expected = 0.9 * 0.1 * torch.tensor([7.0, 3.0]) + 0.1 * torch.tensor([4.0, 4.25])
    torch.testing.assert_close(reference.exp_avg[0], expected.double(), rtol=0, atol=1e-6)
    reference.step(script([1.0, 0.0], [1.0, 1.0]))
    assert [record["synced"] for record in reference.history] == [True, False, True]


def test_aga_by_hand() -> None:
    p = torch.ones(2, dtype=torch.float64)
    reference = ReferenceARS2([group(p)], mode="aga", alpha=0.1, phi_beta=0.75, phi_lambda=0.5, phi_gamma=2.0)
    reference.step(script([1.0, 0.0], [0.0, 2.0]))  # the shear is (0, 2)
    reference.step(script([0.0, 3.0]))  # phi 1: alpha * 2^2; one step after the sync, so the variance stays
    reference.step(script([3.0, 4.0]))  # phi 0.8
    reference.step(script([1.0, 0.0]))  # phi 0
    reference.step(script([4.0, -3.0], [0.0, 1.0]))  # phi -0.6, below its threshold
    records = reference.history
    assert [record["synced"] for record in records] == [True, False, False, False, True]
    assert [record["phi"] for record in records] == pytest.approx([0.0, 1.0, 0.8, 0.0, -0.6], abs=1e-9)
    variances = [0.0, 0.0, 0.25 * 0.64, 0.75 * 0.16, 0.75 * 0.12 + 0.25 * 0.36]
    assert [record["variance"] for record in records] == pytest.approx(variances, abs=1e-9)
    assert [record["threshold"] for record in records] == pytest.approx([-0.5 * v**0.5 for v in variances], abs=1e-9)
    assert [record["alpha"] for record in records] == pytest.approx([0.1, 0.4, 0.324, 0.1, 0.1], abs=1e-9)


def test_aga_invariants_on_the_problem() -> None:
    model = SmallProblem(torch.float64)
    groups = problem_groups(model)
    # With these values phi asks for some of the second passes and k for others: see the last line.
    reference = ReferenceARS2(groups, mode="aga", k=6, phi_lambda=2.0)
    train(reference, model, groups, 80)
    last_sync, variance, reasons = 0, 0.0, set()
    for record in reference.history:
        t, phi = record["t"], record["phi"]
        if t > 1 and t - last_sync > 1:
            variance = 0.99 * variance + 0.01 * phi**2
        assert record["variance"] == pytest.approx(variance, rel=1e-12)
        assert record["threshold"] == pytest.approx(-2 * math.sqrt(variance), rel=1e-12)
        assert record["alpha"] == pytest.approx(0.1 * (1 + max(0.0, phi)) ** 2, rel=1e-12)
        reason = "start" if t == 1 else "phi" if phi < record["threshold"] else "k" if t - last_sync >= 6 else "none"
        reasons.add(reason)
        assert record["synced"] == (reason != "none") and -1 <= phi <= 1
        last_sync = t if record["synced"] else last_sync
    assert reasons == {"start", "phi", "k", "none"}


def test_random_syncs_at_step_one_and_when_drawn() -> None:
    model = SmallProblem(torch.float64)
    groups = problem_groups(model)
    reference = ReferenceARS2(groups, mode="random", draw=lambda t: t in (4, 5))
    train(reference, model, groups, 6)
    assert [record["t"] for record in reference.history if record["synced"]] == [1, 4, 5]
    assert {record["alpha"] for record in reference.history} == {0.1}


# --- absent gradients ---


def test_absent_first_gradient_is_not_moved_but_updated() -> None:
    p = torch.ones(2, dtype=torch.float64)
    seen: list[Tensor] = []
    supply = script(None, [1.0, 2.0])

    def gradient_function() -> Gradients:
        seen.append(p.clone())
        return supply()

    reference = ReferenceARS2([group(p)], mode="periodic", k=3)
    reference.step(gradient_function)
    assert torch.equal(seen[0], seen[1]) and not reference.shear[0].any()
    torch.testing.assert_close(p, torch.full((2,), 0.9, dtype=torch.float64), rtol=0, atol=1e-7)


def test_absent_updating_gradient_changes_nothing() -> None:
    p = torch.ones(2, dtype=torch.float64)
    reference = ReferenceARS2([group(p, weight_decay=0.5)], mode="periodic", k=2)
    reference.step(script([1.0, 0.0], [1.0, 1.0]))

    def everything() -> list[Tensor]:
        return [p.clone(), reference.exp_avg[0].clone(), reference.exp_avg_sq[0].clone(), reference.shear[0].clone()]

    before = everything()
    reference.step(script(None))  # one pass
    reference.step(script([1.0, 2.0], None))  # two passes
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert [record["synced"] for record in reference.history] == [True, False, True]
    assert reference.history[1]["phi"] == 0.0


# --- the problem ---


def test_problem_gives_every_parameter_a_gradient_and_is_the_same_in_both_precisions() -> None:
    double, single = SmallProblem(torch.float64), SmallProblem(torch.float32)
    for p, q in zip(double.parameters(), single.parameters(), strict=True):
        assert torch.equal(p, q.double())
    groups, single_groups = problem_groups(double), problem_groups(single)
    assert sum(len(group["params"]) for group in groups) == len(list(double.parameters())) == 8
    for step in range(3):
        for g, h in zip(gradients(double, groups, step), gradients(single, single_groups, step), strict=True):
            assert g is not None and h is not None and g.abs().max() > 1e-3
            torch.testing.assert_close(g, h.double(), rtol=1e-4, atol=1e-6)
    losses = [double.loss(step).item() for step in range(4)]
    assert losses[3] == losses[0] and len(set(losses)) == 3


@pytest.mark.parametrize("mode", ["base", "sync", "aga"])
def test_every_mode_lowers_the_loss_of_the_problem(mode: str) -> None:
    model = SmallProblem(torch.float64)
    groups = problem_groups(model)
    before = sum(model.loss(step).item() for step in range(3))
    train(ReferenceARS2(groups, mode=mode, k=4), model, groups, 60)
    assert sum(model.loss(step).item() for step in range(3)) < 0.7 * before
