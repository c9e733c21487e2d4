"""Gradients of every kind are handled and left as they were found.

They may be absent in either pass or both, views into a buffer, or sparse.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from ars2 import ARS2Neo, Muon
from tests.ars2.problems import SmallProblem, problem_groups
from tests.ars2.reference import ReferenceARS2
from tests.ars2.training import (
    CORE_MODES,
    MODES,
    SHEAR_MODES,
    closure_of,
    copies,
    parameters_of,
    same,
    setup,
    step_by_parts,
    train,
    worst_difference,
)

GRADIENTS_BOUND = 8e-15  # absolute, in float64, over 30 steps; measured: 1.7e-15

# --- absent gradients ---


class Forgetful(SmallProblem):
    """Give some parameters no gradient on some evaluations.

    This happens to experts that no token was sent to.
    """

    evaluation = 0

    def loss(self, step: int) -> Tensor:
        self.evaluation += 1
        for name, p in self.named_parameters():
            index = sum(map(ord, name))
            p.requires_grad_((self.evaluation + index) % 3 != 0)
        return super().loss(step)


# Apart: a group for each parameter, so that some groups have no gradient at all.
@pytest.mark.parametrize(("mode", "apart"), [*((mode, False) for mode in MODES), ("sync", True), ("aga", True)])
def test_gradients_that_come_and_go_between_the_passes_follow_the_reference(mode: str, apart: bool) -> None:
    def absent(model: Forgetful, groups: list[dict], step: int) -> list[Tensor | None]:
        loss = model.loss(step)
        params = [p for group in groups for p in group["params"]]
        wanted = [p for p in params if p.requires_grad]
        found = dict(zip(wanted, torch.autograd.grad(loss, wanted), strict=True))
        return [found.get(p) for p in params]

    options = MODES[mode]
    if options["mode"] == "random":
        options = {"mode": "random", "probability": 0.0}  # only the first step syncs, in the reference too
    reference_model, model = Forgetful(torch.float64), Forgetful(torch.float64)
    groups = problem_groups(reference_model)
    reference = ReferenceARS2(groups, **options)
    groups_of_model = problem_groups(model)
    if apart:
        groups_of_model = [{**group, "params": [p]} for group in groups_of_model for p in group["params"]]
    optimizer = ARS2Neo(groups_of_model, ns_dtype="float64", **options)
    for step in range(30):
        reference.step(partial(absent, reference_model, groups, step))
        optimizer.step(closure_of(model, optimizer, step))
        assert worst_difference(model.parameters(), reference_model.parameters()) <= GRADIENTS_BOUND, step
    for p, m, v in zip(parameters_of(optimizer), reference.exp_avg, reference.exp_avg_sq, strict=True):
        state = optimizer.state[p]
        assert worst_difference([state["exp_avg"], state["exp_avg_sq"]], [m, v]) <= GRADIENTS_BOUND


@pytest.mark.parametrize("mode", CORE_MODES)
def test_a_parameter_without_a_gradient_is_not_changed(mode: str) -> None:
    used, unused = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    optimizer = ARS2Neo([used, unused], **MODES[mode])
    for _ in range(4):

        def closure() -> None:
            optimizer.zero_grad()
            used.square().sum().backward()

        optimizer.step(closure)
    assert torch.equal(unused, torch.ones(3, 4)) and not any(t.any() for t in optimizer.state[unused].values())
    assert used.grad is not None and unused.grad is None and not torch.equal(used, torch.ones(3, 4))


@pytest.mark.parametrize("mode", SHEAR_MODES)
def test_the_shear_force_is_kept_only_where_both_passes_gave_a_gradient(mode: str) -> None:
    both, first, second = (nn.Parameter(torch.linspace(0.1, 2, 12).reshape(3, 4)) for _ in range(3))
    optimizer = ARS2Neo([both, first, second], **MODES[mode])
    (both.pow(3).sum() + first.pow(3).sum()).backward()
    optimizer.wants_second_pass()
    optimizer.perturb()
    (both.pow(3).sum() + second.pow(3).sum()).backward()
    optimizer.restore()
    optimizer.step()
    assert [bool(optimizer.state[p]["shear"].any()) for p in (both, first, second)] == [True, False, False]


@pytest.mark.parametrize("mode", CORE_MODES)
def test_frozen_parameters_are_neither_moved_nor_updated(mode: str) -> None:
    model, optimizer = setup(mode)
    for p in (model.tall.weight, model.tall.bias):
        p.requires_grad_(False)
    before = copies([model.tall.weight, model.tall.bias])
    train(model, optimizer, range(4))
    assert same(before, [model.tall.weight, model.tall.bias])
    model.tall.requires_grad_(True)
    train(model, optimizer, range(4, 6))
    assert not same(before, [model.tall.weight, model.tall.bias])


# --- gradients as found ---


@pytest.mark.parametrize("mode", CORE_MODES)
def test_the_update_leaves_the_gradients_as_they_are(mode: str) -> None:
    model, optimizer = setup(mode)
    for step in range(7):
        found: dict[Tensor, tuple[Tensor | None, Tensor]] = {}

        def record(found: dict = found) -> None:
            found.update({p: (p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None})

        step_by_parts(model, optimizer, step, between=record)
        assert len(found) == 8
        assert all(p.grad is g and torch.equal(g, values) for p, (g, values) in found.items())


def test_views_into_a_bucket_of_gradients_do_not_lose_the_first_gradient() -> None:
    model, optimizer = setup("sync")
    plain, plain_optimizer = setup("sync")
    params = list(model.parameters())
    bucket = torch.zeros(sum(p.numel() for p in params))

    def backward_into_bucket(step: int) -> None:
        # As with data parallelism: one buffer, written over by every backward pass, the gradients being its views.
        bucket.copy_(torch.cat([g.flatten() for g in torch.autograd.grad(model.loss(step), params)]))
        for p, part in zip(params, bucket.split([p.numel() for p in params]), strict=True):
            p.grad = part.view(p.shape)

    for step in range(4):
        backward_into_bucket(step)
        assert optimizer.wants_second_pass()
        optimizer.perturb()
        first = {p: g.clone() for p, g in optimizer.first_gradients.items()}
        backward_into_bucket(step)
        optimizer.restore()
        assert all(torch.equal(first[p], optimizer.first_gradients[p]) for p in params)
        optimizer.step()
        step_by_parts(plain, plain_optimizer, step)
    assert same(model.parameters(), plain.parameters())


# --- unsupported parameters and gradients ---


@pytest.mark.parametrize("cls", [ARS2Neo, Muon])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.ones(2, 2, dtype=torch.complex64), "parameter layer.weight is complex .*view_as_real"),
        (lambda: torch.ones(2, 2).to_sparse(), "parameter layer.weight is sparse"),
        (lambda: torch.ones(2, 2, dtype=torch.int64), "parameter layer.weight must be of a floating-point dtype"),
    ],
)
def test_an_unsupported_parameter_is_named(cls: type, make: Callable[[], Tensor], message: str) -> None:
    good = nn.Parameter(torch.ones(2, 2))
    bad = make().requires_grad_(make().is_floating_point() or make().is_complex())
    with pytest.raises(ValueError, match=message):
        cls([("good", good), ("layer.weight", bad)])
    optimizer = cls([("good", good)])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [("layer.weight", bad)]})
    assert len(optimizer.param_groups) == 1 and list(optimizer.state) == [good]


@pytest.mark.parametrize("cls", [ARS2Neo, Muon])
def test_a_vector_on_the_matrix_track_is_an_error(cls: type) -> None:
    optimizer = cls([nn.Parameter(torch.ones(2, 2))])
    bad = {"params": [("layer.weight", nn.Parameter(torch.ones(3)))], "track": "matrix"}
    message = r"parameter layer.weight of shape \(3,\) is on the matrix track.*track=\"vector\""
    with pytest.raises(ValueError, match=message):
        cls([bad])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(bad)
    assert len(optimizer.param_groups) == len(optimizer.state) == 1


@pytest.mark.parametrize("cls", [ARS2Neo, Muon])
def test_a_parameter_that_is_no_tensor_is_named(cls: type) -> None:
    with pytest.raises(TypeError, match="parameter 1 must be a tensor, got int"):
        cls([nn.Parameter(torch.ones(2, 2)), 3])


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("optimizer_of", [partial(ARS2Neo, mode=m) for m in ("base", "sync", "aga")] + [Muon])
def test_a_sparse_gradient_is_named_before_anything_changes(optimizer_of: Callable, named: bool) -> None:
    first, table = nn.Parameter(torch.ones(3, 3)), nn.Embedding(4, 3, sparse=True)
    second = ("table", table.weight) if named else table.weight
    optimizer = optimizer_of([{"params": [("first", first)] if named else [first]}, {"params": [second]}])
    before = copies([first, table.weight])

    def closure() -> None:
        optimizer.zero_grad()
        (first.sum() + table(torch.tensor([1])).sum()).backward()

    with pytest.raises(RuntimeError, match=f"parameter {'table' if named else 0} .*sparse=False"):
        optimizer.step(closure)
    assert same(before, [first, table.weight])
    assert [group["step"] for group in optimizer.param_groups] == [0, 0]
    assert not any(t.any() for state in optimizer.state.values() for t in state.values())
