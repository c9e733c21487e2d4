"""Switch flatness, geometry and energy on and off in every combination.

Every corner is compared with the float64 reference, and some with other optimizers.
"""

import math
from copy import deepcopy
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ars2 import ARS2Neo, Muon
from tests.ars2.problems import SmallProblem, gradients, problem_groups, split_by_track
from tests.ars2.reference import ReferenceARS2
from tests.ars2.training import (
    assert_identical,
    closure_of,
    setup,
    snapshot,
    step_by_parts,
    through_a_file,
    train,
    worst_difference,
)

STEPS = 30
# Each bound is at most five times the worst absolute difference that was measured in any corner it is for.
BOUNDS = {torch.float64: 6e-15, torch.float32: 8e-6}  # measured: 1.3e-15, 2.2e-6
# Adam's direction fills up the small singular values of the momentum, which Newton-Schulz multiplies, rounding too.
BOUNDS_OF_GEOMETRY_ALONE = {torch.float64: 1e-13, torch.float32: 9e-5}  # measured: 2.3e-14, 1.8e-5
ENERGIES = (True, False, "whitening", "scalar")
SWITCHES = [pytest.param(e, g, id=f"energy={e}, geometry={g}") for e, g in product(ENERGIES, (True, False))]
# test_ars2_neo.py has the corner with both.
CORNERS = [
    pytest.param(mode, energy, geometry, id=f"{mode}, energy={energy}, geometry={geometry}")
    for mode, energy, geometry in product(("base", "aga"), ENERGIES, (True, False))
    if not (energy is True and geometry) and (mode == "base" or energy in (True, False))
]


def bound(energy: bool | str, geometry: bool, dtype: torch.dtype) -> float:
    return (BOUNDS_OF_GEOMETRY_ALONE if geometry and energy in (False, "scalar") else BOUNDS)[dtype]


def largest_difference(
    mode: str, energy: bool | str, geometry: bool, dtype: torch.dtype, ns_dtype: str, matrix: dict[str, Any]
) -> float:
    """Return the largest difference of a parameter from the reference's.

    It is taken over all steps.
    """
    options: dict[str, Any] = {"mode": mode, "energy": energy, "geometry": geometry, "k": 6 if mode == "aga" else 0}
    reference_model, model = SmallProblem(torch.float64), SmallProblem(dtype)
    groups = problem_groups(reference_model, matrix)
    reference = ReferenceARS2(groups, **options)
    optimizer = ARS2Neo(problem_groups(model, matrix), ns_dtype=ns_dtype, **options)
    worst = 0.0
    for step in range(STEPS):
        reference.step(partial(gradients, reference_model, groups, step))
        before = optimizer.diagnostics()["sync_steps"]
        optimizer.step(closure_of(model, optimizer, step))
        assert (optimizer.diagnostics()["sync_steps"] > before) == reference.history[-1]["synced"]
        worst = max(worst, worst_difference(model.parameters(), reference_model.parameters()))
    return worst


@pytest.mark.parametrize(("mode", "energy", "geometry"), CORNERS)
def test_float64_follows_the_reference(mode: str, energy: bool | str, geometry: bool) -> None:
    worst = largest_difference(mode, energy, geometry, torch.float64, "float64", {})
    assert worst <= bound(energy, geometry, torch.float64)


@pytest.mark.parametrize(("energy", "geometry"), SWITCHES)
def test_float64_follows_the_reference_where_eps_matters_and_stacks_are_flattened(
    energy: bool | str, geometry: bool
) -> None:
    matrix = {"eps": 1e-2, "flatten": True}
    worst = largest_difference("sync", energy, geometry, torch.float64, "float64", matrix)
    assert worst <= bound(energy, geometry, torch.float64)


@pytest.mark.parametrize(("energy", "geometry"), SWITCHES[:4])
def test_float32_follows_the_reference(energy: bool | str, geometry: bool) -> None:
    worst = largest_difference("aga", energy, geometry, torch.float32, "float32", {})
    assert worst <= bound(energy, geometry, torch.float32)


