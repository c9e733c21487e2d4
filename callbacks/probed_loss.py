"""Evaluate the training loss as a function of the parameters."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from ars2.replay import frozen_statistics, random_state
from callbacks.curvature import Vector, twice_differentiable
from callbacks.module_protocol import TrainedModule
from experiment.library_internals import NormBase


@contextmanager
def unchanged(pl_module: TrainedModule) -> Iterator[None]:
    """Restore parameters, gradients, buffers and random states after a block."""
    tensors = [*pl_module.parameters(), *pl_module.buffers()]
    kept = [tensor.detach().clone() for tensor in tensors]
    gradients = [(param, param.grad) for param in pl_module.parameters()]
    restore = random_state(pl_module.device)  # isolate_rng() covers only CPU and CUDA.
    try:
        with isolate_rng(), frozen_statistics(pl_module.network), twice_differentiable():
            yield
    finally:
        restore()
        with torch.no_grad():
            for tensor, copy in zip(tensors, kept, strict=True):
                tensor.copy_(copy)
        for param, gradient in gradients:
            param.grad = gradient


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[None]:
    """Let BatchNorm layers normalise by the batch in a block, in any mode."""
    norms = [(module, module.training) for module in network.modules() if isinstance(module, NormBase)]
    for norm, _ in norms:
        norm.training = True
    try:
        yield
    finally:
        for norm, training in norms:
            norm.training = training


def training_batches(trainer: L.Trainer, count: int, seed: int) -> list[Any]:
    """Return the first batches that the data module gives to train on, on the device.

    Args:
        trainer: of a test, with a data module.
        count: of batches; fewer if an epoch has fewer.
        seed: of the random numbers that the data module draws from the global generators.
    """
    data: L.LightningDataModule = trainer.datamodule  # type: ignore[attr-defined]
    with isolate_rng():
        torch.manual_seed(seed)
        data.setup("fit")
        batches = list(islice(data.train_dataloader(), count))
    return [trainer.strategy.batch_to_device(batch) for batch in batches]


def nodes(outputs: Iterable[Tensor]) -> Iterator[Any]:
    """Yield every node of the graph that computed ``outputs``, once."""
    waiting: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        waiting += new


class ProbedLoss:
    """Evaluate the mean loss of batches as a function of the trainable parameters.

    Use it inside :func:`unchanged`. Over several processes it is the mean of the losses on their batches.

    Args:
        trainer: of the run.
        pl_module: of the run.
        batches: as the module's ``compute_loss`` takes them, on any device.
        seed: of the random numbers in the loss, as in dropout, which are the same in every evaluation.
    """

    def __init__(self, trainer: L.Trainer, pl_module: TrainedModule, batches: list[Any], seed: int) -> None:
        self.trainer, self.module, self.seed = trainer, pl_module, seed
        self.batches = move_data_to_device(batches, pl_module.device)
        self.params: Vector = [param for param in pl_module.network.parameters() if param.requires_grad]
        self.start = [param.detach().clone() for param in self.params]

    def _mean(self, value: Any) -> Any:
        return self.trainer.strategy.reduce(value, reduce_op="mean")

    def _local(self) -> Tensor:
        sizes = [self.module.batch_size(batch) for batch in self.batches]
        # Other random numbers in dropout would make it another function.
        with isolate_rng():
            torch.manual_seed(self.seed)
            losses = [self.module.compute_loss(b, None) * size for b, size in zip(self.batches, sizes, strict=True)]
        return torch.stack(losses).sum() / sum(sizes)

    @torch.no_grad()
    def here(self) -> float:
        """Return the loss at the parameters."""
        return float(self._mean(self._local()).item())

    @torch.no_grad()
    def at(self, offset: Vector) -> float:
        """Return the loss at an offset from the parameters, which are then restored."""
        torch._foreach_add_(self.params, offset)
        loss = self.here()
        torch._foreach_copy_(self.params, self.start)
        return loss

    def with_hessian(self) -> tuple[float, Vector, Callable[[Vector], Vector]]:
        """Return the loss, its gradient, and the product of its Hessian with a vector."""
        with torch.enable_grad():
            loss = self._local()
            # Without a factor that requires a gradient, torch silently treats a function that can be differentiated
            # only once as linear.
            one = torch.ones_like(loss).requires_grad_()
            gradient = torch.autograd.grad(loss, self.params, one, create_graph=True, materialize_grads=True)
        if any(type(node).__name__ == "Error" for node in nodes(gradient)):
            raise NotImplementedError("a part of it has a derivative that was marked as once_differentiable")

        def product(vector: Vector) -> Vector:
            pairs = [(g, v) for g, v in zip(gradient, vector, strict=True) if g.requires_grad]
            if not pairs:
                return [torch.zeros_like(v) for v in vector]
            outputs, weights = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, self.params, weights, retain_graph=True, materialize_grads=True)
            return [self._mean(tensor.detach()) for tensor in found]

        return (
            float(self._mean(loss.detach().clone()).item()),
            [self._mean(g.detach().clone()) for g in gradient],
            product,
        )

    def check(self) -> None:
        """Multiply by the Hessian once, to see whether that is possible.

        Raises:
            ValueError: the loss has a part that cannot be differentiated twice.
        """
        try:
            self.with_hessian()[2](self.start)
        except RuntimeError as error:  # NotImplementedError is a subclass.
            reason = str(error).strip().splitlines()[0]
            if not any(word in reason for word in ("differentia", "derivative", "double backward")):
                raise
            raise ValueError(
                f"the Hessian needs a loss that can be differentiated twice, which this one cannot: {reason}"
            ) from error

    @torch.no_grad()
    def adversarial_offset(self, gradient: Vector, rho: float) -> Vector | None:
        """Return the offset of the optimizer's adversarial point, or ``None``."""
        optimizer: Any = self.trainer.optimizers[0]
        if not hasattr(optimizer, "perturb"):
            return None
        before = [dict(group) for group in optimizer.param_groups]
        for param, tensor in zip(self.params, gradient, strict=True):
            param.grad = tensor.clone()
        for group in optimizer.param_groups:
            group.update(rho=rho, relative_rho=False, rho_per_step=False)
        try:
            optimizer.wants_second_pass()
            optimizer.perturb()
            try:
                return [param - start for param, start in zip(self.params, self.start, strict=True)]
            finally:
                optimizer.restore()
                optimizer.wants_second_pass()  # starts the step again, which has made no second pass yet
        finally:
            for group, options in zip(optimizer.param_groups, before, strict=True):
                group.clear()
                group.update(options)
