"""Planes in the space of a network's parameters: around one checkpoint, or through three."""

import math
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as L
import torch
from torch import Tensor

from ars2.param_groups import assign
from ars2.updates import as_stack
from callbacks.curvature import Vector, dot, random_vectors
from modules.two_pass import TwoPassModule

MARGIN = 0.25  # of the extent of three checkpoints, beyond them on each side


class Plane(NamedTuple):
    """Two directions in the space of parameters, the range of each coordinate, and what is marked in the picture."""

    directions: tuple[Vector, Vector]
    ranges: tuple[tuple[float, float], tuple[float, float]]
    marks: list[tuple[str, float, float]]


def as_long(direction: Tensor, weights: Tensor, flatten: bool) -> Tensor:
    """Return ``direction`` with every row (filter) as long as that of ``weights``; zero below two dimensions."""
    if weights.ndim < 2:
        return torch.zeros_like(direction)
    rows, like = as_stack(direction, flatten), as_stack(weights.detach(), flatten)
    lengths = [torch.linalg.vector_norm(stack, dim=-1, keepdim=True) for stack in (rows, like)]
    return (rows * lengths[1] / lengths[0]).reshape(direction.shape)


def label(path: str) -> str:
    """Name a checkpoint by its experiment and run, if it lies in the folder of one."""
    file = Path(path).resolve()
    return "/".join([*file.parts[-4:-2], file.stem]) if file.parent.name == "checkpoints" else file.stem


def parameters_in(path: str, pl_module: L.LightningModule) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint that ``pl_module`` has as parameters, by its names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, or one of another network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: it is damaged, or another program's") from error
    for name, param in pl_module.named_parameters():
        if name not in state or state[name].shape != param.shape:
            raise ValueError(f"{path} is of another network: its {name} is missing or of another shape")
    return state


def plane_around(params: Vector, pl_module: TwoPassModule, tested: str, radius: float, seed: int) -> Plane:
    """Return the plane of two random directions that are as long as the weights, filter by filter (Li et al. 2018)."""
    vectors = random_vectors(params, torch.Generator().manual_seed(seed))
    flatten: dict[Tensor, bool] = {item.param: item.flatten for item in assign(pl_module.network, pl_module.policy)}
    first, second = ([as_long(x, p, flatten[p]) for x, p in zip(next(vectors), params, strict=True)] for _ in range(2))
    return Plane((first, second), ((-radius, radius), (-radius, radius)), [(tested, 0.0, 0.0)])


def plane_through(
    start: Vector, pl_module: TwoPassModule, tested: str, others: list[tuple[str, dict[str, Tensor]]]
) -> Plane:
    """Return the plane through ``start`` and two other sets of parameters, with orthonormal directions.

    Raises:
        ValueError: the three lie on one line.
    """
    names = [f"network.{name}" for name, param in pl_module.network.named_parameters() if param.requires_grad]
    vectors = [
        [state[name].to(here.device, here.dtype) - here for name, here in zip(names, start, strict=True)]
        for _, state in others
    ]
    length = math.sqrt(dot(vectors[0], vectors[0]))
    full = math.sqrt(dot(vectors[1], vectors[1]))
    first = list(torch._foreach_div(vectors[0], length or 1.0))
    along = dot(first, vectors[1])
    across = list(torch._foreach_sub(vectors[1], torch._foreach_mul(first, along)))
    height = math.sqrt(dot(across, across))
    if length == 0 or height <= 1e-5 * max(full, length):
        raise ValueError("the three checkpoints lie on one line and span no plane: name others")
    marks = [(tested, 0.0, 0.0), (others[0][0], length, 0.0), (others[1][0], along, height)]
    ranges = with_margin([x for _, x, _ in marks]), with_margin([y for _, _, y in marks])
    return Plane((first, list(torch._foreach_div(across, height))), ranges, marks)


def with_margin(values: list[float]) -> tuple[float, float]:
    """Return the ends of a range that has room around all ``values``."""
    margin = MARGIN * (max(values) - min(values))
    return min(values) - margin, max(values) + margin
