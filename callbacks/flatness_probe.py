"""Measures how flat the loss is where training has come to: its Hessian, and how far it rises nearby."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from time import perf_counter
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from ars2.updates import LEAST_NORM
from callbacks.cost_counters import CostCounters
from callbacks.curvature import mean, random_vectors, top_eigenvalue, trace
from callbacks.lookup import callbacks_of
from callbacks.probed_loss import ProbedLoss, unchanged
from modules.two_pass import TwoPassModule

# In gradient evaluations on one batch, by the usual count of floating-point operations: a forward pass is a third of
# one, and differentiating a gradient costs about as much again as making it, twice.
OF_A_LOSS, OF_A_PRODUCT = 1 / 3, 2.0


class FlatnessProbe(L.Callback):
    """Measures the training loss around the parameters on a fixed batch, at chosen epochs, and leaves no trace.

    The batch is the first one (or the first few) that the run trains on; it is kept in checkpoints, so a resumed run
    goes on with it. The loss is the one that the optimizer sees: in training mode, BatchNorm with the batch's own
    statistics, dropout with one fixed mask. It is taken in the parameters' precision, without autocast. Over several
    processes it is the mean of the losses on their batches.

    Writes one row a probe to the loggers, with ``epoch``, the costs if
    :class:`callbacks.cost_counters.CostCounters` is there, and:

    - ``flatness/probe_loss``: at the parameters, in the loss's unit, as all rises;
    - ``flatness/hessian_top``: the largest eigenvalue of the Hessian over all trainable parameters, by Lanczos;
      ``flatness/hessian_top_error``: how far from an eigenvalue that can be;
    - ``flatness/hessian_trace`` by Hutchinson's estimator, and ``flatness/hessian_trace_error``, its standard error;
    - ``flatness/rise_adversarial``: the loss at the optimizer's own adversarial point less the one at the parameters;
      that of ARS2-Neo is ``rho * n / |n|`` from each tensor with ``n = g / (sqrt(v_hat) + eps) * |p|``. An optimizer
      that has none gets the plain one, ``rho * g / |g|`` from each tensor;
    - ``flatness/rise_gradient``: at that plain point, for every optimizer alike: the column to compare optimizers by;
    - ``flatness/rise_random``: the mean over random points, each tensor moved as far as to the adversarial point, and
      ``flatness/rise_random_error``, its standard error;
    - ``flatness/probe_seconds`` and ``flatness/probe_gradient_evaluations``: what this probe took. A loss counts as a
      third of a gradient, a product with the Hessian as two. Neither is part of the run's ``cost/...``.

    A radius is a length in each tensor: a network of T tensors moves by ``rho * sqrt(T)``. No number here is the same
    after a rescaling of the weights that leaves the network's function alone (Dinh et al. 2017).

    Runs without a logger are not looked at. At a run's beginning one product with the Hessian is tried, so that a loss
    that cannot be differentiated twice, or too little memory, shows before anything was trained.

    Args:
        epochs: the period in epochs, or the list of completed epochs after which to look; the end of training is
            always looked at.
        batches: training batches that make the probe batch.
        rho: radius of the rises.
        random_directions: how many random points.
        max_products: most products with the Hessian for the largest eigenvalue, fewer where it is found to a
            thousandth.
        trace_samples: products with the Hessian for the trace.
        seed: of the random vectors and the dropout mask, the same in every probe.

    Raises:
        ValueError: a number out of range, a strategy that does not keep whole parameters on every process, or a loss
            that cannot be differentiated twice.
    """

    changes_training = False

    def __init__(
        self,
        epochs: int | list[int] = 50,
        batches: int = 1,
        rho: float = 0.1,
        random_directions: int = 8,
        max_products: int = 40,
        trace_samples: int = 16,
        seed: int = 0,
    ) -> None:
        counts = {"batches": batches, "random_directions": random_directions}
        counts |= {"max_products": max_products, "trace_samples": trace_samples}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if min([epochs] if isinstance(epochs, int) else epochs, default=1) < 1:
            raise ValueError(f"epochs must be a period or a list of numbers, each at least 1, got {epochs}")
        if not 0 < rho < math.inf:
            raise ValueError(f"rho must be above 0, got {rho}")
        self.epochs, self.batches, self.rho, self.seed = epochs, batches, rho, seed
        self.random_directions, self.max_products, self.trace_samples = random_directions, max_products, trace_samples
        self._batches: list[Any] = []
        self._probed_at = 0
        self._checked = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(
                "the flatness probe needs whole parameters on every process, which"
                f" {type(trainer.strategy).__name__} does not keep: train on one device or with DDP"
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if len(self._batches) < self.batches:
            self._batches.append(apply_to_collection(batch, Tensor, torch.clone))
        if len(self._batches) == self.batches and not self._checked and trainer.loggers:
            self._checked = True
            with self._aside(trainer, pl_module) as loss:
                loss.check()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        done = trainer.current_epoch + 1
        if done % self.epochs == 0 if isinstance(self.epochs, int) else done in self.epochs:
            self._log(trainer, pl_module, trainer.current_epoch)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_step != self._probed_at:
            self._log(trainer, pl_module, max(0, trainer.current_epoch - 1))

    def _log(self, trainer: L.Trainer, pl_module: TwoPassModule, epoch: int) -> None:
        if not self._batches or not trainer.loggers:
            return
        row = {"epoch": float(epoch)} | self.probe(trainer, pl_module)
        for counters in callbacks_of(trainer, CostCounters):
            row |= counters.costs(trainer, pl_module)
        self._probed_at = trainer.global_step
        for logger in trainer.loggers:
            # The number of the last batch, as in Lightning's rows of an epoch's end.
            logger.log_metrics(row, trainer.fit_loop.total_batch_idx)

    def probe(self, trainer: L.Trainer, pl_module: TwoPassModule) -> dict[str, float]:
        """Measure at the parameters as they are; returns the columns by log key."""
        with self._aside(trainer, pl_module) as loss:
            start = perf_counter()
            row = self._measure(loss)
            return row | {"flatness/probe_seconds": perf_counter() - start}

    @contextmanager
    def _aside(self, trainer: L.Trainer, pl_module: Any) -> Iterator[ProbedLoss]:
        """A block that is no part of training: neither its state nor its costs."""
        with ExitStack() as stack:
            for counters in callbacks_of(trainer, CostCounters):
                stack.enter_context(counters.paused(pl_module))
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            stack.enter_context(unchanged(pl_module))
            yield ProbedLoss(trainer, pl_module, self._batches, self.seed)

    def _measure(self, loss: ProbedLoss) -> dict[str, float]:
        vectors = random_vectors(loss.params, torch.Generator().manual_seed(self.seed))
        here, gradient, product = loss.twice()
        top = top_eigenvalue(product, next(vectors), self.max_products, tolerance=1e-3)
        traced = trace(product, vectors, self.trace_samples)
        # The graph of the gradient is as large as that of a training step.
        del product
        plain = [scaled(g, self.rho) for g in gradient]
        moves = {"adversarial": loss.optimizers_move(gradient, self.rho) or plain, "gradient": plain}
        rises = {name: loss.at(move) - here for name, move in moves.items()}
        lengths = [move.norm() for move in moves["adversarial"]]
        random = mean(
            [
                loss.at([scaled(x, length) for x, length in zip(vector, lengths, strict=True)]) - here
                for vector in islice(vectors, self.random_directions)
            ]
        )
        products = top.products + self.trace_samples
        evaluations = 1 + products * OF_A_PRODUCT + (len(rises) + self.random_directions) * OF_A_LOSS
        return {
            "flatness/probe_loss": here,
            "flatness/hessian_top": top.value,
            "flatness/hessian_top_error": top.error,
            "flatness/hessian_trace": traced.value,
            "flatness/hessian_trace_error": traced.error,
            **{f"flatness/rise_{name}": rise for name, rise in rises.items()},
            "flatness/rise_random": random.value,
            "flatness/rise_random_error": random.error,
            "flatness/probe_gradient_evaluations": evaluations * len(self._batches),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"batches": move_data_to_device(self._batches, torch.device("cpu")), "probed_at": self._probed_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._batches, self._probed_at = state_dict["batches"], state_dict["probed_at"]


def scaled(tensor: Tensor, length: Tensor | float) -> Tensor:
    """Return ``tensor`` at the given length; one of zeros stays zero."""
    return tensor * (length / (tensor.norm().clamp_min(LEAST_NORM)))
