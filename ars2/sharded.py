"""Handle parameters sharded by rows, the DTensors of FSDP2's fully_shard.

The optimizer works on the local rows. Ranks exchange only what needs full tensors: an all-reduce of sums gives norms
and inner products, and :func:`ars2.sharing.orthogonalize_sharded` gives orthogonal factors. The rows are split as by
torch.chunk, so the last ranks may have fewer rows, or none.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Return whether ``tensor`` is a DTensor."""
    # The import takes seconds, and a DTensor exists only after it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the local rows of a DTensor (same memory), or another tensor unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def like(param: Tensor, value: Tensor) -> Tensor:
    """Return ``value`` sharded as ``param``; ``value`` may be replicated on all ranks."""
    if not is_sharded(param) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    # Every process slices its rows; no communication.
    return distribute_tensor(value.to(param.device), mesh, placements, src_data_rank=None)


def same_layout(tensor: Tensor, param: Tensor) -> bool:
    """Return whether ``tensor`` is a DTensor with mesh and placements of ``param``."""
    if not is_sharded(tensor):
        return False
    layout: tuple[Any, Any] = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    expected: tuple[Any, Any] = param.device_mesh, param.placements  # type: ignore[attr-defined]
    return layout == expected


class Shards(NamedTuple):
    """Describe the processes among which parameters are sharded.

    ``dtype`` is the dtype in which matrices are sent; ``None`` keeps their dtype. With a mesh of replicas and
    shards, the group contains the processes of one replica.
    """

    group: dist.ProcessGroup
    dtype: torch.dtype | None = None

    def numels(self, shape: Sequence[int]) -> list[int]:
        """Return each process' number of entries in a tensor of ``shape``."""
        ranks = dist.get_world_size(self.group)
        most, width = -(-shape[0] // ranks), torch.Size(shape[1:]).numel()
        return [max(0, min(most, shape[0] - rank * most)) * width for rank in range(ranks)]

    def all_reduce_norms(
        self, products: Sequence[Tensor], lengths: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Reduce inner products and norms of local rows to those of full tensors.

        One all-reduce in float64. Every process gets the same result, bit for bit.

        Args:
            products: inner products or other sums over entries, tensors of any shapes.
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
    """Return the processes among which all these parameters are sharded.

    The result is ``None`` if no parameter is sharded.

    Raises:
        ValueError: only some are sharded, over different processes, or not by rows.
    """
    found: Shards | None = None
    first: tuple[str, Any] | None = None
    unsharded: str | None = None
    for name, param in named:
        if not is_sharded(param):
            unsharded = unsharded or name
            continue
        mesh: Any = param.device_mesh  # type: ignore[attr-defined]
        if first is None:
            first = name, mesh
            found = Shards(mesh.get_group(_sharding_dimension(name, param)))
        elif mesh != first[1]:
            raise ValueError(f"parameters {first[0]} and {name} are sharded over different meshes: use one for all")
        _check_rows(name, param, found)  # type: ignore[arg-type]
    if first is not None and unsharded is not None:
        raise ValueError(
            f"parameter {first[0]} is sharded and parameter {unsharded} is not: call fully_shard on the complete"
            " network before making the optimizer"
        )
    return found


def _sharding_dimension(name: str, param: Any) -> int:
    """Return the dimension of the mesh along which ``param`` is sharded by rows."""
    from torch.distributed.tensor import Replicate, Shard

    # Not isinstance: FSDP2 gives tensor-parallel parameters a subclass of Shard with another order of rows.
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
    expected = shards.numels(param.shape)[dist.get_rank(shards.group)]
    if local(param).numel() != expected:
        raise ValueError(
            f"parameter {name} of shape {tuple(param.shape)} has {local(param).numel()} entries on this process"
            f" where torch.chunk would put {expected}: use a layout such as that of fully_shard"
        )
