"""Check the pure functions of flatness, and the decisions, by hand.

These are the adversarial point, the shear force and its injection.
"""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ars2 import ARS2Neo, flatness, schedule
from tests.ars2.problems import SmallProblem, problem_groups
from tests.ars2.training import MODES, copies, same, setup, step_by_parts, train


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- the adversarial point ---


def move_to_adversarial_point(param: Tensor, grad: Tensor, denominator: Tensor) -> None:
    offsets = flatness.adversarial_offsets([param], [grad], [denominator])
    flatness.move_along_([param], offsets, flatness.offset_sums(offsets)[0], 0.5)


def test_the_move_has_length_rho_along_gradient_over_root_times_magnitude() -> None:
    param, start = double(0.1, -2.0, 0.0), double(0.1, -2.0, 0.0)
    move_to_adversarial_point(param, double(3.0, 4.0, 5.0), double(1.0, 2.0, 1.0))
    n = double(0.3, 4.0, 0.0)
    torch.testing.assert_close(param, start + 0.5 * n / n.norm(), rtol=0, atol=1e-12)


def test_a_zero_gradient_does_not_move() -> None:
    param = double(0.1, -2.0)
    move_to_adversarial_point(param, double(0.0, 0.0), double(1e-8, 1e-8))
    assert torch.equal(param, double(0.1, -2.0))


def test_every_tensor_moves_by_the_rho_of_its_group() -> None:
    model, optimizer = setup("sync", torch.float64, "float64")
    train(model, optimizer, range(3))
    before = {p: p.detach().clone() for p in model.parameters()}
    optimizer.zero_grad()
    model.loss(3).backward()
    optimizer.wants_second_pass()
    optimizer.perturb()
    for group, rho in zip(optimizer.param_groups, (0.1, 0.05), strict=True):
        for p in group["params"]:
            assert (p - before[p]).norm().item() == pytest.approx(rho, rel=1e-9)
    optimizer.restore()


def test_a_relative_move_is_a_fraction_of_the_norm_in_half_precision_too() -> None:
    param = nn.Parameter(torch.linspace(-3, 4, 35).view(5, 7).to(torch.bfloat16))
    optimizer = ARS2Neo([param], mode="sync", rho=1 / 3, relative_rho=True, energy=False)
    param.grad = torch.ones_like(param)
    start = param.detach().clone()
    optimizer.wants_second_pass()
    optimizer.perturb()
    expected = start.float() + start.float().abs() / 3  # n = |p| is as long as p
    assert torch.equal(param, expected.to(torch.bfloat16))
    optimizer.restore()


# --- the shear force ---


def test_the_shear_force_is_orthogonal_to_the_first_gradient_and_completes_it() -> None:
    generator = torch.Generator().manual_seed(0)
    first = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in [(4, 5), (3,), (2, 3, 4)]]
    second = [torch.randn(g.shape, dtype=torch.float64, generator=generator) for g in first]
    shears = flatness.shear_forces(second, first, flatness.shear_sums(second, first))
    for g, g_adversarial, s in zip(first, second, shears, strict=True):
        assert abs((g * s).sum()) <= 1e-11
        rest = g_adversarial - s
        torch.testing.assert_close(rest / g, torch.full_like(g, (rest / g).flatten()[0].item()), rtol=1e-9, atol=0)


def test_the_shear_force_of_a_zero_gradient_is_the_second_gradient() -> None:
    second, first = [double(1.0, 2.0)], [double(0.0, 0.0)]
    (shear,) = flatness.shear_forces(second, first, flatness.shear_sums(second, first))
    assert torch.equal(shear, double(1.0, 2.0))


