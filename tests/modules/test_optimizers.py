"""Optimizers with other habits than torch's are made, stepped and loaded.

Those of libraries are in tests/launch/test_other_optimizers.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modules.optimizers import build_optimizer
from tests.modules.small_task import SmallNetwork, SmallTask, fit, make_optimizer


class Strict(torch.optim.SGD):
    """Accept only plain parameters and known keys, and sort parameters by size.

    Keller Jordan's Muon does the same.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            assert group.keys() == {"params", "use_muon"}
            group["params"] = sorted(group["params"], key=lambda param: param.numel(), reverse=True)
        super().__init__(groups, lr=0.1)


def test_an_optimizer_that_rejects_names_and_unknown_keys_gets_neither() -> None:
    network = SmallNetwork()
    optimizer = build_optimizer(network, Strict, "all", {"use_muon": True}, {"use_muon": False})
    groups = {group["track"]: group for group in optimizer.param_groups}
    assert groups["matrix"]["use_muon"] and not groups["vector"]["use_muon"]
    assert groups["matrix"]["params"] == [network.head.weight, network.convolution.weight]
    with pytest.raises(ValueError, match=r"cannot be made of groups of parameters.*AssertionError"):
        build_optimizer(network, Strict, "all", {"use_moun": True}, {"use_muon": False})


class Deaf(torch.optim.SGD):
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        super().step()


def test_a_step_after_which_nothing_can_clip_is_an_error_where_it_should_clip() -> None:
    def make(groups: Any) -> torch.optim.Optimizer:
        return Deaf(groups, lr=0.1)

    fit(SmallTask(optimizer=make), epochs=1)
    with pytest.raises(ValueError, match=r"Deaf does not call the closure .*, or remove gradient_clip_val"):
        fit(SmallTask(optimizer=make, gradient_clip_val=1.0), epochs=1)


class BrokenHook(SmallTask):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        len(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["adamw", "sync"])
def test_an_error_in_a_hook_is_not_blamed_on_the_optimizer(name: str) -> None:
    with pytest.raises(TypeError, match=r"has no len\(\)"):
        fit(BrokenHook(optimizer=make_optimizer(name)), epochs=1)


class Accurate(torch.optim.SGD):
    """Keep nested state in float64 beside float32 parameters."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["sums"] = [{"sum": torch.full((2,), 0.1, dtype=torch.float64)}, 3]
        super().step(closure)


def test_loading_keeps_the_precision_of_the_state() -> None:
    network = nn.Linear(2, 2)
    first, second = (build_optimizer(network, lambda g: Accurate(g, lr=0.1), "all", None, None) for _ in range(2))
    first.step()
    saved = first.state_dict()
    second.load_state_dict(saved)
    loaded, number = second.state[network.weight]["sums"]
    assert isinstance(loaded["sum"], Tensor) and number == 3
    assert loaded["sum"].dtype == torch.float64 and torch.equal(loaded["sum"], saved["state"][0]["sums"][0]["sum"])
    loaded["sum"].zero_()
    assert saved["state"][0]["sums"][0]["sum"].sum() > 0  # a copy
