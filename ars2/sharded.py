"""Parameters of which every process holds some rows: DTensors, as FSDP2's fully_shard makes them.

The optimizer works on each process' own rows. What needs a whole tensor is put together among the processes that hold
it: norms and inner products by an all-reduce of the sums over the rows, orthogonal factors as
:func:`ars2.sharing.orthogonalize_sharded` does. Rows are dealt out as torch.chunk does it, so that the last processes
may hold fewer, or none.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Say whether ``tensor`` is a DTensor."""
    # Importing it takes seconds, and whoever has a DTensor has imported it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of ``tensor``, in the same memory: its rows, or all of it if it is no DTensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def like(param: Tensor, value: Tensor) -> Tensor:
    """Return ``value``, which may be whole on every process, sharded as ``param`` is."""
    if not is_sharded(param) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    # Every process takes its rows of what it has: nothing is sent.
    return distribute_tensor(value.to(param.device), mesh, placements, src_data_rank=None)


def same_layout(tensor: Tensor, param: Tensor) -> bool:
    """Say whether a DTensor is laid out over the processes just as ``param`` is."""
    if not is_sharded(tensor):
        return False
    mine: tuple[Any, Any] = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    theirs: tuple[Any, Any] = param.device_mesh, param.placements  # type: ignore[attr-defined]
    return mine == theirs


class Shards(NamedTuple):
    """The processes that hold the rows of every parameter, and the dtype in which matrices travel (``None``: theirs).

    With replicas (a mesh of replicas and shards) it is the processes of one replica.
    """

    group: dist.ProcessGroup
    dtype: torch.dtype | None = None

    def numels(self, shape: Sequence[int]) -> list[int]:
        """Return how many entries of a tensor of ``shape`` each process holds."""
        ranks = dist.get_world_size(self.group)
        most, width = -(-shape[0] // ranks), torch.Size(shape[1:]).numel()
        return [max(0, min(most, shape[0] - rank * most)) * width for rank in range(ranks)]

    def all_reduce_norms(
        self, products: Sequence[Tensor], lengths: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Turn numbers about this process' rows into those about whole tensors; one all-reduce, in float64.

        Every process gets the same, to the bit.

        Args:
            products: inner products, or other sums over entries, tensors of any shapes.
            lengths: Euclidean norms, tensors of any shapes.

        Returns:
            Both, in the given shapes and dtypes.
        """
        numbers = [*(p.double() for p in products), *(length.double().square() for length in lengths)]
        if not numbers:
            return [], []
        total = torch.cat([number.flatten() for number in numbers])
        dist.all_reduce(total, group=self.group)
        parts = total.split([number.numel() for number in numbers])
        split = len(products)
        return (
            [part.view_as(given).to(given.dtype) for part, given in zip(parts[:split], products, strict=True)],
            [part.sqrt().view_as(given).to(given.dtype) for part, given in zip(parts[split:], lengths, strict=True)],
        )


def find_shards(named: Iterable[tuple[str, Tensor]]) -> Shards | None:
    """Return the processes among which all these parameters are sharded; ``None`` if every one is whole.

    Raises:
        ValueError: some are sharded and some whole, they are sharded over different processes, or in another way than
            by rows.
    """
    found: Shards | None = None
    first: tuple[str, Any] | None = None
    whole: str | None = None
    for name, param in named:
        if not is_sharded(param):
            whole = whole or name
            continue
        mesh: Any = param.device_mesh  # type: ignore[attr-defined]
        if first is None:
            first = name, mesh
            found = Shards(mesh.get_group(_sharding_dimension(name, param)))
        elif mesh != first[1]:
            raise ValueError(f"parameters {first[0]} and {name} are sharded over different meshes: use one for all")
        _check_rows(name, param, found)  # type: ignore[arg-type]
    if first is not None and whole is not None:
        raise ValueError(
            f"parameter {first[0]} is sharded and parameter {whole} is not: call fully_shard on the whole network"
            " before the optimizer is made, with no parameters left out"
        )
    return found


def _sharding_dimension(name: str, param: Any) -> int:
    """Return the dimension of the mesh along which ``param`` is sharded by rows."""
    from torch.distributed.tensor import Replicate, Shard

    # Not by isinstance: what FSDP2 makes of a parameter that is tensor-parallel already is a Shard by another order.
    shards = [i for i, placement in enumerate(param.placements) if type(placement) is Shard and placement.dim == 0]
    others = [p for i, p in enumerate(param.placements) if i not in shards and not isinstance(p, Replicate)]
    if len(shards) != 1 or others:
        raise ValueError(
            f"parameter {name} is laid out as {param.placements}, which is not supported: shard it by its first"
            " dimension alone, as fully_shard does, with or without replicas, and without tensor parallelism"
        )
    return shards[0]


def _check_rows(name: str, param: Any, shards: Shards) -> None:
    _sharding_dimension(name, param)
    mine = shards.numels(param.shape)[dist.get_rank(shards.group)]
    if local(param).numel() != mine:
        raise ValueError(
            f"parameter {name} of shape {tuple(param.shape)} has {local(param).numel()} entries on this process"
            f" where torch.chunk would put {mine}: such an uneven layout is not supported"
        )
