"""Measure how flat the loss is around the parameters that training has reached."""

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

from callbacks.cost_counters import CostCounters
from callbacks.curvature import mean, random_vectors, top_eigenvalue, trace
from callbacks.lookup import callbacks_of
from callbacks.module_protocol import trained
from callbacks.probed_loss import ProbedLoss, unchanged

# Costs in gradient evaluations on one batch, by the usual count of operations: a forward pass is a third of a gradient,
# and a product with the Hessian is about two gradients.
LOSS_COST, PRODUCT_COST = 1 / 3, 2.0


class FlatnessProbe(L.Callback):
    """Measure the training loss around the parameters at chosen epochs.

    Training is not affected. The probe batch is the first batch, or the first few, that the run trains on. It is kept
    in checkpoints, so that a resumed run continues with it. The loss is the one that the optimizer minimises: in
    training mode, with BatchNorm statistics of the batch and one fixed dropout mask. It is computed in the precision of
    the parameters, without autocast. With several processes it is the mean of the losses on their batches.

    Each probe writes one row to the loggers, with ``epoch``, the costs if
    :class:`callbacks.cost_counters.CostCounters` is in use, and:

    - ``flatness/probe_loss``: at the parameters. The rises below are in the same unit;
    - ``flatness/hessian_top``: the largest eigenvalue of the Hessian over all trainable parameters, by Lanczos'
      method; ``flatness/hessian_top_error``: how far an eigenvalue can be from it;
    - ``flatness/hessian_trace``, by Hutchinson's estimator, and ``flatness/hessian_trace_error``, its standard error;
    - ``flatness/rise_adversarial``: the loss at the optimizer's adversarial point minus that at the parameters. For
      ARS2-Neo the point is ``rho * n / |n|`` from each tensor with ``n = g / (sqrt(v_hat) + eps) * |p|``. For an
      optimizer without such a point it is the plain one, ``rho * g / |g|`` from each tensor;
    - ``flatness/rise_gradient``: at the plain point for every optimizer, to compare optimizers by;
    - ``flatness/rise_random``: the mean over random points, where each tensor moves as far as to the adversarial point,
      and ``flatness/rise_random_error``, its standard error;
    - ``flatness/probe_seconds`` and ``flatness/probe_gradient_evaluations``: the cost of this probe. A loss counts as a
      third of a gradient, a product with the Hessian as two gradients. Neither is part of the run's ``cost/...``.

    A radius is a length in each tensor: a network of T tensors moves by ``rho * sqrt(T)``. All values change under a
    rescaling of the weights that leaves the network's function unchanged (Dinh et al. 2017).

    Runs without a logger are not probed. Before the first step, one product with the Hessian is computed. A loss that
    cannot be differentiated twice, or too little memory, thus fails before anything was trained.

    Args:
        epochs: the period in epochs, or the list of completed epochs after which to probe. The end of training is
            always probed.
        batches: training batches that form the probe batch.
        rho: radius of the rises.
        random_directions: number of random points.
        max_products: most products with the Hessian for the largest eigenvalue; fewer are made where it is found to a
            thousandth.
        trace_samples: products with the Hessian for the trace.
        seed: of the random vectors and the dropout mask, the same in every probe.

    Raises:
        ValueError: a number out of range, a strategy that shards parameters, or a loss that cannot be differentiated
            twice.
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
                "the flatness probe needs complete parameters on every process, which"
                f" {type(trainer.strategy).__name__} shards: train on one device or with DDP"
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if len(self._batches) < self.batches:
            self._batches.append(apply_to_collection(batch, Tensor, torch.clone))
        if len(self._batches) == self.batches and not self._checked and trainer.loggers:
            self._checked = True
            with self._isolated(trainer, pl_module) as loss:
                loss.check()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        done = trainer.current_epoch + 1
        if done % self.epochs == 0 if isinstance(self.epochs, int) else done in self.epochs:
            self._log(trainer, pl_module, trainer.current_epoch)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_step != self._probed_at:
            self._log(trainer, pl_module, max(0, trainer.current_epoch - 1))

    def _log(self, trainer: L.Trainer, pl_module: Any, epoch: int) -> None:
        if not self._batches or not trainer.loggers:
            return
        row = {"epoch": float(epoch)} | self.probe(trainer, pl_module)
        for counters in callbacks_of(trainer, CostCounters):
            row |= counters.costs(trainer, pl_module)
        self._probed_at = trainer.global_step
        for logger in trainer.loggers:
            # Lightning's rows of an epoch's end have the number of the last batch, too.
            logger.log_metrics(row, trainer.fit_loop.total_batch_idx)

    def probe(self, trainer: L.Trainer, pl_module: Any) -> dict[str, float]:
        """Return the measurements at the current parameters by log key."""
        with self._isolated(trainer, pl_module) as loss:
            start = perf_counter()
            row = self._measure(loss)
            return row | {"flatness/probe_seconds": perf_counter() - start}

    @contextmanager
    def _isolated(self, trainer: L.Trainer, pl_module: Any) -> Iterator[ProbedLoss]:
        """Exclude a block from the state and the costs of training."""
        with ExitStack() as stack:
            for counters in callbacks_of(trainer, CostCounters):
                stack.enter_context(counters.paused(pl_module))
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            module = trained(trainer, pl_module)
            stack.enter_context(unchanged(module))
            yield ProbedLoss(trainer, module, self._batches, self.seed)

    def _measure(self, loss: ProbedLoss) -> dict[str, float]:
        vectors = random_vectors(loss.params, torch.Generator().manual_seed(self.seed))
        here, gradient, product = loss.with_hessian()
        top = top_eigenvalue(product, next(vectors), self.max_products, tolerance=1e-3)
        traced = trace(product, vectors, self.trace_samples)
        # Free the graph of the gradient, which is as large as that of a training step.
        del product
        plain = [scaled(g, self.rho) for g in gradient]
        offsets = {"adversarial": loss.adversarial_offset(gradient, self.rho) or plain, "gradient": plain}
        rises = {name: loss.at(offset) - here for name, offset in offsets.items()}
        lengths = [offset.norm() for offset in offsets["adversarial"]]
        random = mean(
            [
                loss.at([scaled(x, length) for x, length in zip(vector, lengths, strict=True)]) - here
                for vector in islice(vectors, self.random_directions)
            ]
        )
        products = top.products + self.trace_samples
        evaluations = 1 + products * PRODUCT_COST + (len(rises) + self.random_directions) * LOSS_COST
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
    """Return ``tensor`` scaled to the given length; a tensor of zeros stays zero."""
    return tensor * (length / (tensor.norm().clamp_min(torch.finfo(tensor.dtype).tiny)))
