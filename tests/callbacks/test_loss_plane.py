from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks.loss_surface import filter_normalized, label, parameters_in, plane_around, plane_through
from modules.modular_addition import ModularAddition
from tests.callbacks.fits import adamw, module
from tests.modules.small_task import SmallTask, make_optimizer


def another(seed: int) -> ModularAddition:
    model = module()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    return model


def params(model: Any) -> list[Tensor]:
    return [param.detach().clone() for param in model.network.parameters()]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]).double()


@pytest.mark.parametrize(
    ("shape", "flatten", "filters"),
    [((3, 5), False, (3, 5)), ((4, 2, 3, 3), False, (4, 18)), ((4, 2, 3), True, (4, 6)), ((2, 3, 5), False, (6, 5))],
)
def test_directions_are_filter_normalized_as_the_weights_filter_by_filter(
    shape: tuple[int, ...], flatten: bool, filters: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    direction, weights = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    scaled = filter_normalized(direction, weights, flatten)
    assert scaled.shape == shape
    torch.testing.assert_close(scaled.view(filters).norm(dim=1), weights.view(filters).norm(dim=1))
    cosines = torch.cosine_similarity(scaled.view(filters), direction.view(filters), dim=1)
    torch.testing.assert_close(cosines, torch.ones(filters[0]))


def test_biases_and_gains_do_not_move() -> None:
    assert not filter_normalized(torch.ones(4), torch.ones(4), False).any()
    model = SmallTask(optimizer=make_optimizer("adamw"))
    plane = plane_around(list(model.network.parameters()), model, "here", 0.5, seed=1)
    assert plane.ranges == ((-0.5, 0.5), (-0.5, 0.5))
    for direction in plane.directions:
        moved = {name: bool(x.any()) for (name, _), x in zip(model.network.named_parameters(), direction, strict=True)}
        assert {name for name, moves in moved.items() if moves} == {"convolution.weight", "head.weight"}


def test_random_planes_follow_from_their_seed() -> None:
    model = module()
    planes = [plane_around(list(model.network.parameters()), model, "", 1.0, seed) for seed in (1, 1, 2)]
    first = [flat(plane.directions[0]) for plane in planes]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    assert not torch.equal(flat(planes[0].directions[0]), flat(planes[0].directions[1]))


def test_the_plane_contains_all_three_checkpoints() -> None:
    models = [another(seed) for seed in range(3)]
    others: list[Any] = [(name, model.state_dict()) for name, model in zip("bc", models[1:], strict=True)]
    plane = plane_through(params(models[0]), models[0], "a", others)
    first, second = (flat(direction) for direction in plane.directions)
    assert (first @ first).item() == pytest.approx(1, rel=1e-5)
    assert (second @ second).item() == pytest.approx(1, rel=1e-5)
    assert (first @ second).item() == pytest.approx(0, abs=1e-5)
    start = flat(params(models[0]))
    assert [name for name, _, _ in plane.marks] == ["a", "b", "c"]
    for (_, x, y), model in zip(plane.marks, models, strict=True):
        torch.testing.assert_close(start + x * first + y * second, flat(params(model)), rtol=0, atol=1e-4)
        for value, (low, high) in zip((x, y), plane.ranges, strict=True):
            assert low + 0.1 * (high - low) < value < high - 0.1 * (high - low)


@pytest.mark.parametrize("case", ["same", "twice", "between"])
def test_three_on_a_line_are_refused(case: str) -> None:
    start, end = another(0), another(1)
    middle = another(2)
    with torch.no_grad():
        for m, s, e in zip(middle.parameters(), start.parameters(), end.parameters(), strict=True):
            m.copy_(s + 0.3 * (e - s))
    others = {"same": (start, end), "twice": (end, end), "between": (end, middle)}[case]
    with pytest.raises(ValueError, match="lie on one line"):
        plane_through(params(start), start, "a", [("b", others[0].state_dict()), ("c", others[1].state_dict())])


def test_checkpoints_are_named_by_experiment_and_run() -> None:
    assert label("runs/grok_aga/2026-seed1/checkpoints/last.ckpt") == "grok_aga/2026-seed1/last"
    assert label("somewhere/else.ckpt") == "else"


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    model, path = module(), tmp_path / "it.ckpt"
    torch.save({"state_dict": model.state_dict()}, path)
    read = parameters_in(str(path), model)
    assert all(torch.equal(read[name], param) for name, param in model.named_parameters())
    wider = ModularAddition(p=7, width=32, heads=2, mlp_width=32, optimizer=adamw)
    with pytest.raises(ValueError, match=r"it\.ckpt is of another network: its network\.query is missing or of an"):
        parameters_in(str(path), wider)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"it\.ckpt cannot be read as a checkpoint"):
        parameters_in(str(path), model)
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*not\.ckpt"):
        parameters_in(str(tmp_path / "not.ckpt"), model)
