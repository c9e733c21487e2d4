"""Parameters without a track get one by their shapes.

The user's groups stay unchanged.
"""

import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from ars2 import ARS2Neo, Muon

pytestmark = pytest.mark.parametrize("cls", [ARS2Neo, Muon])


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def tracks(optimizer: Any) -> list[tuple[str, int]]:
    return [(group["track"], len(group["params"])) for group in optimizer.param_groups]


def train(optimizer: Any, model: nn.Module) -> None:
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        optimizer.step(lambda: (optimizer.zero_grad(), model(inputs).square().sum().backward()))


@pytest.mark.parametrize("named", [False, True])
def test_shapes_decide_where_no_track_is_given(cls: Any, named: bool) -> None:
    model = network()
    with pytest.warns(UserWarning, match=f"{cls.__name__} .*without a track") as caught:
        optimizer = cls(model.named_parameters() if named else model.parameters(), lr=0.01)
    assert len(caught) == 1 and tracks(optimizer) == [("matrix", 2), ("vector", 4)]
    assert all(p.ndim == (2 if g["track"] == "matrix" else 1) for g in optimizer.param_groups for p in g["params"])
    assert all(len(group["param_names"]) == len(group["params"]) for group in optimizer.param_groups if named)
    train(optimizer, model)


def test_a_very_long_matrix_is_a_vector_as_under_policy_all(cls: Any) -> None:
    with pytest.warns(UserWarning, match="without a track"):
        optimizer = cls([nn.Parameter(torch.zeros(10_000, 2)), nn.Parameter(torch.zeros(9_999, 2))])
    assert tracks(optimizer) == [("matrix", 1), ("vector", 1)]


def test_only_a_mixed_group_is_split(cls: Any) -> None:
    params = list(network().parameters())
    decay, rest = [p for p in params if p.ndim > 1], [p for p in params if p.ndim < 2]
    with pytest.warns(UserWarning) as caught:
        optimizer = cls([{"params": decay}, {"params": rest, "weight_decay": 0.0, "lr": 0.5}])
        optimizer.add_param_group({"params": nn.Linear(2, 2).parameters(), "lr": 0.25})
    assert len(caught) == 1
    assert tracks(optimizer) == [("matrix", 2), ("vector", 4), ("matrix", 1), ("vector", 1)]
    assert [group["lr"] for group in optimizer.param_groups][1:] == [0.5, 0.25, 0.25]
    torch.optim.lr_scheduler.LambdaLR(cls([{"params": decay}, {"params": rest}]), [lambda _: 1.0, lambda _: 0.5])


def test_no_message_where_every_parameter_is_a_matrix_or_has_a_track(cls: Any) -> None:
    params = list(network().parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tracks(cls([p for p in params if p.ndim > 1])) == [("matrix", 2)]
        assert tracks(cls([{"params": []}])) == [("matrix", 0)]
        assert tracks(cls([{"params": params, "track": "vector"}])) == [("vector", 6)]


@pytest.mark.filterwarnings("ignore:.*without a track")
def test_a_state_comes_back_into_the_same_groups(cls: Any) -> None:
    model, other = network(), network()
    optimizer, loaded = cls(model.parameters()), cls(other.parameters())
    train(optimizer, model)
    loaded.load_state_dict(optimizer.state_dict())
    assert tracks(loaded) == tracks(optimizer) == tracks(pickle.loads(pickle.dumps(optimizer)))
    for old, new in zip(model.parameters(), other.parameters(), strict=True):
        assert all(torch.equal(t, loaded.state[new][name]) for name, t in optimizer.state[old].items())


@pytest.mark.filterwarnings("ignore:.*without a track")
def test_a_mixed_group_that_is_refused_leaves_nothing_behind(cls: Any) -> None:
    bias = nn.Parameter(torch.zeros(2))
    optimizer = cls([bias])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2)), bias]})
    assert tracks(optimizer) == [("vector", 1)] and list(optimizer.state) == [bias]


def test_a_refused_parameter_is_named_by_its_index(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"parameter 2 .*floating-point"):
        cls([nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2)), torch.zeros(2, dtype=torch.int64)])


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_parameter_without_a_shape_is_named(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"parameter 0 .*forward pass"):
        cls(nn.LazyLinear(3).parameters())
