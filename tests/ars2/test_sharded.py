"""Sharded processes train to the result of one process.

The parameters are sharded by FSDP2, without Lightning; the shards are uneven and some are empty.
"""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ars2 import ARS2Neo
from tests.ars2.problems import SmallProblem, problem_groups
from tests.ars2.sharded_training import EXACT, OPTIMIZERS, RESUMED, STEPS, Result, UnevenProblem, train, train_all
from tests.ars2.training import train as train_by_closure
from tests.helpers.launching import launch

Results = dict[str, Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[Results]:
    return launch(train_all, 2, folder / "two", 1, True)


@pytest.fixture(scope="module")
def alone() -> Results:
    return {name: train(name) for name in OPTIMIZERS}


def assert_same(actual: Result, other: Result) -> None:
    assert actual["numbers"] == pytest.approx(other["numbers"], rel=1e-4)
    for name, expected in other["tensors"].items():
        # A shear force is the difference of two nearly equal gradients; a square differs by twice as much as its root.
        tolerance = {"shear": 2e-5, "exp_avg_sq": 2e-6}.get(name.rpartition(".")[2], 1e-6)
        assert (actual["tensors"][name] - expected).norm() <= tolerance * expected.norm(), name


def assert_one(ranks: list[Results], name: str) -> None:
    for results in ranks[1:]:
        assert results[name]["second_passes"] == ranks[0][name]["second_passes"]
        assert results[name]["numbers"] == ranks[0][name]["numbers"], "phi or its variance differ"
        for key, tensor in results[name]["tensors"].items():
            assert torch.equal(tensor, ranks[0][name]["tensors"][key]), key


@pytest.mark.parametrize("name", EXACT)
def test_two_processes_train_like_one(name: str, two: list[Results], alone: Results) -> None:
    assert_one(two, name)
    assert two[0][name]["second_passes"] == alone[name]["second_passes"]
    assert_same(two[0][name], alone[name])


def test_shards_are_uneven_and_empty(two: list[Results]) -> None:
    local_numels = [results["base"]["local_numels"] for results in two]
    assert (local_numels[0]["embedding.weight"], local_numels[1]["embedding.weight"]) == (6 * 8, 5 * 8)
    for name in ("gain", "shift"):
        assert (local_numels[0][name], local_numels[1][name]) == (7, 0)


def test_aga_makes_a_second_pass_at_some_steps_only(alone: Results) -> None:
    for name in ("aga", "aga, no energy"):
        assert 1 < alone[name]["second_passes"][-1] < STEPS


def test_a_step_makes_few_all_reduces(two: list[Results]) -> None:
    """A step makes one all-reduce for each quantity, however many groups.

    The quantities are the move, the shear forces (made or injected), phi and the energies.
    """
    for name in ("sync", "aga", "periodic"):
        second_passes = [0, *two[0][name]["second_passes"]]
        shear, phi = name != "sync", name == "aga"
        for step, found in enumerate(two[0][name]["exchanges"]):
            synced = second_passes[step + 1] > second_passes[step]
            assert found == 1 + synced + shear + (phi and step > 0), (name, step)
    assert set(two[0]["base"]["exchanges"]) == {1} and set(two[0]["momentum"]["exchanges"]) == {4}
    assert set(two[0]["muon"]["exchanges"]) == {0}


def test_matrices_that_travel_in_bfloat16_are_rounded(two: list[Results], alone: Results) -> None:
    assert_one(two, "rounded")
    for name, expected in alone["rounded"]["tensors"].items():
        difference = (two[0]["rounded"]["tensors"][name] - expected).norm() / expected.norm()
        assert difference < 5e-2, name
    weight = "tall.weight"
    assert not torch.allclose(two[0]["rounded"]["tensors"][weight], alone["rounded"]["tensors"][weight], rtol=1e-6)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # just that is meant
@pytest.mark.parametrize("name", RESUMED)
def test_one_process_resumes_a_checkpoint_of_two(name: str, two: list[Results], folder: Path) -> None:
    resumed = train(name, folder=folder / f"checkpoint {name}")
    assert len(resumed["second_passes"]) == STEPS // 2
    assert resumed["second_passes"] == two[0][name]["second_passes"][STEPS // 2 :]
    assert_same(resumed, two[0][name])


@pytest.mark.slow
def test_four_processes_resume_a_checkpoint_of_two(two: list[Results], folder: Path) -> None:
    four = launch(train_all, 4, folder / "four go on", 1, True)
    for name in RESUMED:
        assert_one(four, name)
        assert four[0][name]["second_passes"] == two[0][name]["second_passes"][STEPS // 2 :]
        assert_same(four[0][name], two[0][name])


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
def test_four_processes_train_like_one(replicas: int, alone: Results, tmp_path: Path) -> None:
    """Train four shards, or two replicas of two shards each."""
    four = launch(train_all, 4, tmp_path / "four", replicas, False)
    assert sum(results["base"]["local_numels"]["gain"] > 0 for results in four) == replicas
    for name in EXACT:
        assert_one(four, name)
        assert four[0][name]["second_passes"] == alone[name]["second_passes"]
        assert_same(four[0][name], alone[name])


# --- errors and loading, with a group of one process ---


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded_problem(mesh: DeviceMesh) -> SmallProblem:
    model = SmallProblem()
    fully_shard(model, mesh=mesh)
    return model


def parameter(*placements: Any, mesh: DeviceMesh) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, placements))


def test_a_network_that_is_sharded_in_part_is_refused(mesh: DeviceMesh) -> None:
    model = SmallProblem()
    fully_shard(model.tall, mesh=mesh)
    with pytest.raises(ValueError, match=r"tall\.weight .*fully_shard"):
        ARS2Neo([{"params": list(model.named_parameters()), "track": "vector"}])


@pytest.mark.parametrize("placements", [(Shard(1),), (Replicate(),)])
def test_another_layout_is_refused(placements: tuple[Any, ...], mesh: DeviceMesh) -> None:
    with pytest.raises(ValueError, match=r"parameter 0 .*tensor parallelism"):
        ARS2Neo([parameter(*placements, mesh=mesh)])


def test_tensor_parallelism_is_refused(mesh: DeviceMesh) -> None:
    grid = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
    with pytest.raises(ValueError, match="tensor parallelism"):
        ARS2Neo([parameter(Shard(0), Shard(1), mesh=grid)])


def test_two_meshes_are_refused(mesh: DeviceMesh) -> None:
    other = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replica", "shard"))
    first, second = parameter(Shard(0), mesh=mesh), parameter(Replicate(), Shard(0), mesh=other)
    with pytest.raises(ValueError, match=r"parameters 0 and 1 .*meshes"):
        ARS2Neo([first, second])
    optimizer = ARS2Neo([first])
    with pytest.raises(ValueError, match="meshes"):
        optimizer.add_param_group({"params": [second]})
    assert len(optimizer.param_groups) == 1


def test_a_gradient_in_another_layout_is_refused_before_anything_changes(mesh: DeviceMesh) -> None:
    param = parameter(Shard(0), mesh=mesh)
    optimizer = ARS2Neo([param], mode="base")
    param.grad = distribute_tensor(torch.ones(4, 4), mesh, [Replicate()])
    with pytest.raises(RuntimeError, match=r"gradient of parameter 0 .*sharded"):
        optimizer.step()
    assert torch.equal(param.full_tensor(), torch.ones(4, 4))


def test_full_state_is_loaded_into_shards_and_training_resumes(mesh: DeviceMesh) -> None:
    full = SmallProblem()
    optimizer = ARS2Neo(problem_groups(full), mode="aga", ns_dtype="float32")
    train_by_closure(full, optimizer, range(3))
    model = SmallProblem()
    model.load_state_dict(full.state_dict())
    fully_shard(model, mesh=mesh)
    sharded = ARS2Neo(problem_groups(model), mode="aga", ns_dtype="float32")
    sharded.load_state_dict(optimizer.state_dict())
    assert all(
        isinstance(value, DTensor) or key == "step" for state in sharded.state.values() for key, value in state.items()
    )
    for each, its in ((full, optimizer), (model, sharded)):
        train_by_closure(each, its, range(3, 6))
    for p, q in zip(full.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.full_tensor(), p.detach(), rtol=1e-6, atol=1e-7)


def test_a_copy_knows_that_its_parameters_are_sharded(mesh: DeviceMesh) -> None:
    optimizer = ARS2Neo(problem_groups(sharded_problem(mesh)))
    for each in (optimizer, deepcopy(optimizer)):
        each.distribute(None, "bfloat16")  # which parameters that are not sharded refuse


@pytest.mark.parametrize("option", ["compile", "capturable"])
def test_options_for_unsharded_parameters_are_refused(option: str, mesh: DeviceMesh) -> None:
    with pytest.raises(ValueError, match="compile and capturable"):
        ARS2Neo(problem_groups(sharded_problem(mesh)), **{option: True})


def test_splits_of_sharded_parameters_are_refused(mesh: DeviceMesh) -> None:
    params = [parameter(Shard(0), mesh=mesh)]
    with pytest.raises(ValueError, match="splits does not support sharded parameters"):
        ARS2Neo([{"params": params, "splits": 2}])
    optimizer = ARS2Neo(params)
    with pytest.raises(ValueError, match="splits does not support sharded parameters"):
        optimizer.add_param_group({"params": [parameter(Shard(0), mesh=mesh)], "splits": (1, 3)})
    assert len(optimizer.param_groups) == 1


def test_unsharded_parameters_need_a_group_to_be_distributed() -> None:
    with pytest.raises(ValueError, match="group"):
        ARS2Neo(problem_groups(SmallProblem())).distribute(None)


def test_restoring_puts_shards_back_to_the_bit(mesh: DeviceMesh) -> None:
    model = UnevenProblem()
    fully_shard(model, mesh=mesh)
    before = [p.full_tensor().clone() for p in model.parameters()]
    optimizer = ARS2Neo([{"params": list(model.parameters()), "track": "vector"}], mode="sync")
    model.loss(0).backward()
    assert optimizer.wants_second_pass()
    optimizer.perturb()
    assert not all(torch.equal(p.full_tensor(), old) for p, old in zip(model.parameters(), before, strict=True))
    optimizer.restore()
    assert all(torch.equal(p.full_tensor(), old) for p, old in zip(model.parameters(), before, strict=True))
