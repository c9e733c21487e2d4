"""Measure how robust the loss of a tested network is to changes of its weights."""

import math
from itertools import chain, islice
from time import perf_counter
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor

from ars2.orthogonalize import stack_shape
from ars2.param_groups import assign
from callbacks.curvature import Vector, mean, random_vectors, top_eigenvalue
from callbacks.flatness_probe import scaled
from callbacks.module_protocol import TrainedModule, trained
from callbacks.probed_loss import ProbedLoss, training_batches, unchanged


class RobustnessProbe(L.Callback):
    """Measure at the end of a test the loss after changes of the weights.

    Training and the test are not affected: the parameters are restored bit for bit. The values are logged beside those
    of the test. The network is in evaluation mode, with BatchNorm's stored statistics, and in the precision of the
    parameters. The changed weights are the trainable tensors of two dimensions or more, including embeddings and the
    output head. Biases and gains stay.

    On the first test batches:

    - ``robustness/loss``: with the weights as they are;
    - ``robustness/loss_8_bit``, ``robustness/loss_4_bit``: with every row of a weight, the weights of one output,
      rounded to the nearest of ``2**bits - 1`` levels. They are symmetric around zero, up to the largest weight of the
      row. Activations are not rounded;
    - ``robustness/loss_noise``: mean over several draws of normal noise, whose standard deviation is a fraction of the
      root mean square of each tensor; ``robustness/loss_noise_error``: its standard error.

    On the first batches of training, in evaluation mode, over all trainable parameters:

    - ``robustness/train_loss``;
    - ``robustness/hessian_top``: the largest eigenvalue of the Hessian; ``robustness/hessian_top_error``: how far an
      eigenvalue can be from it;
    - ``robustness/rise_gradient``: the rise of the loss where each tensor has moved by ``rho`` along its gradient.

    ``robustness/probe_seconds`` is the duration.

    Args:
        batches: number of test batches.
        bits: numbers of bits to round to.
        noise: standard deviation of the noise, as a fraction of a tensor's root mean square.
        noise_draws: number of draws.
        train_batches: number of training batches.
        max_products: most products with the Hessian; 0 leaves out the values on training batches.
        rho: distance in every tensor of the rise along the gradient.
        seed: of all random numbers.

    Raises:
        ValueError: a number out of range, several devices, no data module for training batches, or a loss that cannot
            be differentiated twice.
    """

    changes_training = False

    def __init__(
        self,
        batches: int = 40,
        bits: tuple[int, ...] = (8, 4),
        noise: float = 0.2,
        noise_draws: int = 4,
        train_batches: int = 1,
        max_products: int = 20,
        rho: float = 0.1,
        seed: int = 0,
    ) -> None:
        counts = {"batches": batches, "noise_draws": noise_draws, "train_batches": train_batches}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if max_products < 0:
            raise ValueError(f"max_products must be at least 0, got {max_products}")
        if min(bits, default=2) < 2:
            raise ValueError(f"bits must be numbers of at least 2, got {', '.join(map(str, bits))}")
        for name, length in (("noise", noise), ("rho", rho)):
            if not 0 < length < math.inf:
                raise ValueError(f"{name} must be above 0, got {length}")
        self.batches, self.bits, self.noise, self.noise_draws = batches, bits, noise, noise_draws
        self.train_batches, self.max_products, self.rho, self.seed = train_batches, max_products, rho, seed

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        check_single_device(trainer, "RobustnessProbe")
        if self.max_products and getattr(trainer, "datamodule", None) is None:
            raise ValueError("RobustnessProbe needs a data module for training batches: give one, or max_products 0")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log_dict(self.probe(trainer, pl_module), batch_size=1)

    # Lightning tests in inference mode, whose tensors have no gradients.
    @torch.inference_mode(False)
    @torch.no_grad()
    def probe(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        """Return the measurements by log key."""
        start, module = perf_counter(), trained(trainer, pl_module)
        with unchanged(module):
            row = self._changed_weights(
                ProbedLoss(trainer, module, first_test_batches(trainer, self.batches), self.seed)
            )
            if self.max_products:
                batches = training_batches(trainer, self.train_batches, self.seed)
                row |= self._around(ProbedLoss(trainer, module, batches, self.seed))
        return row | {"robustness/probe_seconds": perf_counter() - start}

    def _changed_weights(self, loss: ProbedLoss) -> dict[str, float]:
        row = {"robustness/loss": loss.here()}
        for bits in self.bits:
            row[f"robustness/loss_{bits}_bit"] = loss.at(rounding(loss.params, loss.module, bits))
        vectors = random_vectors(loss.params, torch.Generator().manual_seed(self.seed))
        draws = [loss.at(relative_noise(loss.params, next(vectors), self.noise)) for _ in range(self.noise_draws)]
        noisy = mean(draws)
        return row | {"robustness/loss_noise": noisy.value, "robustness/loss_noise_error": noisy.error}

    def _around(self, loss: ProbedLoss) -> dict[str, float]:
        loss.check()
        here, gradient, product = loss.with_hessian()
        start = next(random_vectors(loss.params, torch.Generator().manual_seed(self.seed)))
        top = top_eigenvalue(product, start, self.max_products, tolerance=1e-3)
        rise = loss.at([scaled(g, self.rho) for g in gradient]) - here
        return {
            "robustness/train_loss": here,
            "robustness/hessian_top": top.value,
            "robustness/hessian_top_error": top.error,
            "robustness/rise_gradient": rise,
        }


def check_single_device(trainer: L.Trainer, name: str) -> None:
    """Refuse a strategy of several processes, for a callback that works in one."""
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        strategy = type(trainer.strategy).__name__
        raise ValueError(f"{name} works on one device, not with {strategy}: set trainer.devices to 1, or remove it")


def first_test_batches(trainer: L.Trainer, count: int) -> list[Any]:
    """Return the first ``count`` batches of the test, on the device."""
    loaders = zip(CombinedLoader(trainer.test_dataloaders).flattened, trainer.num_test_batches, strict=True)
    batches = chain.from_iterable(islice(loader, int(min(length, count))) for loader, length in loaders)
    return [trainer.strategy.batch_to_device(batch) for batch in islice(batches, count)]


def rounding(params: Vector, module: TrainedModule, bits: int) -> Vector:
    """Return the offset from ``params`` to the weights rounded row by row."""
    flatten: dict[Tensor, bool] = {item.param: item.flatten for item in assign(module.network, module.policy)}
    return [rounded(p, bits, flatten[p]) - p if p.ndim > 1 else torch.zeros_like(p) for p in params]


def rounded(weights: Tensor, bits: int, flatten: bool = False) -> Tensor:
    """Return weights with each row rounded to the nearest of ``2**bits - 1`` levels.

    Args:
        weights: (..., rows, columns) or (outputs, inputs, height, width).
        bits: the levels are the products of a step and the integers of this many bits, the most negative excepted.
        flatten: whether three dimensions are a kernel and not a stack, see :class:`ars2.param_groups.Assignment`.
    """
    rows = weights.reshape(stack_shape(weights.shape, flatten))
    step = rows.abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1)
    levels = (rows / torch.where(step > 0, step, 1.0)).round()
    return (levels * step).reshape(weights.shape)


def relative_noise(params: Vector, vector: Vector, fraction: float) -> Vector:
    """Return normal noise relative to the root mean square of each weight.

    Tensors of fewer than two dimensions get none.
    """
    pairs = zip(params, vector, strict=True)
    return [x * (fraction * p.square().mean().sqrt()) if p.ndim > 1 else torch.zeros_like(p) for p, x in pairs]