@pytest.mark.parametrize("mode", ["base", "sync"])
def test_the_corners_differ(mode: str) -> None:
    # The tests above would also pass if a switch were ignored on both sides.
    ends = []
    for energy, geometry in product(ENERGIES, (True, False)):
        model, optimizer = setup(mode, energy=energy, geometry=geometry)
        train(model, optimizer, range(3))
        ends.append([p.clone() for p in split_by_track(model)["matrix"]])
    for index, end in enumerate(ends):
        for other in ends[:index]:
            assert all((a - b).abs().max() > 1e-4 for a, b in zip(end, other, strict=True))


def adamw_of(model: nn.Module) -> torch.optim.AdamW:
    names = ("lr", "betas", "eps", "weight_decay", "params")
    return torch.optim.AdamW([{name: group[name] for name in names} for group in problem_groups(model)])


def test_without_flatness_and_geometry_it_equals_adamw() -> None:
    model, optimizer = setup("base", torch.float64, geometry=False)
    other = SmallProblem(torch.float64)
    adamw = adamw_of(other)
    for step in range(STEPS):
        optimizer.step(closure_of(model, optimizer, step))
        adamw.step(closure_of(other, adamw, step))
    assert worst_difference(model.parameters(), other.parameters()) <= 2e-15  # measured: 4e-16


def test_without_geometry_matrices_are_updated_like_vectors_to_the_bit() -> None:
    model, optimizer = setup("aga", geometry=False)
    other = SmallProblem()
    groups = [{**group, "track": "vector"} for group in problem_groups(other)]
    vectors = ARS2Neo(groups, mode="aga", k=6)
    for step in range(20):
        assert step_by_parts(model, optimizer, step) == step_by_parts(other, vectors, step)
    assert_identical([*model.parameters()], [*other.parameters()])


def test_without_geometry_sync_equals_sam_on_adamw() -> None:
    model, optimizer = setup("sync", torch.float64, geometry=False)
    other = SmallProblem(torch.float64)
    adamw = adamw_of(other)
    radii = [group["rho"] for group in problem_groups(other)]
    for step in range(STEPS):
        optimizer.step(closure_of(model, optimizer, step))
        closure_of(other, adamw, step)()
        start = [p.detach().clone() for p in other.parameters()]
        with torch.no_grad():
            for group, radius in zip(adamw.param_groups, radii, strict=True):
                for p in group["params"]:
                    state, metric = adamw.state[p], group["eps"]
                    if state:
                        correction = 1 - group["betas"][1] ** step
                        metric = (state["exp_avg_sq"] / correction).sqrt() + group["eps"]
                    direction = p.grad / metric * p.abs()
                    p += radius * direction / direction.norm().clamp_min(1e-30)
        closure_of(other, adamw, step)()
        with torch.no_grad():
            for p, before in zip(other.parameters(), start, strict=True):
                p.copy_(before)
        adamw.step()
    assert worst_difference(model.parameters(), other.parameters()) <= 6e-15  # measured: 1.2e-15


def test_without_energy_geometry_alone_equals_muon_at_another_scale() -> None:
    model, optimizer = setup("base", torch.float64, "float64", energy=False)
    other = SmallProblem(torch.float64)
    groups = []
    for group in problem_groups(other):
        for p in group["params"]:
            options = {**group, "params": [p], "momentum": 0.9}
            if group["track"] == "matrix":
                rows, columns = p.shape[-2:] if p.ndim == 3 else (p.shape[0], p[0].numel())
                scale = math.sqrt(p.numel() / max(1.0, rows / columns))
                options |= {"lr": group["lr"] * scale, "weight_decay": group["weight_decay"] / scale}
            groups.append(options)
    muon = Muon(groups, nesterov=False, ns_dtype="float64")
    for step in range(STEPS):
        optimizer.step(closure_of(model, optimizer, step))
        closure_of(other, muon, step)()
        muon.step()
    assert worst_difference(model.parameters(), other.parameters()) <= 1e-7  # measured: 2.3e-8, that same 1e-7


