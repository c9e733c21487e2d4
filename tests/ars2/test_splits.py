"""The row blocks of fused weights move as separate matrices."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ars2 import ARS2Neo, Muon, param_groups
from tests.ars2.training import assert_identical, snapshot, through_a_file, worst_difference

COLS = 8
SPLITS: list[int | tuple[int, ...]] = [3, (6, 3, 3)]  # queries, keys and values; fewer keys and values than queries
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "base": (ARS2Neo, {}),
    "matched": (ARS2Neo, {"adjust_lr_fn": "match_rms_adamw"}),
    "without energy": (ARS2Neo, {"energy": False}),
    "scalar": (ARS2Neo, {"energy": "scalar"}),
    "without geometry": (ARS2Neo, {"energy": False, "geometry": False}),
    "cautious": (ARS2Neo, {"cautious": True}),
    "muon": (Muon, {}),
    "matched muon": (Muon, {"adjust_lr_fn": "match_rms_adamw", "cautious": True}),
}


def rows_of(splits: int | tuple[int, ...]) -> list[int]:
    return [12 // splits] * splits if isinstance(splits, int) else list(splits)


def random(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(12, COLS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def steps(optimizer: Any, params: list[nn.Parameter], numbers: range) -> None:
    for number in numbers:
        gradients = random(100 + number, params[0].dtype).split([len(param) for param in params])
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient.clone()
        optimizer.step()


def fused_and_separate(
    name: str, splits: int | tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Return a fused weight after five steps, and the same rows as separate parameters."""
    cls, options = OPTIMIZERS[name]
    options = {"lr": 0.02, "weight_decay": 0.3, "ns_dtype": "float64", **options}
    fused = [nn.Parameter(random(0, dtype))]
    separate = [nn.Parameter(block.clone()) for block in random(0, dtype).split(rows_of(splits))]
    steps(cls([{"params": fused, "splits": splits}], **options), fused, range(5))
    steps(cls(separate, **options), separate, range(5))
    return fused[0].detach(), torch.cat([param.detach() for param in separate])


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fused_weight_moves_as_separate_parameters(name: str, splits: int | tuple[int, ...]) -> None:
    fused, separate = fused_and_separate(name, splits)
    assert worst_difference([fused], [separate]) <= 3e-15  # measured: 4.5e-16


def test_a_fused_weight_in_half_precision_moves_as_separate_parameters() -> None:
    fused, separate = fused_and_separate("base", 3, torch.bfloat16)
    assert fused.dtype == torch.bfloat16 and torch.equal(fused, separate)


def test_without_splits_a_fused_weight_is_one_matrix() -> None:
    optimizer = ARS2Neo([nn.Parameter(random(0, torch.float64))], lr=0.02, weight_decay=0.3, ns_dtype="float64")
    param = optimizer.param_groups[0]["params"][0]
    steps(optimizer, [param], range(5))
    assert worst_difference([param], [fused_and_separate("base", 3)[0]]) > 1e-3


@pytest.mark.parametrize("cls", [ARS2Neo, Muon])
@pytest.mark.parametrize("splits", SPLITS)
def test_a_saved_state_resumes_to_the_bit(cls: Any, splits: int | tuple[int, ...]) -> None:
    params = [[nn.Parameter(random(0, torch.float32))] for _ in range(2)]
    optimizer, other = (cls([{"params": each, "splits": splits}], lr=0.02) for each in params)
    steps(optimizer, params[0], range(3))
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.param_groups[0]["splits"] == splits
    params[1][0].data.copy_(params[0][0].data)
    for each, of in zip((optimizer, other), params, strict=True):
        steps(each, of, range(3, 6))
    assert_identical(snapshot(optimizer), snapshot(other))


def test_the_groups_of_a_model_drive_the_blocks() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(COLS, 12, bias=False, dtype=torch.float64)

    model = Attention()
    model.qkv.weight.data.copy_(random(0, torch.float64))
    groups = param_groups(model, splits={"qkv.weight": [6, 3, 3]}, head=[])
    optimizer = ARS2Neo(groups, lr=0.02, weight_decay=0.3, ns_dtype="float64")
    steps(optimizer, [model.qkv.weight], range(5))
    assert torch.equal(model.qkv.weight, fused_and_separate("base", (6, 3, 3))[0])


@pytest.mark.parametrize("cls", [ARS2Neo, Muon])
@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"splits": 5}, "parameter 0 of shape (12, 8) on the matrix track cannot be split into 5 row blocks"),
        ({"splits": (6, 3)}, "cannot be split into (6, 3) row blocks"),
        ({"splits": 0}, "splits must be a number of row blocks"),
        ({"splits": ()}, "splits must be a number of row blocks"),
        ({"splits": True}, "splits must be a number of row blocks"),
        ({"splits": 3, "track": "vector"}, "on the vector track cannot be split into 3"),
    ],
)
def test_splits_that_do_not_fit_are_errors(cls: Any, group: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        cls([{"params": [nn.Parameter(torch.zeros(12, COLS))], **group}])


def test_the_blocks_share_the_move_to_the_adversarial_point() -> None:
    param = nn.Parameter(random(0, torch.float64))
    optimizer = ARS2Neo([{"params": [param], "splits": 3}], mode="sync", rho=0.2)
    before = param.detach().clone()
    param.grad = random(1, torch.float64)
    assert optimizer.wants_second_pass()
    optimizer.perturb()
    assert (param.detach() - before).norm().item() == pytest.approx(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "without energy", "matched muon"])
def test_a_compiled_step_splits_alike(name: str) -> None:
    cls, options = OPTIMIZERS[name]
    ends = []
    for compile in (False, True):
        params = [nn.Parameter(random(0, torch.float32))]
        groups = [{"params": params, "splits": (6, 3, 3)}]
        steps(cls(groups, ns_dtype="float32", compile=compile, **options), params, range(3))
        ends.append(params[0].detach())
    assert worst_difference(ends[:1], ends[1:]) <= 1e-5


def test_a_stack_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="cannot be split"):
        ARS2Neo([{"params": [nn.Parameter(torch.zeros(3, 4, 5))], "splits": 3}])
