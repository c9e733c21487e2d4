"""The next step uses the state that the user sets.

Users may replace entries, or change them by hooks into loading.
"""

import pytest
import torch
from torch import nn

from ars2 import ARS2Neo, Muon
from tests.ars2.training import assert_identical, setup, snapshot, train, worst_difference


@pytest.mark.parametrize(
    ("mode", "replaced"),
    [("base", "tensor"), ("sync", "whole state"), ("aga", "tensor"), ("aga", "other layout"), ("base", "whole state")],
)
def test_the_next_step_uses_state_that_the_user_replaced(mode: str, replaced: str) -> None:
    snapshots = []
    for in_place in (True, False):
        model, optimizer = setup(mode, ns_dtype="float32")
        train(model, optimizer, range(4))
        for param, state in list(optimizer.state.items()):
            if in_place:
                state["exp_avg"].fill_(0.01)
                continue
            tensor = torch.full_like(state["exp_avg"], 0.01)
            if replaced == "other layout" and tensor.ndim == 2:
                tensor = torch.full_like(tensor.T.contiguous(), 0.01).T
            optimizer.state[param] = {**state, "exp_avg": tensor} if replaced == "whole state" else state
            optimizer.state[param]["exp_avg"] = tensor
        train(model, optimizer, range(4, 6))
        snapshots.append(snapshot(optimizer))
    if replaced == "other layout":  # sums in another order
        assert worst_difference(*(found["params"] for found in snapshots)) < 1e-5
    else:
        assert_identical(*snapshots)


def test_the_next_step_uses_a_momentum_that_the_user_replaced() -> None:
    param = nn.Parameter(torch.ones(3, 4))
    optimizer = Muon([param], momentum=0.5)
    for _ in range(2):
        optimizer.state[param]["momentum_buffer"] = torch.zeros(3, 4)
        param.grad = torch.ones(3, 4)
        optimizer.step()
        assert torch.equal(optimizer.state[param]["momentum_buffer"], torch.full((3, 4), 0.5))


def test_the_next_step_uses_a_step_count_that_the_user_replaced() -> None:
    param = nn.Parameter(torch.zeros(4))
    optimizer = ARS2Neo([{"params": [param], "track": "vector"}], mode="base", lr=1.0, weight_decay=0.0)
    optimizer.state[param]["step"] = torch.tensor(10_000.0)
    param.grad = torch.ones(4)
    optimizer.step()
    # Without a bias to correct, (1 - 0.9) / sqrt(1 - 0.999).
    assert torch.allclose(param, torch.full((4,), -0.1 / 0.001**0.5), rtol=1e-3)
    assert optimizer.state[param]["step"] == 10_001


@pytest.mark.parametrize("trained", [0, 3])
def test_parameters_exchanged_in_a_group_start_anew(trained: int) -> None:
    params = [nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
    optimizer = ARS2Neo(params, mode="sync")

    def closure() -> None:
        optimizer.zero_grad()
        sum(p.square().sum() for p in optimizer.param_groups[0]["params"]).backward()  # type: ignore[union-attr]

    for _ in range(trained):
        optimizer.step(closure)
    new = nn.Parameter(torch.ones(3, 4))
    optimizer.param_groups[0]["params"][0] = new
    assert set(optimizer.state_dict()["state"]) == {0, 1}
    optimizer.step(closure)
    assert optimizer.state.keys() == {new, params[1]}
    assert (optimizer.state[new]["step"], optimizer.state[params[1]]["step"]) == (1, trained + 1)
    assert not torch.equal(new, torch.ones(3, 4))


@pytest.mark.parametrize("emptied", ["cleared", "replaced", "looked at"])
def test_a_parameter_whose_state_is_empty_starts_anew(emptied: str) -> None:
    param = nn.Parameter(torch.ones(3, 4))
    optimizer = ARS2Neo([param], mode="base")
    if emptied == "cleared":
        optimizer.state[param].clear()
    elif emptied == "replaced":
        optimizer.state[param] = {}
    else:
        del optimizer.state[param]
        assert not optimizer.state[param]
    param.grad = torch.ones(3, 4)
    optimizer.step()
    assert optimizer.state[param]["step"] == 1 and optimizer.state[param]["exp_avg"].any()


def test_the_order_of_a_state_and_entries_of_others_in_it_do_not_matter() -> None:
    results = []
    for ours in (True, False):
        model, optimizer = setup("aga")
        train(model, optimizer, range(3))
        for param, state in list(optimizer.state.items()) if not ours else []:
            optimizer.state[param] = {"step": state["step"], "note": "mine", "count": torch.ones(7), **state}
        train(model, optimizer, range(3, 6))
        results.append([p.detach().clone() for p in model.parameters()])
    assert worst_difference(*results) == 0
