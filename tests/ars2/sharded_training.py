"""Train networks sharded by FSDP2 without Lightning, for the tests.

:func:`train_all` is one of several processes. :func:`train` without a mesh is one process with all of the network.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ars2 import ARS2Neo, Muon
from ars2.distributed import is_sharded, local
from ars2.replay import first_pass
from tests.ars2.problems import SmallProblem, problem_groups
from tests.ars2.training import MODES
from tests.helpers.launching import become

# PARTS batches to a step, shared out among the processes.
STEPS, PARTS = 12, 4
Make = Callable[[Any], Optimizer]
Result = dict[str, Any]


class UnevenProblem(SmallProblem):
    """Add a matrix and a vector of one row to the small problem.

    All processes but the first have an empty shard of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 7).unsqueeze(0))
        self.shift = nn.Parameter(torch.linspace(-0.2, 0.3, 7).unsqueeze(0))

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        return super().forward(images, tokens) * self.gain + torch.tanh(self.shift)


def groups(model: UnevenProblem) -> list[dict[str, Any]]:
    matrix, vector = problem_groups(model)
    matrix["params"] = [p for p in matrix["params"] if p is not model.shift]
    return [matrix, {**vector, "params": [*vector["params"], model.shift], "relative_rho": False}]


def ars2(mode: str, **options: Any) -> Callable[[UnevenProblem], ARS2Neo]:
    return lambda model: ARS2Neo(groups(model), ns_dtype="float32", **MODES[mode], **options)


def rounded(model: UnevenProblem) -> Optimizer:
    optimizer = ars2("base")(model)
    if is_sharded(model.gain):
        optimizer.distribute(None, "bfloat16")
    return optimizer


EXACT: dict[str, Make] = {
    **{mode: ars2(mode) for mode in ("base", "sync", "aga", "periodic")},
    "aga, no energy": ars2("aga", energy=False),
    "sync, no geometry": ars2("sync", geometry=False, relative_rho=True),  # relative for matrices only
    "momentum": lambda model: ARS2Neo(
        groups(model), ns_dtype="float32", mode="momentum", relative_rho=True, energy="scalar"
    ),
    "muon": lambda model: Muon(groups(model), ns_dtype="float32"),
}
OPTIMIZERS = {**EXACT, "rounded": rounded}
# With all kinds of state between them: both moments and a shear force, the first moment alone, and a momentum.
RESUMED = ("aga", "aga, no energy", "muon")


def shard(model: UnevenProblem, mesh: DeviceMesh) -> None:
    for part in (model.tall, model.wide, model):
        fully_shard(part, mesh=mesh)


def one_step(model: UnevenProblem, optimizer: Any, step: int, rank: int, ranks: int) -> None:
    """Make one step of a loop that makes the passes itself.

    This process takes its share of the step's PARTS batches.
    """

    def backward() -> None:
        parts = range(rank * PARTS // ranks, (rank + 1) * PARTS // ranks)
        losses = [model.loss(PARTS * step + part) for part in parts]
        torch.stack(losses).mean().backward()

    optimizer.zero_grad()
    with torch.no_grad():
        model.loss(step)  # an evaluation, after which FSDP2 keeps parameters gathered
    with first_pass(optimizer, model):
        backward()
    if hasattr(optimizer, "wants_second_pass") and optimizer.wants_second_pass():
        optimizer.perturb()
        try:
            backward()
        finally:
            optimizer.restore()
    optimizer.step()


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the all-reduces of this process.

    FSDP2 makes other collectives, but no all-reduce where there are no replicas.
    """
    calls: list[int] = []
    plain = dist.all_reduce

    def counting(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        calls.append(tensor.numel())
        return plain(tensor, *arguments, **options)

    dist.all_reduce = counting
    try:
        yield calls
    finally:
        dist.all_reduce = plain


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def result(model: nn.Module, optimizer: Optimizer) -> Result:
    """Return the parameters and state as full tensors, by name, and the counters."""
    tensors = {name: full(p.detach()) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        tensors |= {f"{name}.{key}": full(value) for key, value in optimizer.state[p].items()}
    numbers = {key: value for key, value in optimizer.param_groups[0].items() if isinstance(value, int | float)}
    return {"tensors": tensors, "numbers": numbers}


def save(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    parameters, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": parameters, "optimizer": state}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    parameters, state = get_state_dict(model, optimizer)
    saved = {"model": parameters, "optimizer": state}
    checkpoint.load(saved, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])


def train(
    name: str, mesh: DeviceMesh | None = None, rank: int = 0, ranks: int = 1, folder: Path | None = None
) -> Result:
    """Train all STEPS, sharded if there is a ``mesh``.

    With a ``folder`` the first half is saved there. If it is there already, only the second half is trained.
    """
    model = UnevenProblem()
    if mesh is not None:
        shard(model, mesh)
    optimizer = OPTIMIZERS[name](model)
    half = STEPS // 2
    start = half if folder is not None and folder.exists() else 0
    if folder is not None and start:
        load(model, optimizer, folder)
    second_passes, exchanges = [], []
    for step in range(start, STEPS):
        with counted() as calls:
            one_step(model, optimizer, step, rank, ranks)
        exchanges.append(len(calls))
        second_passes.append(optimizer.param_groups[0].get("sync_steps"))
        if folder is not None and step + 1 == half:
            save(model, optimizer, folder)
    local_numels = {name: local(p).numel() for name, p in model.named_parameters()}
    return {
        **result(model, optimizer),
        "second_passes": second_passes,
        "exchanges": exchanges,
        "local_numels": local_numels,
    }


def train_all(rank: int, ranks: int, port: int, folder: Path, replicas: int, saves: bool) -> None:
    """Train under every optimizer as one of ``ranks`` processes.

    The results go to ``<rank>.pt``.
    """
    become(rank, ranks, port)
    dist.init_process_group("gloo")
    if replicas > 1:
        mesh = init_device_mesh("cpu", (replicas, ranks // replicas), mesh_dim_names=("replica", "shard"))
    else:
        mesh = init_device_mesh("cpu", (ranks,))
    results = {
        name: train(
            name, mesh, rank, ranks, folder.parent / f"checkpoint {name}" if saves and name in RESUMED else None
        )
        for name in OPTIMIZERS
    }
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
