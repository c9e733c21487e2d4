"""Parameters of every kind are trained correctly.

They may have other strides, 0 to 5 dimensions, no entries, half precision, or several names.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ars2 import ARS2Neo, Muon, param_groups
from tests.ars2.problems import SmallProblem, problem_groups
from tests.ars2.reference import ReferenceARS2
from tests.ars2.training import (
    CORE_MODES,
    MODES,
    copies,
    parameters_of,
    same,
    setup,
    train,
    worst_difference,
)

# --- shapes and layouts ---


@pytest.mark.parametrize("mode", CORE_MODES)
def test_channels_last_is_the_same_and_stays_channels_last(mode: str) -> None:
    model, optimizer = setup(mode, torch.float64, "float64")
    other = SmallProblem(torch.float64).to(memory_format=torch.channels_last)
    other_optimizer = ARS2Neo(problem_groups(other), ns_dtype="float64", **MODES[mode])
    train(model, optimizer, range(10))
    train(other, other_optimizer, range(10))
    weight = other.convolution.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert worst_difference(model.parameters(), other.parameters()) <= 5e-15  # measured: 1.2e-15


@pytest.mark.parametrize(
    ("shape", "as_matrix", "flatten"),
    [
        ((5, 8), (5, 8), False),
        ((4, 3, 3), (4, 9), True),  # a 1-D convolution
        ((4, 3, 2, 2), (4, 12), False),
        ((4, 3, 2, 2, 2), (4, 24), False),
        ((1, 1), (1, 1), False),
    ],
)
@pytest.mark.parametrize(("cls", "options"), [(ARS2Neo, {"mode": "sync"}), (Muon, {})])
def test_other_dimensions_are_read_as_a_matrix(
    cls: type, options: dict[str, Any], shape: tuple[int, ...], as_matrix: tuple[int, int], flatten: bool
) -> None:
    start = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    param, matrix = nn.Parameter(start.clone()), nn.Parameter(start.reshape(as_matrix).clone())
    optimizer = cls([{"params": [param], "flatten": flatten}], ns_dtype="float64", **options)
    plain = cls([matrix], ns_dtype="float64", **options)
    for _ in range(3):
        optimizer.step(lambda: (optimizer.zero_grad(), param.cos().sum().backward()))
        plain.step(lambda: (plain.zero_grad(), matrix.cos().sum().backward()))
    assert not torch.equal(param, start) and torch.equal(param.reshape(as_matrix), matrix)


@pytest.mark.parametrize("mode", CORE_MODES)
def test_a_convolution_in_one_dimension_is_flattened_by_its_groups(mode: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).double()
    same_network = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).double()
    same_network.load_state_dict(network.state_dict())
    x = torch.randn(5, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    groups = param_groups(network, vector={"weight_decay": 0.01})
    optimizer = ARS2Neo(groups, ns_dtype="float64", **{**MODES[mode], "probability": 0.0})
    by_name = dict(same_network.named_parameters())
    plain = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "rho": 0.1}
    reference_groups = [{**plain, **g, "params": [by_name[name] for name, _ in g["params"]]} for g in groups]
    options = {name: value for name, value in MODES[mode].items() if name != "seed"}
    reference = ReferenceARS2(reference_groups, **{**options, "probability": 0.0})
    flat = [p for g in reference_groups for p in g["params"]]
    for _ in range(10):

        def closure() -> None:
            optimizer.zero_grad()
            network(x).square().sum().backward()

        optimizer.step(closure)
        reference.step(lambda: list(torch.autograd.grad(same_network(x).square().sum(), flat)))
    assert worst_difference(network.parameters(), same_network.parameters()) <= 4e-15  # measured: 8.3e-16


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 6)])
def test_the_vector_track_takes_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    param, plain = nn.Parameter(torch.full(shape, 0.5)), nn.Parameter(torch.full(shape, 0.5))
    optimizer = ARS2Neo([{"params": [param], "track": "vector"}], mode="base", lr=0.01, weight_decay=0.1)
    adamw = torch.optim.AdamW([plain], lr=0.01, weight_decay=0.1)
    for _ in range(5):
        for p in (param, plain):
            p.grad = None
            p.cos().sum().backward()
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(param, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", CORE_MODES)
def test_a_scalar_is_updated_as_a_vector_of_one_entry(mode: str) -> None:
    scalar, vector = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor([0.5]))
    for param in (scalar, vector):
        # The shear force of one entry is zero but for rounding, which alpha makes visible.
        optimizer = ARS2Neo([{"params": [param], "track": "vector"}], lr=0.1, alpha=1e-6, **MODES[mode])
        for _ in range(4):

            def closure(param: nn.Parameter = param, optimizer: ARS2Neo = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = param.cos().sum()
                loss.backward()
                return loss

            optimizer.step(closure)
    torch.testing.assert_close(scalar, vector[0])
    assert scalar.item() != 0.5


@pytest.mark.parametrize("mode", CORE_MODES)
def test_empty_tensors_pass_through(mode: str) -> None:
    empty, full = nn.Parameter(torch.empty(0, 4)), nn.Parameter(torch.ones(3, 4))
    nothing = nn.Parameter(torch.empty(0))
    groups = [{"params": [empty, full]}, {"params": [nothing], "track": "vector"}]
    optimizer = ARS2Neo(groups, **MODES[mode])

    def closure() -> None:
        optimizer.zero_grad()
        (full.square().sum() + empty.sum() + nothing.sum()).backward()

    for _ in range(3):
        optimizer.step(closure)
    assert empty.shape == (0, 4) and full.max() < 1


@pytest.mark.parametrize("mode", CORE_MODES)
def test_a_group_may_be_empty(mode: str) -> None:
    param = nn.Parameter(torch.ones(3, 4))
    optimizer = ARS2Neo([{"params": []}, {"params": [param]}], **MODES[mode])

    def closure() -> None:
        optimizer.zero_grad()
        param.square().sum().backward()

    for _ in range(2):
        optimizer.step(closure)
    assert param.max() < 1


@pytest.mark.parametrize(
    ("mode", "dtype"), [("base", torch.float16), ("sync", torch.bfloat16), ("aga", torch.bfloat16)]
)
def test_half_precision_parameters_train_on_float32_moments(mode: str, dtype: torch.dtype) -> None:
    target = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    param, bias = nn.Parameter(torch.zeros(6, 5, dtype=dtype)), nn.Parameter(torch.zeros(5, dtype=dtype))
    groups = [{"params": [param], "lr": 0.02}, {"params": [bias], "track": "vector", "lr": 0.02}]
    optimizer = ARS2Neo(groups, weight_decay=0.0, rho=0.05, **MODES[mode])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param.float() + bias.float() - target).square().mean()
        loss.backward()
        return loss

    before = closure().item()
    for _ in range(60):
        optimizer.step(closure)
    assert closure().item() < 0.1 * before and param.dtype == dtype


@pytest.mark.parametrize("mode", CORE_MODES)
def test_a_tied_weight_is_moved_and_updated_once(mode: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 5)
            self.head = nn.Linear(5, 7, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied()
    optimizer = ARS2Neo(param_groups(model), **MODES[mode])
    assert len(parameters_of(optimizer)) == 1
    tokens = torch.tensor([1, 4, 2])

    def backward() -> None:
        functional.cross_entropy(model.head(model.embedding(tokens)), tokens).backward()

    before = copies(model.parameters())
    backward()
    if optimizer.wants_second_pass():
        optimizer.perturb()
        assert (model.head.weight - before[0]).norm().item() == pytest.approx(0.1, rel=1e-5)
        backward()
        optimizer.restore()
        assert same(before, model.parameters())
    optimizer.step()
    assert model.head.weight is model.embedding.weight and not same(before, model.parameters())