@pytest.mark.parametrize(
    ("mode", "energy", "scale"),
    [("base", True, 2.0**-20), ("sync", False, 2.0**-40), ("aga", True, 2.0**-40), ("aga", False, 2.0**20)],
)
def test_the_scale_of_the_loss_changes_nothing_if_eps_is_scaled_alike(mode: str, energy: bool, scale: float) -> None:
    # Powers of two, so that scaling itself rounds nothing.
    def run(scale: float) -> tuple[list[dict[str, float]], list[Tensor]]:
        model, eps = SmallProblem(), {"eps": 2.0**-24 * scale}
        optimizer = ARS2Neo(problem_groups(model, eps, eps), energy=energy, ns_dtype="float32", **MODES[mode])
        seen = []
        for step in range(14):
            step_of_scaled_loss(model, optimizer, step, scale)
            seen.append(optimizer.diagnostics())
        return seen, copies(model.parameters())

    (seen, params), (seen_scaled, params_scaled) = run(1.0), run(scale)
    assert seen == seen_scaled and same(params, params_scaled)
    assert mode != "aga" or 1 < seen[-1]["sync_steps"] < 14


def step_of_scaled_loss(model: SmallProblem, optimizer: ARS2Neo, step: int, scale: float) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(step) * scale
        loss.backward()
        return loss

    optimizer.step(closure)


def phi(grads: list[Tensor], shears: list[Tensor]) -> float:
    return flatness.global_cosine(flatness.cosine_sums(grads, shears))


def test_zeros_and_non_finite_gradients_show_in_phi() -> None:
    one, nan = [double(1.0)], [double(math.nan)]
    assert phi([double(0.0)], one) == 0.0
    assert math.isnan(phi(nan, one))
    assert math.isnan(phi([double(math.inf)], one))


def test_injection_adds_alpha_times_the_gradients_length_along_the_shear() -> None:
    grads, shears = [double(3.0, 4.0), double(1.0, 1.0)], [double(0.0, 2.0), double(0.0, 0.0)]
    injected = flatness.with_shears(grads, shears, flatness.injection_sums(grads, shears), 0.1)
    torch.testing.assert_close(injected[0], double(3.0, 4.5), rtol=0, atol=1e-11)
    assert torch.equal(injected[1], double(1.0, 1.0))
    assert torch.equal(grads[0], double(3.0, 4.0)), "the given gradient was changed"


def test_phi_is_one_cosine_over_all_tensors_with_a_shear_force() -> None:
    grads = [double(3.0, 4.0), double(1.0), double(7.0)]
    shears = [double(0.0, 2.0), double(-1.0), double(0.0)]
    # The tensor without a shear force counts on neither side.
    expected = (8.0 - 1.0) / (math.sqrt(25.0 + 1.0) * math.sqrt(4.0 + 1.0))
    assert phi(grads, shears) == pytest.approx(expected, rel=1e-12)
    assert phi([double(5.0)], [double(0.0)]) == 0.0


# --- decisions ---


def group(**options: Any) -> dict[str, Any]:
    return {"k": 0, "last_sync": 0, "phi_variance": 0.0, "phi_beta": 0.75, "phi_lambda": 0.5, **options}


def test_base_never_makes_a_second_pass_and_sync_always() -> None:
    assert not any(schedule.is_sync_step(group(mode="base"), t, -1.0, 0.0) for t in range(1, 50))
    assert all(schedule.is_sync_step(group(mode="sync"), t, 1.0, 0.0) for t in range(1, 50))


@pytest.mark.parametrize(("k", "expected"), [(1, [1, 2, 3, 4, 5, 6, 7]), (2, [1, 3, 5, 7]), (3, [1, 4, 7]), (9, [1])])
def test_periodic_makes_a_second_pass_every_k_steps(k: int, expected: list[int]) -> None:
    syncs = [t for t in range(1, 8) if schedule.is_sync_step(group(mode="periodic", k=k), t, 0.0, 0.0)]
    assert syncs == expected
    model = SmallProblem()
    optimizer = ARS2Neo(problem_groups(model), mode="periodic", k=k)
    assert [t for t in range(1, 8) if step_by_parts(model, optimizer, t - 1)] == expected


