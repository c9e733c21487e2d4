"""Draw the loss around a checkpoint, or in the plane through three checkpoints.

    python train.py test --config configs/grok_aga.yaml --ckpt_path <run>/checkpoints/last.ckpt \
        --trainer.callbacks+=callbacks.loss_surface.LossSurface --trainer.callbacks.radius 0.5
    python train.py test --config configs/grok_aga.yaml --ckpt_path <run>/checkpoints/last.ckpt \
        --trainer.callbacks+=callbacks.loss_surface.LossSurface --trainer.callbacks.checkpoints "[<second>, <third>]"
"""

import csv
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from ars2.orthogonalize import stack_shape
from ars2.param_groups import assign
from callbacks.curvature import Vector, dot, random_vectors
from callbacks.lookup import folder_of
from callbacks.module_protocol import TrainedModule, trained
from callbacks.probed_loss import ProbedLoss, batch_statistics, training_batches, unchanged

MARGIN = 0.25  # on each side of three checkpoints, as a part of their extent


class Plane(NamedTuple):
    """Describe a plane by directions, ranges of coordinates and marked checkpoints."""

    directions: tuple[Vector, Vector]
    ranges: tuple[tuple[float, float], tuple[float, float]]
    marks: list[tuple[str, float, float]]


class LossSurface(L.Callback):
    """Evaluate the loss on a grid after testing, and draw it.

    Writes ``loss_surface.csv`` and ``loss_surface.png`` to the run folder. The CSV has ``x``, ``y`` and ``loss``, with
    the tested checkpoint at (0, 0). A W&B logger gets the picture as ``loss_surface``. The parameters are restored bit
    for bit.

    Without ``checkpoints`` the plane has two random directions that are as long as the weights, row by row or filter by
    filter (Li et al. 2018): at x = 1 every filter has moved by its length. Tensors of fewer than two dimensions do
    not move. With ``checkpoints`` it is the plane through the three. The unit is the distance between parameters, the
    second checkpoint lies on the x-axis, and every trainable tensor moves.

    The network is in evaluation mode, but BatchNorm normalises by the batch, since running statistics belong to one
    point.

    Args:
        checkpoints: two more checkpoints of the same network; ``None`` draws around the tested one.
        radius: half the width of the picture around a single checkpoint.
        points: grid points per axis; with an odd number, one of them is the checkpoint.
        split: the split that the batches are from, ``"train"`` or ``"test"``.
        batches: how many of its first batches to use.
        seed: of the random directions, and of random numbers in the batches.

    Raises:
        ValueError: a number out of range, not two checkpoints, checkpoints of another network or on one line, no data
            module, or another subcommand than test.
    """

    changes_training = False

    def __init__(
        self,
        checkpoints: list[str] | None = None,
        radius: float = 1.0,
        points: int = 25,
        split: Literal["train", "test"] = "train",
        batches: int = 1,
        seed: int = 0,
    ) -> None:
        if checkpoints is not None and len(checkpoints) != 2:
            raise ValueError(f"checkpoints must be null or two paths besides the tested one, got {len(checkpoints)}")
        if not 0 < radius < math.inf:
            raise ValueError(f"radius must be above 0, got {radius}")
        for name, value, least in (("points", points, 2), ("batches", batches, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.checkpoints, self.radius, self.points = checkpoints, radius, points
        self.split, self.batches, self.seed = split, batches, seed
        self._batches: list[Any] = []
        self._others: list[tuple[str, dict[str, Tensor]]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check before testing that the surface can be drawn."""
        if stage != "test":
            raise ValueError("LossSurface draws around a tested checkpoint: use it with python train.py test")
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(f"LossSurface needs complete parameters, which {type(trainer.strategy).__name__} shards")
        if self.split == "train" and getattr(trainer, "datamodule", None) is None:
            raise ValueError('LossSurface needs a data module for training batches: give one, or set split to "test"')
        self._others = [(label(path), parameters_in(path, pl_module)) for path in self.checkpoints or []]

    def on_test_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, *_: Any) -> None:
        if self.split == "test" and len(self._batches) < self.batches:
            self._batches.append(apply_to_collection(batch, Tensor, torch.clone))

    @torch.no_grad()
    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.split == "train":
            self._batches = training_batches(trainer, self.batches, self.seed)
        module = trained(trainer, pl_module)
        with unchanged(module), batch_statistics(module.network):
            loss = ProbedLoss(trainer, module, self._batches, self.seed)
            plane = self._plane(loss, module, label(str(trainer.ckpt_path)) if trainer.ckpt_path else "tested")
            axes = [torch.linspace(*ends, self.points, dtype=torch.float64).tolist() for ends in plane.ranges]
            # The checkpoint must be at 0 exactly, despite rounding in the grid.
            axes = [[0.0 if abs(value) < 1e-12 * max(map(abs, axis)) else value for value in axis] for axis in axes]
            first, second = plane.directions
            losses = [
                [loss.at(list(torch._foreach_add(torch._foreach_mul(first, x), second, alpha=y))) for x in axes[0]]
                for y in axes[1]
            ]
        self._batches = []
        self._write(trainer, axes, losses, plane)

    def _plane(self, loss: ProbedLoss, pl_module: TrainedModule, tested: str) -> Plane:
        if self._others:
            return plane_through(loss.start, pl_module, tested, self._others)
        return plane_around(loss.params, pl_module, tested, self.radius, self.seed)

    @rank_zero_only
    def _write(self, trainer: L.Trainer, axes: list[list[float]], losses: list[list[float]], plane: Plane) -> None:
        folder = folder_of(trainer) or Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "loss_surface.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["x", "y", "loss"])
            writer.writerows(
                [x, y, row[i]] for y, row in zip(axes[1], losses, strict=True) for i, x in enumerate(axes[0])
            )
        picture = folder / "loss_surface.png"
        name = "training loss" if self.split == "train" else "test loss"
        alone = ("first random direction", "second random direction")
        units = ("distance between parameters",) * 2 if self._others else alone
        draw(picture, axes, losses, plane.marks, name, units)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("loss_surface", [str(picture)])
        print(f"loss surface: {picture}")


def filter_normalized(direction: Tensor, weights: Tensor, flatten: bool) -> Tensor:
    """Scale every row (filter) of ``direction`` to the length of that of ``weights``.

    Tensors of fewer than two dimensions give zeros.
    """
    if weights.ndim < 2:
        return torch.zeros_like(direction)
    shape = stack_shape(weights.shape, flatten)
    rows, like = direction.reshape(shape), weights.detach().reshape(shape)
    lengths = [torch.linalg.vector_norm(stack, dim=-1, keepdim=True) for stack in (rows, like)]
    return (rows * lengths[1] / lengths[0]).reshape(direction.shape)


def label(path: str) -> str:
    """Name a checkpoint by its experiment and run, if it lies in the folder of one."""
    file = Path(path).resolve()
    return "/".join([*file.parts[-4:-2], file.stem]) if file.parent.name == "checkpoints" else file.stem


def parameters_in(path: str, pl_module: L.LightningModule) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name; they must fit the module's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint, or is from another network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: it is damaged, or from another program") from error
    for name, param in pl_module.named_parameters():
        if name not in state or state[name].shape != param.shape:
            raise ValueError(f"{path} is of another network: its {name} is missing or of another shape")
    return state


def plane_around(params: Vector, pl_module: TrainedModule, tested: str, radius: float, seed: int) -> Plane:
    """Return a plane of two random directions, normalised by filter (Li et al. 2018)."""
    vectors = random_vectors(params, torch.Generator().manual_seed(seed))
    flatten: dict[Tensor, bool] = {item.param: item.flatten for item in assign(pl_module.network, pl_module.policy)}
    first, second = (
        [filter_normalized(x, p, flatten[p]) for x, p in zip(next(vectors), params, strict=True)] for _ in range(2)
    )
    return Plane((first, second), ((-radius, radius), (-radius, radius)), [(tested, 0.0, 0.0)])


def plane_through(
    start: Vector, pl_module: TrainedModule, tested: str, others: list[tuple[str, dict[str, Tensor]]]
) -> Plane:
    """Return the plane through three sets of parameters, with orthonormal directions.

    Raises:
        ValueError: the three lie on one line.
    """
    names = [name for name, param in pl_module.named_parameters() if param.requires_grad]
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
        raise ValueError("the three checkpoints lie on one line and do not span a plane: choose others")
    marks = [(tested, 0.0, 0.0), (others[0][0], length, 0.0), (others[1][0], along, height)]
    ranges = with_margin([x for _, x, _ in marks]), with_margin([y for _, _, y in marks])
    return Plane((first, list(torch._foreach_div(across, height))), ranges, marks)


def with_margin(values: list[float]) -> tuple[float, float]:
    """Return the ends of a range with room around all ``values``."""
    margin = MARGIN * (max(values) - min(values))
    return min(values) - margin, max(values) + margin


def draw(
    path: Path,
    axes: list[list[float]],
    losses: list[list[float]],
    marks: list[tuple[str, float, float]],
    name: str,
    units: tuple[str, str],
) -> None:
    """Draw contours, evenly spaced in the logarithm of the loss, and mark checkpoints."""
    import numpy as np
    from matplotlib.figure import Figure

    values = np.ma.masked_invalid(np.array(losses))
    floor = max(float(values.min()), 1e-12)
    values = np.ma.log10(np.ma.maximum(values, floor))
    figure = Figure(figsize=(7.5, 6), layout="constrained")
    axis = figure.subplots()
    filled = axis.contourf(*axes, values, levels=30, cmap="viridis")
    lines = axis.contour(*axes, values, levels=12, colors="white", linewidths=0.6, alpha=0.7)
    axis.clabel(lines, fmt=lambda level: f"{10**level:.3g}", fontsize=7)
    bar = figure.colorbar(filled, label=name)
    bar.ax.yaxis.set_major_formatter(lambda level, _: f"{10**level:.3g}")
    for (text, x, y), marker in zip(marks, "o^s", strict=False):
        axis.plot(x, y, marker=marker, color="red", markeredgecolor="white", markersize=9, linestyle="none", label=text)
    axis.set(xlabel=units[0], ylabel=units[1])
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    figure.savefig(path, dpi=130)
