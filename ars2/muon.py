"""Implement Muon with its auxiliary AdamW in one optimizer.

It is the baseline of ARS2-Neo and shares its kernels and groups. References: Jordan et al., "Muon: an optimizer for
hidden layers in neural networks" (2024); decoupled weight decay as in Liu et al., "Muon is scalable for LLM training"
(2025).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ars2 import updates, validation
from ars2.batch import Batch
from ars2.newton_schulz import Schedule
from ars2.tracked import TrackedOptimizer
from ars2.updates import Tensors


class Muon(TrackedOptimizer):
    """Apply orthogonalised momentum to matrices and AdamW to vectors.

    A matrix moves by ``p <- (1 - lr*wd) p - lr * sqrt(max(1, rows / cols)) * NewtonSchulz(n)``, where ``b <- momentum *
    b + (1 - momentum) * g``. Without Nesterov ``n`` is ``b``; with it ``n`` is ``momentum * b + (1 - momentum) * g``.

    Args:
        params: as for :class:`ars2.ARS2Neo`. Vector groups usually set their ``lr`` and ``weight_decay``.
        lr: learning rate of the groups of both tracks that set none.
        momentum: decay of the momentum of matrices, in [0, 1).
        nesterov: whether matrices use Nesterov momentum.
        weight_decay: decoupled weight decay, multiplied by ``lr``.
        ns_steps, ns_coefficients, ns_dtype, ns_algorithm: as for :class:`ars2.ARS2Neo`.
        betas, eps: of the vector track. OneCycleLR and CyclicLR cycle the momentum, not the betas.
        compile: as for :class:`ars2.ARS2Neo`.

    Raises:
        ValueError: an option is out of its range, or a parameter does not suit its track. The message names it.
    """

    shared_options = ("ns_steps", "ns_coefficients", "ns_dtype", "ns_algorithm")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
        ns_coefficients: Schedule = "jordan",
        ns_dtype: str = "bfloat16",
        ns_algorithm: str = "auto",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        compile: bool = False,
    ) -> None:
        self._betas = betas
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "ns_steps": ns_steps,
                "ns_coefficients": ns_coefficients,
                "ns_dtype": ns_dtype,
                "ns_algorithm": ns_algorithm,
                "betas": betas,
                "eps": eps,
            },
            compile=compile,
        )
        # Schedulers that cycle the momentum would cycle betas instead, if the defaults had any.
        del self.defaults["betas"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group({"betas": self._betas, **param_group})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_betas": self._betas}

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        validation.check_number(group, "momentum", 0.0, 1.0)
        validation.check_choice(group, "nesterov", (False, True))

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["track"] == "matrix" else ("exp_avg", "exp_avg_sq")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters once, after evaluating ``closure`` if one is given.

        Without any gradient nothing changes and the step is not counted.

        Returns:
            The result of the closure, or ``None`` without a closure.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if not self._check_gradients():
            return result
        with self._without_autocast():
            self._count_gradients()
            for group in self.param_groups:
                for batch in self._batches_by_count(group):
                    if group["track"] == "vector" and batch.params:
                        self._move_vectors(group, batch)
                    elif batch.params:
                        for chunk in self._matrix_chunks(group, batch):
                            self._move_matrices(group, chunk)
        return result

    def _move_matrices(self, group: dict[str, Any], batch: Batch) -> None:
        maybe_compile = self._maybe_compile(group)
        buffers, nesterov = batch.state("momentum_buffer"), group["nesterov"]
        directions: Tensors = maybe_compile(updates.momentum_update_)(
            batch.grads, buffers, group["momentum"], nesterov=nesterov
        )
        self._orthogonalize_(group, batch, directions)
        shapes = [updates.stack_shape(shape, group["flatten"]) for shape in batch.shapes]
        scales = [math.sqrt(max(1.0, shape[1] / shape[2])) for shape in shapes]
        self._apply(group, batch, directions, scales)
