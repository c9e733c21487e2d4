"""Options may be NumPy numbers or tensors, and groups copies of groups."""

import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ars2 import ARS2Neo, Muon
from tests.ars2.training import setup, through_a_file, train


def vectors(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(4)) for _ in range(count)]


@pytest.mark.parametrize("cls", [ARS2Neo, Muon])
def test_numpy_numbers_are_accepted_and_saved_as_plain_ones(cls: type) -> None:
    optimizer = cls(
        [{"params": vectors(1), "track": "vector", "weight_decay": np.float64(0.5)}],
        lr=np.float32(0.25),
        betas=(np.float32(0.5), 0.75),
        ns_steps=np.int64(3),
    )
    optimizer.param_groups[0]["lr"] = np.float32(0.125)  # as a user's scheduler may set it
    (group,) = through_a_file(optimizer.state_dict())["param_groups"]
    assert (group["lr"], group["betas"], group["ns_steps"], group["weight_decay"]) == (0.125, (0.5, 0.75), 3, 0.5)
    assert [type(group[name]) for name in ("lr", "ns_steps", "weight_decay")] == [float, int, float]


@pytest.mark.parametrize("cls", [ARS2Neo, Muon])
def test_coefficients_may_be_lists_and_are_saved_as_tuples(cls: type) -> None:
    given, saved = [[3, -4, 2.0], [np.float64(1.5), -0.5, 0]], ((3.0, -4.0, 2.0), (1.5, -0.5, 0.0))
    optimizer = cls([{"params": vectors(1), "track": "vector"}], ns_coefficients=given)
    optimizer.add_param_group({"params": vectors(1), "track": "vector", "ns_coefficients": given})
    state = through_a_file(optimizer.state_dict())
    assert [group["ns_coefficients"] for group in state["param_groups"]] == [saved, saved]
    other = cls([{"params": vectors(1), "track": "vector"} for _ in range(2)])
    other.load_state_dict(state)
    assert other.param_groups[1]["ns_coefficients"] == saved


@pytest.mark.parametrize("mode", ["base", "sync"])
def test_a_capturable_learning_rate_may_be_a_tensor(mode: str) -> None:
    rate = torch.tensor(0.25)
    optimizer = ARS2Neo(
        [{"params": vectors(1), "track": "vector"}, {"params": vectors(1), "track": "vector"}],
        lr=rate,  # type: ignore[arg-type]
        mode=mode,  # type: ignore[arg-type]
        capturable=True,
    )
    first, second = (group["lr"] for group in optimizer.param_groups)
    # A scheduler writes into each group's in place.
    assert first.item() == second.item() == 0.25 and first is not second
    schedule = LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    schedule.step()
    assert (first.item(), second.item()) == (0.125, 0.125)
    assert [group["lr"] for group in optimizer.state_dict()["param_groups"]] == [0.125, 0.125]


def test_a_learning_rate_that_is_a_tensor_is_refused_where_the_step_is_not_capturable() -> None:
    with pytest.raises(ValueError, match=r"lr .*got tensor"):
        ARS2Neo(vectors(1), lr=torch.tensor(0.1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lr .*got -0.1"):
        ARS2Neo(vectors(1), lr=torch.tensor(-0.1), mode="base", capturable=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("capturable", [False, True])
def test_a_copy_of_a_group_is_accepted(capturable: bool) -> None:
    model, optimizer = setup("sync", capturable=capturable)
    train(model, optimizer, range(3))
    (new,) = vectors(1)
    copied: dict[str, Any] = {**optimizer.param_groups[0], "params": [new], "track": "vector"}
    optimizer.add_param_group(copied)
    group = optimizer.param_groups[-1]
    assert int(group["step"]) == 0 and "sync_steps" not in group
    assert float(group["lr"]) == float(optimizer.param_groups[0]["lr"])
    assert optimizer.diagnostics()["steps"] == 3
    from_groups = ARS2Neo(optimizer.param_groups, mode="sync", capturable=capturable)
    assert from_groups.diagnostics()["steps"] == 0


def test_thousands_of_groups_are_made_in_seconds() -> None:
    def seconds(count: int) -> float:
        groups = [{"params": [param], "track": "vector"} for param in vectors(count)]
        start = time.process_time()
        ARS2Neo(groups)
        return time.process_time() - start

    seconds(10)
    # The part of torch is quadratic too, and small; checking every pair of groups took 39 seconds.
    assert seconds(2000) < 5.0
