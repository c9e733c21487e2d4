"""Implement Muon with its auxiliary AdamW in one optimizer.

It is the baseline of ARS2-Neo and shares its kernels and groups. References: Jordan et al., "Muon: an optimizer for
hidden layers in neural networks" (2024); decoupled weight decay as in Liu et al., "Muon is scalable for LLM training"
(2025).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch

from ars2 import kernels, validation
from ars2.base import TrackedOptimizer, options_of
from ars2.kernels import Tensors
from ars2.newton_schulz import Schedule


class Muon(TrackedOptimizer):
    """Apply orthogonalised momentum to matrices and AdamW to vectors.

    A matrix moves by ``p <- (1 - lr*wd) p - lr * scale * NewtonSchulz(n)``, where ``b <- momentum * b + (1 - momentum)
    * g``. Without Nesterov ``n`` is ``b``; with it ``n`` is ``momentum * b + (1 - momentum) * g``.

    Args:
        params: as for :class:`ars2.ARS2Neo`. Vector groups usually set their ``lr`` and ``weight_decay``.
        lr: learning rate of the groups of both tracks that set none.
        momentum: decay of the momentum of matrices, in [0, 1).
        nesterov: whether matrices use Nesterov momentum.
        weight_decay: decoupled weight decay, multiplied by ``lr``.
        ns_steps, ns_coefficients, ns_dtype, ns_algorithm: as for :class:`ars2.ARS2Neo`.
        adjust_lr_fn: the scale, as in torch.optim.Muon: ``"original"`` is sqrt(max(1, rows / cols)), and
            ``"match_rms_adamw"`` is 0.2 * sqrt(max(rows, cols)), with which a learning rate of AdamW is a sensible
            start.
        cautious: as for :class:`ars2.ARS2Neo`.
        betas, eps: of the vector track. OneCycleLR and CyclicLR cycle the momentum, not the betas.
        compile: as for :class:`ars2.ARS2Neo`.

    Raises:
        ValueError: an option is out of its range, or a parameter does not suit its track. The message names it.
    """

    directions_in_range = False  # they are as small as the gradients

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
        adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original",
        cautious: bool = False,
        compile: bool = False,
    ) -> None:
        self._betas = betas
        super().__init__(params, options_of(Muon, locals()), compile=compile)
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
        self._count_gradients()
        with self._without_autocast():
            for batch in self._gather():
                group = batch.group
                if group["track"] == "vector":
                    self._move_vectors(batch)
                    continue
                for chunk in self._split_matrices(batch):
                    directions: Tensors = self._maybe_compile(group)(kernels.momentum_directions)(
                        chunk.grads, chunk.state["momentum_buffer"], group["momentum"], nesterov=group["nesterov"]
                    )
                    self._move_matrices(chunk, directions)
        return result

    def _scales(self, group: dict[str, Any], directions: Tensors, shapes: list[torch.Size]) -> list[float]:
        if group["adjust_lr_fn"] == "match_rms_adamw":
            return [0.2 * math.sqrt(max(rows, cols)) for _, rows, cols in shapes]
        return [math.sqrt(max(1.0, rows / cols)) for _, rows, cols in shapes]