@pytest.mark.parametrize("mode", ["base", "sync", "aga"])
def test_without_both_a_matrix_moves_by_its_momentum_at_root_mean_square_one(mode: str) -> None:
    lr = 1e-2
    param = nn.Parameter(torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    optimizer = ARS2Neo([param], lr=lr, weight_decay=0.0, mode=mode, energy=False, geometry=False)

    def closure() -> None:
        optimizer.zero_grad()
        param.pow(4).sum().backward()

    for _ in range(5):
        before = param.detach().clone()
        optimizer.step(closure)
        moved, momentum = before - param.detach(), optimizer.state[param]["exp_avg"]
        assert moved.square().mean().sqrt().item() == pytest.approx(lr, rel=1e-12)
        assert torch.nn.functional.cosine_similarity(moved.flatten(), momentum.flatten(), dim=0).item() > 1 - 1e-12


@pytest.mark.parametrize(("mode", "geometry"), [("base", True), ("aga", False)])
def test_without_energy_no_second_moment_is_kept_of_matrices(mode: str, geometry: bool) -> None:
    model, optimizer = setup(mode, energy=False, geometry=geometry)
    train(model, optimizer, range(3))
    shear = {"shear"} if mode == "aga" else set()
    for param, state in optimizer.state.items():
        assert set(state) == {"exp_avg"} | shear | ({"exp_avg_sq", "step"} if param.ndim < 2 else set())


@pytest.mark.parametrize(("mode", "geometry"), [("sync", True), ("base", False)])
def test_without_energy_the_scale_of_the_loss_does_not_matter(mode: str, geometry: bool) -> None:
    def end(factor: float) -> Tensor:
        param = nn.Parameter(torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
        optimizer = ARS2Neo([param], mode=mode, energy=False, geometry=geometry, ns_dtype="float64")
        for _ in range(5):

            def closure() -> None:
                optimizer.zero_grad()
                (factor * param.pow(4).sum()).backward()

            optimizer.step(closure)
        return param.detach()

    assert worst_difference([end(1.0)], [end(1024.0)]) <= 1e-11


@pytest.mark.parametrize(("energy", "geometry"), SWITCHES)
def test_a_matrix_without_any_gradient_so_far_stays(energy: bool | str, geometry: bool) -> None:
    param = nn.Parameter(torch.ones(3, 4))
    optimizer = ARS2Neo([param], mode="sync", weight_decay=0.0, energy=energy, geometry=geometry)

    def closure() -> None:
        optimizer.zero_grad()
        (0.0 * param).sum().backward()

    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(param, torch.ones(3, 4))


@pytest.mark.parametrize(("energy", "geometry"), SWITCHES)
def test_a_saved_state_resumes_to_the_bit(energy: bool | str, geometry: bool) -> None:
    mode = "aga"
    model, optimizer = setup(mode, energy=energy, geometry=geometry)
    train(model, optimizer, range(7))
    other, other_optimizer = setup(mode, energy=energy, geometry=geometry)
    other.load_state_dict(through_a_file(model.state_dict()))
    other_optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    train(model, optimizer, range(7, 14))
    train(other, other_optimizer, range(7, 14))
    assert_identical(snapshot(optimizer), snapshot(other_optimizer))


@pytest.mark.parametrize("switch", ["energy", "geometry"])
def test_a_saved_state_with_another_switch_is_refused_with_nothing_changed(switch: str) -> None:
    saved = deepcopy(setup("sync", **{switch: False})[1].state_dict())
    model, optimizer = setup("sync")
    train(model, optimizer, range(2))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"group 0: {switch} is False there and True in this optimizer"):
        optimizer.load_state_dict(saved)
    assert_identical(before, snapshot(optimizer))


@pytest.mark.parametrize("switch", ["energy", "geometry"])
def test_all_groups_share_a_switch(switch: str) -> None:
    groups = problem_groups(SmallProblem())
    groups[1][switch] = False
    with pytest.raises(ValueError, match=f"{switch} .*groups"):
        ARS2Neo(groups)


@pytest.mark.parametrize(
    ("dtype", "energy", "geometry"),
    [(torch.bfloat16, True, False), (torch.bfloat16, False, True), (torch.float16, False, False)],
)
def test_parameters_in_half_precision_are_updated_from_float32_state(
    dtype: torch.dtype, energy: bool | str, geometry: bool
) -> None:
    param = nn.Parameter(torch.ones(3, 4, dtype=dtype))
    optimizer = ARS2Neo([param], lr=0.1, mode="sync", energy=energy, geometry=geometry)
    optimizer.step(lambda: param.square().sum().backward())
    assert {t.dtype for t in optimizer.state[param].values()} == {torch.float32}
    assert param.dtype == dtype and (param < 0.95).all()
