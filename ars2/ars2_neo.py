"""Implement ARS2-Neo, which combines Adam's energy, Newton-Schulz and SAM.

Adam's second moment sets the length of a matrix's step, Newton-Schulz its direction, and a second gradient at the
adversarial point favours flat minima. In a plain loop ``step(closure)`` does everything. A loop that scales, clips or
accumulates gradients calls the parts:

    loss.backward()                           # gradient at the parameters
    if optimizer.wants_second_pass():
        optimizer.perturb()                   # move to the adversarial point; clears the gradients
        try:
            forward_and_backward_again()
        finally:
            optimizer.restore()               # move back, bit for bit
    optimizer.step()                          # update from the gradients in .grad
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ars2 import flatness, sharded_flatness, updates, validation
from ars2.batch import Batch
from ars2.capturable import to_device_
from ars2.newton_schulz import Schedule
from ars2.two_pass import StepState, TwoPassOptimizer
from ars2.updates import Tensors

Mode = Literal["base", "sync", "aga", "periodic", "random"]
MODES: tuple[Mode, ...] = ("base", "sync", "aga", "periodic", "random")


class ARS2Neo(TwoPassOptimizer):
    """Optimize matrices with ARS2-Neo and all other parameters with AdamW.

    A *matrix* parameter moves by ``p <- (1 - lr*wd) p - lr * |u| * NS(u)`` with Adam's pre-whitened momentum
    ``u = m_hat / (sqrt(v_hat) + eps)``. A *vector* parameter moves by ``p <- (1 - lr*wd) p - lr * u``, which is AdamW.
    On a two-pass step, the moments take the gradient at the adversarial point ``p + rho * n / |n|`` with
    ``n = g / (sqrt(v_hat) + eps) * |p|``, computed for each tensor (SAM, Foret et al. 2021; ASAM, Kwon et al. 2021).

    Flatness (``mode``), geometry and energy can be switched off for matrices. Without geometry a matrix moves by
    ``lr * u``. That is AdamW, and in mode ``"sync"`` SAM on AdamW. Without energy there is no second moment. Then
    ``n = g * |p|``, and ``u = sqrt(numel) * m / |m|`` is the momentum scaled to root mean square 1. That is Muon at
    another scale, or normalised momentum SGD without geometry. The scaling gives ``u`` the norm of Adam's direction at
    the first step. The raw momentum would shrink with the gradient and change a second thing at once.

    Args:
        params: parameters, (name, parameter) pairs, or groups of either. A group may set its own ``track``
            (``"matrix"`` or ``"vector"``), ``flatten``, ``lr``, ``betas``, ``eps``, ``weight_decay`` and ``rho``.
            Without ``track`` the shapes decide. :func:`ars2.param_groups` builds the groups of a model.
        lr: learning rate. A matrix's step is about sqrt(min(rows, cols)) times Adam's at the same value.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, multiplied by ``lr``.
        rho: length of each tensor's move to the adversarial point.
        mode: which steps are two-pass steps. ``"base"``: none. ``"sync"``: all. ``"aga"``: those at which the global
            cosine ``phi`` of gradient and cached shear force falls below ``-phi_lambda * sqrt(variance)``.
            ``"periodic"`` (steps 1, k+1, 2k+1, ...) and ``"random"`` (step 1, then with ``probability``) are controls.
        k: the period of ``"periodic"``. In ``"aga"``, if above 1, the largest distance between two sync steps.
        alpha: strength of the shear force that replaces the second gradient on one-pass steps. In ``"aga"`` it is
            multiplied by ``(1 + max(0, phi))^phi_gamma``.
        phi_beta, phi_lambda, phi_gamma: AGA's variance decay, threshold in standard deviations, and exponent.
        ns_steps, ns_coefficients, ns_dtype: iterations; ``"jordan"``, ``"polar_express"``, or a list with (a, b, c) for
            each iteration, of which the last repeats; and the dtype of the products (``"bfloat16"``, ``"float32"``,
            ``"float64"``).
        energy, geometry: whether matrices use Adam's second moment, and Newton-Schulz. See above.
        ns_algorithm: ``"standard"``, ``"gram"``, or ``"auto"``, the faster one for each shape by measurement.
        probability, seed: of ``"random"``. The draws depend only on the seed and the step number.
        compile: compile the arithmetic of the step with ``torch.compile`` at its first use. Not saved.
        capturable: keep the learning rate and all counters on the device, so that a CUDA graph can capture the step
            (modes ``"base"`` and ``"sync"``). A loaded state needs a new graph. Not saved.

    Raises:
        ValueError: an option is out of its range, or a parameter does not suit its track. The message names it.
    """

    shared_options = (
        "mode",
        "energy",
        "geometry",
        "k",
        "alpha",
        "phi_beta",
        "phi_lambda",
        "phi_gamma",
        "ns_steps",
        "ns_coefficients",
        "ns_dtype",
        "ns_algorithm",
        "probability",
        "seed",
    )
    fixed_options = ("mode", "energy", "geometry")
    main_counters = ("sync_steps", "last_sync", "phi", "phi_variance", "injected_alpha")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        rho: float = 0.1,
        mode: Mode = "sync",
        energy: bool = True,
        geometry: bool = True,
        k: int = 0,
        alpha: float = 0.1,
        phi_beta: float = 0.99,
        phi_lambda: float = 2.0,
        phi_gamma: float = 2.0,
        ns_steps: int = 5,
        ns_coefficients: Schedule = "jordan",
        ns_dtype: str = "bfloat16",
        ns_algorithm: str = "auto",
        probability: float = 0.1,
        seed: int = 0,
        compile: bool = False,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "rho": rho,
                "mode": mode,
                "energy": energy,
                "geometry": geometry,
                "k": k,
                "alpha": alpha,
                "phi_beta": phi_beta,
                "phi_lambda": phi_lambda,
                "phi_gamma": phi_gamma,
                "ns_steps": ns_steps,
                "ns_coefficients": ns_coefficients,
                "ns_dtype": ns_dtype,
                "ns_algorithm": ns_algorithm,
                "probability": probability,
                "seed": seed,
            },
            compile=compile,
            capturable=capturable,
        )
        self.param_groups[0].update(zip(self.main_counters, (0, 0, 0.0, 0.0, 0.0), strict=True))
        if capturable:
            to_device_(self.param_groups[0])

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        for name in ("rho", "alpha", "phi_lambda", "phi_gamma"):
            validation.check_number(group, name, 0.0)
        validation.check_number(group, "phi_beta", 0.0, 1.0)
        validation.check_number(group, "probability", 0.0, 1.0, closed_maximum=True)
        validation.check_integer(group, "seed", 0)
        validation.check_choice(group, "mode", MODES)
        for name in ("energy", "geometry"):
            validation.check_choice(group, name, (False, True))
        validation.check_integer(group, "k", 1 if group["mode"] == "periodic" else 0)
        largest = {"base": 0, "random": 0, "sync": 1}.get(group["mode"], group["k"])
        if group["k"] > largest:
            raise ValueError(
                f"k must be at most {largest} in mode {group['mode']!r}, got {group['k']}:"
                ' set a period only in mode "periodic" or "aga"'
            )

    def _check_counters(self, group: dict[str, Any], first: bool) -> None:
        super()._check_counters(group, first)
        if first:
            validation.check_integer(group, "sync_steps", 0)
            validation.check_integer(group, "last_sync", 0)
            for name in ("phi", "phi_variance", "injected_alpha"):
                if not isinstance(group.get(name), (int, float)):
                    raise ValueError(f"{name} must be a number, got {group.get(name, 'nothing')!r}")

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        keeps_shear = group["mode"] in ("aga", "random") or (group["mode"] == "periodic" and group["k"] > 1)
        keys = ["exp_avg"]
        if group["track"] == "vector" or group["energy"]:
            keys.append("exp_avg_sq")
        if keeps_shear:
            keys.append("shear")
        return tuple(keys)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters once.

        Without any gradient nothing changes and the step is not counted.

        Args:
            closure: zeroes the gradients, evaluates the loss, calls backward and returns the loss. It is evaluated once
                or twice, depending on the mode. :func:`ars2.repeatable` gives both evaluations the same dropout. In
                mode ``"base"`` it may add to existing gradients; a second evaluation would not repeat these. If this
                step's passes were made through the parts, the closure is evaluated once for its other effects before
                the update.

        Returns:
            The result of the closure's first evaluation, or ``None`` without a closure.

        Raises:
            RuntimeError: the parts were not called, the second gradient is missing or is not of the same batches as the
                first, or the parameters are still at the adversarial point.
        """
        self._refuse_while_moved("step()")
        state, result = self._step_state, None
        if closure is not None:
            if state.stage == "idle" and self.param_groups[0]["mode"] != "base":
                return self._step_by_closure(closure)
            with torch.enable_grad():
                result = closure()
        elif state.stage == "idle" and self.param_groups[0]["mode"] != "base" and self._check_gradients():
            raise RuntimeError(
                f"step() in mode {self.param_groups[0]['mode']!r} needs a closure: call step(closure), or call"
                " wants_second_pass() before it, and if that returns True perturb(), backward and restore()"
            )
        if state.stage == "decided" and state.wanted:
            raise RuntimeError("step(): the second pass is missing: call perturb(), backward and restore()")
        if self._check_gradients():
            self._update()
        elif state.stage == "restored":
            raise RuntimeError(
                "step(): the second pass left no gradient: call backward() between perturb() and restore()"
            )
        else:
            self._step_state.assign(StepState())
        return result

    def _update(self) -> None:
        """Update moments and parameters from the gradients in ``.grad``; end the step."""
        state, main = replace(self._step_state), self.param_groups[0]
        self._step_state.assign(StepState())
        synced, t = state.stage == "restored", main["step"] + 1
        alpha = (
            main["alpha"] * (1 + max(0.0, state.phi)) ** main["phi_gamma"] if main["mode"] == "aga" else main["alpha"]
        )
        keeps = "shear" in self._state_keys(main)
        injected_alpha = alpha if keeps and not synced else 0.0
        self._count_gradients()
        with self._without_autocast():
            for group, batch in self._batches(state, keeps and synced, injected_alpha):
                if batch.params:
                    self._move(group, batch, injected_alpha if self._shards is None else 0.0)
        if synced:
            main["sync_steps"] += 1
            main["last_sync"] += t - main["last_sync"]  # in place where it is a tensor
        main["phi"], main["phi_variance"] = state.phi, state.variance
        main["injected_alpha"] = injected_alpha

    def _batches(self, state: StepState, keeps: bool, alpha: float) -> Iterator[tuple[dict[str, Any], Batch]]:
        """Yield each group with its batches, after updating shear forces on sync steps.

        If ``alpha`` > 0, the gradients of sharded batches already include the shear forces.
        """
        if self._shards is not None:
            pairs = [(group, batch) for group in self.param_groups for batch in self._batches_by_count(group)]
            batches = [batch for _, batch in pairs]
            if keeps:
                sharded_flatness.keep_shears_(batches, state.first_gradients, self._shards)
            injected = sharded_flatness.injected(batches, alpha, self._shards) if alpha > 0 else batches
            for (group, _), batch in zip(pairs, injected, strict=True):
                yield group, batch
            return
        for group in self.param_groups:
            maybe_compile = self._maybe_compile(group)
            for batch in self._batches_by_count(group):
                for chunk in self._chunks(batch) if keeps else ():
                    flatness.keep_shear_(chunk.params, chunk.grads, chunk.states, state.first_gradients, maybe_compile)
                yield group, batch

    def _move(self, group: dict[str, Any], batch: Batch, alpha: float) -> None:
        """Move the parameters of one batch of a group.

        If ``alpha`` > 0, the shear forces are injected into the gradients first.
        """
        if group["track"] == "matrix" and (group["geometry"] or not group["energy"]):
            for chunk in self._matrix_chunks(group, batch):
                if alpha > 0:
                    chunk = self._with_shears(group, chunk, self._injection_scales(group, chunk, alpha))
                self._move_matrices(group, chunk)
        elif alpha == 0:
            self._move_vectors(group, batch)
        else:
            for chunk in self._chunks(batch):
                scales = self._injection_scales(group, chunk, alpha)
                for flat_chunk in self._flat_chunks(chunk):
                    self._move_vectors(group, self._with_shears(group, flat_chunk, scales))

    def _injection_scales(self, group: dict[str, Any], chunk: Batch, alpha: float) -> Tensor:
        norms = self._maybe_compile(group)(flatness.norms)
        return flatness.injection_scales(alpha, norms(chunk.grads), norms(chunk.state("shear")))

    def _with_shears(self, group: dict[str, Any], chunk: Batch, scales: Tensor) -> Batch:
        return chunk._replace(
            grads=self._maybe_compile(group)(flatness.with_shears)(chunk.grads, chunk.state("shear"), scales)
        )

    def _move_matrices(self, group: dict[str, Any], batch: Batch) -> None:
        """Apply ``p <- (1 - lr*wd) p - lr * |u| * NS(u)`` to the matrices of a batch.

        ``u`` are the ``directions`` and ``|u|`` the ``energies``. Without geometry the update is ``lr * u``.
        """
        maybe_compile = self._maybe_compile(group)
        if group["energy"]:
            directions: Tensors = maybe_compile(updates.adam_directions)(
                batch.grads,
                batch.state("exp_avg"),
                batch.state("exp_avg_sq"),
                group["betas"],
                batch.step,
                group["eps"],
            )
        else:
            numels = [shape.numel() for shape in batch.shapes]
            directions = maybe_compile(updates.momentum_directions)(
                batch.grads, batch.state("exp_avg"), group["betas"][0], numels=numels, shards=self._shards
            )
        energies = None
        if group["geometry"]:
            energies = maybe_compile(updates.frobenius_norms)(directions, self._shards)
            self._orthogonalize_(group, batch, directions)
        self._apply(group, batch, directions, energies)

    def diagnostics(self) -> dict[str, float]:
        """Return counters and AGA quantities of the last step as plain numbers.

        Only a capturable optimizer reads the device here.

        Keys: ``steps``, ``sync_steps``, ``gradient_evaluations``, and ``effective_k`` (steps per sync step, infinite
        before the first sync step). With shear forces also ``alpha``, the strength injected by the last step, 0 on sync
        steps. In AGA also ``phi``, ``phi_deviation`` and ``threshold`` (``-phi_lambda`` deviations).
        """
        main = self.param_groups[0]
        return flatness.diagnostics(main, keeps_shear="shear" in self._state_keys(main))