def test_aga_makes_a_second_pass_first_when_phi_drops_and_after_k_steps() -> None:
    def syncs(t: int, phi: float, variance: float, **options: Any) -> bool:
        return schedule.is_sync_step(group(mode="aga", **options), t, phi, variance)

    assert syncs(1, 0.0, 0.0)
    assert syncs(5, -0.51, 1.0) and not syncs(5, -0.5, 1.0) and not syncs(5, 0.9, 1.0)
    assert not syncs(5, 0.0, 1.0, k=4, last_sync=2) and syncs(6, 0.0, 1.0, k=4, last_sync=2)
    # k up to 1 sets no longest stretch.
    assert not syncs(99, 0.0, 1.0, k=0, last_sync=2) and not syncs(99, 0.0, 1.0, k=1, last_sync=2)


def test_the_variance_starts_at_step_one_and_skips_the_step_after_a_sync() -> None:
    assert schedule.next_variance(group(phi_variance=9.0), 0.5, 1) == 0.25
    assert schedule.next_variance(group(phi_variance=1.0, last_sync=4), 0.5, 5) == 1.0
    assert schedule.next_variance(group(phi_variance=1.0, last_sync=4), 0.5, 6) == 0.75 + 0.25 * 0.25


def draws(seed: int, probability: float = 0.3, steps: int = 4000) -> list[bool]:
    options = group(mode="random", seed=seed, probability=probability)
    return [schedule.is_sync_step(options, t, 0.0, 0.0) for t in range(1, steps + 1)]


def test_random_syncs_at_the_first_step_whatever_the_probability() -> None:
    for seed in range(5):
        assert draws(seed, 0.0, 50) == [True] + [False] * 49
    assert all(draws(0, 1.0, 50))


@pytest.mark.parametrize("probability", [0.05, 0.9])
def test_random_syncs_about_as_often_as_its_probability(probability: float) -> None:
    for seed in range(2):
        drawn = draws(seed, probability)[1:]
        deviation = math.sqrt(probability * (1 - probability) / len(drawn))
        assert abs(sum(drawn) / len(drawn) - probability) < 4 * deviation
        # Neighbouring steps are drawn independently.
        both = sum(a and b for a, b in pairwise(drawn)) / len(drawn)
        assert abs(both - probability**2) < 0.03


def test_random_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


def test_random_decisions_depend_on_seed_and_step_only() -> None:
    def syncs(seed: int) -> list[bool]:
        model, optimizer = setup("random", seed=seed)
        torch.rand(seed)  # the global generator does not matter
        return [step_by_parts(model, optimizer, step) for step in range(30)]

    assert syncs(3) == draws(3, 0.3, 30) == syncs(3)
    assert syncs(4) == draws(4, 0.3, 30) != syncs(3)


def test_the_global_generator_is_not_used() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    model, optimizer = setup("random")
    train(model, optimizer, range(5))
    # SmallProblem draws its default initialisation from it; the optimizer must not draw from it on top.
    torch.manual_seed(7)
    train(model, optimizer, range(5, 10))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("mode", ["periodic", "random", "aga"])
def test_without_injection_a_one_pass_step_equals_that_of_base(mode: str) -> None:
    options = {"periodic": {"k": 100}, "random": {"probability": 0.0}, "aga": {"phi_lambda": 1e6, "k": 0}}[mode]
    param, plain = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    optimizer = ARS2Neo([param], mode=mode, alpha=0.0, rho=0.0, **options)  # rho 0: the pass changes nothing
    base = ARS2Neo([plain], mode="base")
    weights = torch.arange(12.0).reshape(3, 4)
    for step in range(6):

        def closure(param: nn.Parameter, optimizer: torch.optim.Optimizer, power: int = step % 3 + 1) -> Any:
            def evaluate() -> None:
                optimizer.zero_grad()
                (weights * param**power).sum().backward()

            return evaluate

        optimizer.step(closure(param, optimizer))
        base.step(closure(plain, base))
    assert torch.equal(param, plain) and optimizer.diagnostics()["sync_steps"] == 1
