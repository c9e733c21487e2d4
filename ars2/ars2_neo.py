"""Implement ARS2-Neo, which combines Adam's energy, Newton-Schulz and SAM.

Adam's second moment sets the length of a matrix's step, Newton-Schulz its direction, and a second gradient at the
adversarial point favours flat minima. :meth:`ARS2Neo.passes` makes both passes of a plain loop, which may scale, clip
and accumulate gradients. It calls the parts, as a loop of your own can:

    loss.backward()                           # gradient at the parameters
    if optimizer.wants_second_pass():
        optimizer.perturb()                   # move to the adversarial point; clears the gradients
        try:
            forward_and_backward_again()
        finally:
            optimizer.restore()               # move back, bit for bit
    optimizer.step()                          # update from the gradients in .grad
"""

import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ars2 import flatness, kernels, schedule, validation
from ars2.base import TrackedOptimizer, options_of, row_blocks
from ars2.chunks import Chunk, sums_of, with_sums
from ars2.distributed import Sharded, has_several_processes, local
from ars2.graphs import to_device_
from ars2.kernels import Tensors
from ars2.newton_schulz import Schedule
from ars2.orthogonalize import LEAST_NORM
from ars2.replay import devices_of, first_pass, frozen_statistics, random_state, second_pass
from ars2.schedule import Mode


@dataclass
class StepState:
    """Track the progress of the current step.

    It is reset after every step and never saved. The optimizer changes it in place, because the wrappers of Fabric and
    Lightning share the object, but would not share a new attribute. ``backups`` are parameters with copies of them, or
    one parameter with a copy of a flat part and the index of the part's first entry. ``moved_first`` is whether the
    parameters moved along the momentum for the first pass.
    """

    stage: Literal["idle", "decided", "moved", "restored"] = "idle"
    wanted: bool = False
    moved_first: bool = False
    phi: float = 0.0
    variance: float = 0.0
    backups: list[tuple[list[Tensor], list[Tensor], int | None]] = field(default_factory=list)
    first_gradients: dict[Tensor, Tensor] = field(default_factory=dict)

    def reset(self, **fields: Any) -> None:
        """Set all fields, to their defaults where not given."""
        vars(self).update(vars(StepState(**fields)))


class ARS2Neo(TrackedOptimizer):
    """Optimize matrices with ARS2-Neo and all other parameters with AdamW.

    A *matrix* parameter moves by ``p <- (1 - lr*wd) p - lr * |u| * NS(u)`` with Adam's pre-whitened momentum
    ``u = m_hat / (sqrt(v_hat) + eps)``. A *vector* parameter moves by ``p <- (1 - lr*wd) p - lr * u``, which is AdamW.
    On a two-pass step, the moments take the gradient at the adversarial point ``p + rho * n / |n|`` with
    ``n = g / (sqrt(v_hat) + eps) * |p|``, computed for each tensor (SAM, Foret et al. 2021; ASAM, Kwon et al. 2021).
    Mode ``"momentum"`` makes a single pass, at such a point with the momentum in place of ``g``.

    Flatness (``mode``), geometry and energy can be switched off for matrices. Without geometry a matrix moves by
    ``lr * u``. That is AdamW, and in mode ``"sync"`` SAM on AdamW. Without energy there is no second moment. Then
    ``n = g * |p|``, and ``u = sqrt(numel) * m / |m|`` is the momentum scaled to root mean square 1. That is Muon at
    another scale, or normalised momentum SGD without geometry. The scaling gives ``u`` the norm of Adam's direction at
    the first step. The raw momentum would shrink with the gradient and change a second thing at once.

    Energy is two things, and each can be kept alone. ``"whitening"`` is the direction of Adam's ``u`` at the length
    ``sqrt(numel)``. ``"scalar"`` is the direction of ``m`` at the length ``|u|`` of Adam's, with ``n = g * |p|``.

    Args:
        params: parameters, (name, parameter) pairs, or groups of either. A group may set its own ``track``
            (``"matrix"`` or ``"vector"``), ``flatten``, ``splits``, ``lr``, ``betas``, ``eps``, ``weight_decay``,
            ``cautious``, ``adjust_lr_fn``, ``rho`` and ``relative_rho``. Without ``track`` the shapes decide.
            :func:`ars2.param_groups` builds the groups of a model.
        lr: learning rate. A matrix's step is about sqrt(min(rows, cols)) times Adam's at the same value.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, multiplied by ``lr``. It may be changed in the group between steps.
        rho, relative_rho: the length of each tensor's move to the adversarial point is ``rho`` or, with
            ``relative_rho``, ``rho`` times the norm of the tensor. In mode ``"momentum"`` rho may be negative.
        mode: which steps are two-pass steps. ``"base"``: none. ``"sync"``: all. ``"aga"``: those at which the global
            cosine ``phi`` of gradient and cached shear force falls below ``-phi_lambda * sqrt(variance)``.
            ``"late"``: all after the first ``late_start * total_steps`` steps. ``"periodic"`` (steps 1, k+1, 2k+1,
            ...) and ``"random"`` (step 1, then with ``probability``) are controls. ``"momentum"``: none, but the
            parameters are moved for the single pass, uphill (MSAM, arXiv 2401.12033), or with a negative ``rho``
            ahead along the descent (arXiv 2605.25395), see :meth:`move_along_momentum`.
        energy, geometry: whether matrices use Adam's second moment (``True``, ``False``, ``"whitening"`` or
            ``"scalar"``), and Newton-Schulz. See above.
        k: the period of ``"periodic"``. In ``"aga"``, if above 1, the largest distance between two sync steps.
        alpha: strength of the shear force that replaces the second gradient on one-pass steps. In ``"aga"`` it is
            multiplied by ``(1 + max(0, phi))^phi_gamma``.
        phi_beta, phi_lambda, phi_gamma: AGA's variance decay, threshold in standard deviations, and exponent.
        ns_steps, ns_coefficients, ns_dtype: iterations; ``"jordan"``, ``"polar_express"``, or one (a, b, c) for each
            iteration; and the dtype of the products (``"bfloat16"``, ``"float32"``, ``"float64"``).
        ns_algorithm: ``"standard"``, ``"gram"``, or ``"auto"``, the faster one for each shape by measurement.
        probability, seed: of ``"random"``. The draws depend only on the seed and the step number.
        late_start, total_steps: of ``"late"``: the fraction of the ``total_steps`` with one pass.
        rho_per_step: whether rho is multiplied by the number of steps since the last two-pass step (``"aga"``,
            ``"periodic"``, ``"random"``).
        adjust_lr_fn: ``"original"``, or ``"match_rms_adamw"``, which divides a matrix's step by
            sqrt(min(rows, cols)). It then has the norm of Adam's, and AdamW's learning rate is a sensible start.
        cautious: whether weight decay leaves out entries that the update moves away from zero (Chen et al. 2025).
        compile: compile the arithmetic of the step with ``torch.compile`` at its first use. Not saved.
        capturable: keep the learning rate and all counters on the device, so that a CUDA graph can capture the step
            (modes ``"base"`` and ``"sync"``). A loaded state needs a new graph. Not saved.

    Raises:
        ValueError: an option is out of its range, or a parameter does not suit its track. The message names it.
    """

    fixed_options = ("mode", "energy", "geometry")
    main_counters = schedule.COUNTERS
    _warned_of_lightning = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        rho: float = 0.1,
        mode: Mode = "base",
        energy: bool | Literal["whitening", "scalar"] = True,
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
        late_start: float = 0.5,
        total_steps: int = 0,
        rho_per_step: bool = False,
        relative_rho: bool = False,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original",
        cautious: bool = False,
        compile: bool = False,
        capturable: bool = False,
    ) -> None:
        options = options_of(ARS2Neo, locals())
        self._step_state = StepState()
        if mode != "base" and _is_made_by_zero():
            raise ValueError(
                "ZeroRedundancyOptimizer gives each process only a part of the parameters, so they cannot all move to"
                f' the adversarial point: use mode "base" with it, not "{mode}", or shard the model with'
                " torch.distributed.fsdp.fully_shard"
            )
        super().__init__(params, options, compile=compile, capturable=capturable)
        self.param_groups[0].update(self.main_counters)
        if capturable:
            to_device_(self.param_groups[0])

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        signed = group["mode"] == "momentum"
        validation.check_number(group, "rho", -math.inf if signed else 0.0, open_minimum=signed)
        validation.check_choice(group, "energy", (False, True, "whitening", "scalar"))
        for name in ("geometry", "relative_rho"):
            validation.check_choice(group, name, (False, True))
        schedule.check_options(group)

    def _check_counters(self, group: dict[str, Any], first: bool) -> None:
        super()._check_counters(group, first)
        if first:
            if "sync_steps" not in group:
                raise ValueError("it is of another optimizer than ARS2Neo, such as Muon: load it into that one")
            group.setdefault("interval", 0)  # older states have none
            for name in ("sync_steps", "last_sync", "interval"):
                validation.check_integer(group, name, 0)
            for name in ("phi", "phi_variance", "injected_alpha"):
                if not isinstance(group.get(name), (int, float)):
                    raise ValueError(f"{name} must be a number, got {group.get(name, 'nothing')!r}")

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        keys = ["exp_avg"]
        if group["track"] == "vector" or group["energy"]:
            keys.append("exp_avg_sq")
        if schedule.keeps_shear(group):
            keys.append("shear")
        return tuple(keys)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._refuse_while_moved("add_param_group()")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._refuse_while_moved("load_state_dict()")
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_while_moved("copying or pickling")
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._step_state = StepState()

    def _refuse_while_moved(self, what: str) -> None:
        if self._step_state.stage == "moved":
            raise RuntimeError(f"{what} fails while the parameters are moved: call restore() first")

    @property
    def always_two_pass(self) -> bool:
        """Return whether every step makes a second pass.

        Then the first gradient need not be exchanged between processes.
        """
        return bool(self.param_groups[0]["mode"] == "sync")

    @property
    def never_two_pass(self) -> bool:
        """Return whether no step makes a second pass.

        Then no batch need be kept for one.
        """
        return self.param_groups[0]["mode"] in ("base", "momentum")

    @property
    def moves_first_pass(self) -> bool:
        """Return whether every pass needs :meth:`move_along_momentum` before it."""
        return bool(self.param_groups[0]["mode"] == "momentum")

    @property
    def decides_alike(self) -> bool:
        """Return whether ranks with equal gradients decide alike without an exchange.

        AGA's decision depends on the rounding of phi. Ranks share it after :meth:`distribute`, and always where
        parameters are sharded.
        """
        return bool(self.param_groups[0]["mode"] != "aga" or self.is_distributed)

    @property
    def first_gradients(self) -> dict[Tensor, Tensor]:
        """Return the gradients of the first pass by parameter.

        They exist from :meth:`perturb` until :meth:`step`.
        """
        return self._step_state.first_gradients

    @torch.no_grad()
    def wants_second_pass(self, grad_scale: float = 1.0) -> bool:
        """Decide after the first backward pass whether to make a second pass.

        A second call starts the step again, as after a step that a gradient scaler skipped. Without any gradient the
        answer is False, and a later backward pass needs another call.

        Args:
            grad_scale: has no effect. Neither the decision nor the move depends on the scale of the gradients, so those
                of a gradient scaler need not be unscaled. Earlier versions needed the scale.

        Raises:
            RuntimeError: the parameters are moved.
        """
        self._refuse_while_moved("wants_second_pass()")
        state, main = self._step_state, self.param_groups[0]
        if not self._check_gradients():
            state.reset()
            return False
        phi, variance, t = 0.0, 0.0, main["step"] + 1
        if main["mode"] == "aga":
            phi = self._phi() if main["sync_steps"] > 0 else 0.0
            variance = schedule.next_variance(main, phi, t)
        wanted = schedule.is_sync_step(main, t, phi, variance)
        state.reset(stage="decided", wanted=wanted, moved_first=state.moved_first, phi=phi, variance=variance)
        return wanted

    def _phi(self) -> float:
        chunks = [chunk for group in self._gather() for chunks in self._split(group) for chunk in chunks]
        if not chunks:
            return 0.0
        sums = sums_of(chunks, self._pairwise(flatness.cosine_sums, "shear"), self._layout)
        self._layout.agree_(sums)
        return flatness.global_cosine(sums)

    @torch.no_grad()
    def move_along_momentum(self) -> None:
        """Move the parameters by ``rho * n / |n|``, before a pass in mode ``"momentum"``.

        ``n = m_hat / (sqrt(v_hat) + eps) * |p|``, from the moments of the steps so far. Before the first step nothing
        moves. After the backward pass call :meth:`restore`. To accumulate gradients, do so for each micro-batch or once
        around all of them, which leads to the same point.

        After a forward pass without a backward pass, such as an evaluation, call ``reshard()`` of every module that
        FSDP2 has sharded before you call this. :meth:`passes` does so.

        Raises:
            RuntimeError: the mode is another one, or the parameters have moved already.
        """
        if not self.moves_first_pass:
            raise RuntimeError(f'move_along_momentum() needs mode "momentum", got {self.param_groups[0]["mode"]!r}')
        self._refuse_while_moved("move_along_momentum()")
        self._adopt_parameters()
        self._step_state.reset(stage="moved", moved_first=True)
        try:
            self._move_parameters("exp_avg")
        except BaseException:
            self._abandon()
            raise

    @torch.no_grad()
    def perturb(self) -> None:
        """Move the parameters to the adversarial point and clear ``.grad``.

        The first gradients stay available as :attr:`first_gradients`.

        Raises:
            RuntimeError: :meth:`wants_second_pass` was not called in this step, or the parameters have moved already.
        """
        state = self._step_state
        if state.stage != "decided":
            raise RuntimeError(
                "perturb() needs a decision: call wants_second_pass() right before it, once in each step"
            )
        state.stage, state.moved_first = "moved", False
        try:
            self._move_parameters()
            state.first_gradients = {
                # The next backward pass overwrites views, such as those into gradient buckets.
                param: param.grad.clone() if param.grad._is_view() else param.grad
                for group in self.param_groups
                for param in group["params"]
                if param.grad is not None
            }
            for param in state.first_gradients:
                param.grad = None
        except BaseException:
            self._abandon()
            raise

    def _move_parameters(self, along: str | None = None) -> None:
        """Move the parameters along their gradients, or the state tensor ``along``."""
        latest: dict[str, Any] = {}
        # All chunks of a round need the same number of sums.
        with_lengths = any(group["relative_rho"] for group in self.param_groups)

        def sums(chunk: Chunk) -> Tensor:
            latest.update(chunk=chunk, offsets=self._offsets(chunk))
            return flatness.offset_sums(latest["offsets"], chunk.params if with_lengths else None)

        factor = schedule.rho_scale(self.param_groups[0])
        for chunk, totals in with_sums(self._rounds(self._gather(along), self._split), sums, self._layout):
            # Computing the offsets of several chunks twice costs less than storing them.
            offsets = latest["offsets"] if latest["chunk"] is chunk else self._offsets(chunk)
            copies = [param.clone() for param in chunk.params]
            self._step_state.backups.append((chunk.sources, copies, chunk.start))
            move = self._maybe_compile(chunk.group)(flatness.move_along_)
            rho = chunk.group["rho"] * factor
            move(chunk.params, offsets, totals[0], rho * totals[1].sqrt() if chunk.group["relative_rho"] else rho)
        # Autocast caches cast weights within its block. The cache would hide the move.
        torch.clear_autocast_cache()

    def _rounds(
        self, groups: Iterable[Chunk], split: Callable[[Chunk], Iterable[list[Chunk]]]
    ) -> Iterable[list[Chunk]]:
        """Return the chunks of all groups, in lists that are reduced together.

        Where parameters are sharded, that is one list, which takes one all-reduce.
        """
        rounds = (chunks for group in groups for chunks in split(group))
        if not isinstance(self._layout, Sharded):
            return rounds
        chunks = [chunk for chunks in rounds for chunk in chunks]
        return [chunks] if chunks else []

    def _offsets(self, chunk: Chunk) -> Tensors:
        group, maybe_compile, denominators = chunk.group, self._maybe_compile(chunk.group), None
        if group["track"] == "vector" or group["energy"] in (True, "whitening"):
            denominators = maybe_compile(kernels.adam_denominators)(
                chunk.state["exp_avg_sq"], group["betas"][1], tuple(chunk.counts), group["eps"]
            )
        offsets: Tensors = maybe_compile(flatness.adversarial_offsets)(chunk.params, chunk.grads, denominators)
        return offsets

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the parameters, bit for bit.

        Raises:
            RuntimeError: the parameters are not moved.
        """
        state = self._step_state
        if state.stage != "moved":
            raise RuntimeError("restore(): the parameters have not moved: call perturb() first")
        for sources, copies, start in state.backups:
            params = [local(source) for source in sources]
            if start is not None:
                params = [params[0].view(-1)[start : start + len(copies[0])]]
            torch._foreach_copy_(params, copies)
        state.backups.clear()
        state.stage = "idle" if state.moved_first else "restored"
        torch.clear_autocast_cache()

    def _abandon(self) -> None:
        """End a failed step.

        The parameters and the first gradients in ``.grad`` are restored.
        """
        if self._step_state.stage == "moved":
            self.restore()
        if first := self._step_state.first_gradients:
            for group in self.param_groups:
                for param in group["params"]:
                    param.grad = first.get(param)
        self._step_state.reset()

    def passes(self, model: nn.Module) -> Iterator[int]:
        """Yield the number of each pass of a step, 1 and, in a two-pass step, 2.

        Use it directly in a ``for`` statement, which restores the parameters when it ends, also by an exception or
        ``break``. The body of the loop evaluates the loss of the same batches each time, and calls backward::

            optimizer.zero_grad()
            for _ in optimizer.passes(model):
                loss = loss_function(model(inputs), targets)
                loss.backward()
            optimizer.step()

        The second pass has the random numbers (dropout) of the first. It leaves buffers, such as BatchNorm's running
        statistics, unchanged.

        Args:
            model: where random numbers are drawn and buffers change. It is on the devices on which it is used.

        Raises:
            RuntimeError: there are gradients before the first pass, except in the modes ``"base"`` and ``"momentum"``,
                which make no second pass that would have to repeat them; or processes could decide differently, which
                :meth:`distribute` prevents.
        """
        if self.never_two_pass:
            with first_pass(self, model):
                yield 1
            return
        if not self.decides_alike and has_several_processes():
            raise RuntimeError(
                f"passes(): in mode {self.param_groups[0]['mode']!r} processes could decide differently, and would wait"
                " for each other: call optimizer.distribute(group) once before the loop, with the group of the"
                " processes that train this model, such as torch.distributed.group.WORLD"
            )
        if any(param.grad is not None for group in self.param_groups for param in group["params"]):
            raise RuntimeError(
                "passes(): there are gradients already, which a second pass could not repeat: call"
                " optimizer.zero_grad() before the loop, without set_to_none=False, and accumulate all micro-batches of"
                " a step in its body"
            )
        devices = devices_of(model)
        replay = random_state(*devices)
        yield 1
        if self.wants_second_pass():
            with second_pass(self, frozen_statistics(model), devices):
                replay()
                yield 2

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters once.

        Without any gradient nothing changes and the step is not counted.

        Args:
            closure: zeroes the gradients, evaluates the loss, calls backward and returns the loss. It is evaluated once
                or twice, depending on the mode. :func:`ars2.repeatable` gives both evaluations the same dropout. In
                mode ``"base"`` it may add to existing gradients; a second evaluation would not repeat these. If this
                step's passes are made through the parts, before or in the closure, it is evaluated once. In mode
                ``"momentum"`` they must be.

        Returns:
            The result of the closure's first evaluation, or ``None`` without a closure.

        Raises:
            RuntimeError: the parts were not called, the second gradient is missing or is not of the same batches as the
                first, or the parameters are still moved.
        """
        self._refuse_while_moved("step()")
        result = None
        one_pass = self.never_two_pass or self._step_state.stage != "idle"
        if closure is not None and not one_pass:
            return self._step_by_closure(closure)
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        elif not one_pass and self._check_gradients():
            raise RuntimeError(
                f"step() in mode {self.param_groups[0]['mode']!r} needs both passes: make them in a loop over"
                " optimizer.passes(model), or with wants_second_pass(), perturb() and restore(), or call step(closure)"
                " (in Lightning add the callback ars2.lightning.TwoPass; instead of transformers' Trainer use"
                " ars2.transformers.TwoPassTrainer)"
            )
        self._step_by_parts()
        return result

    def _step_by_parts(self) -> None:
        """Update from the gradients in ``.grad``, if both passes were made."""
        state, found = self._step_state, self._check_gradients()
        if state.stage == "decided" and state.wanted:
            raise RuntimeError("step(): the second pass is missing: call perturb(), backward and restore()")
        if not found and state.stage == "restored":
            raise RuntimeError(
                "step(): the second pass left no gradient: call backward() between perturb() and restore()"
            )
        if found and self.moves_first_pass and not state.moved_first:
            raise RuntimeError(
                'step() in mode "momentum" needs the gradient at moved parameters: make the pass in a loop over'
                " optimizer.passes(model), or between move_along_momentum() and restore()"
            )
        if found:
            self._update()
        state.reset()

    def _update(self) -> None:
        """Update moments and parameters from the gradients in ``.grad``; end the step."""
        state, main = StepState(**vars(self._step_state)), self.param_groups[0]
        self._step_state.reset()
        synced = state.stage == "restored"
        alpha = schedule.injected_alpha(main, state.phi, synced)
        self._count_gradients()
        with self._without_autocast():
            if synced and schedule.keeps_shear(main):
                self._keep_shears(state.first_gradients)
            rounds = self._rounds(self._gather(), partial(self._parts, elementwise=alpha > 0))
            if alpha == 0:
                for chunk in (chunk for chunks in rounds for chunk in chunks):
                    self._move(chunk)
            else:
                injection_sums = self._pairwise(flatness.injection_sums, "shear")
                for chunk, sums in with_sums(rounds, injection_sums, self._layout):
                    inject = self._maybe_compile(chunk.group)(flatness.with_shears)
                    self._move(chunk._replace(grads=inject(chunk.grads, chunk.state["shear"], sums, alpha)))
        if synced:
            if main["rho_per_step"]:
                main["interval"] = main["step"] - main["last_sync"]
            main["sync_steps"] += 1
            main["last_sync"] += main["step"] - main["last_sync"]  # in place where it is a tensor
        main["phi"], main["phi_variance"], main["injected_alpha"] = state.phi, state.variance, alpha

    def _parts(self, group: Chunk, elementwise: bool) -> Iterable[list[Chunk]]:
        """Return the chunks in which a group is updated.

        The injection works element by element and needs temporary tensors. The fused AdamW does not.
        """
        if self._is_orthogonal(group):
            return ([chunk] for chunk in self._split_matrices(group))
        return self._split(group) if elementwise else [[group]]

    def _pairwise(self, function: Callable[..., Tensor], key: str) -> Callable[[Chunk], Tensor]:
        """Return ``function`` of the gradients of a chunk and its tensors ``key``."""
        return lambda chunk: self._maybe_compile(chunk.group)(function)(chunk.grads, chunk.state[key])

    def _keep_shears(self, first_gradients: dict[Tensor, Tensor]) -> None:
        """Store the shear force of each parameter that has gradients of both passes."""

        def with_both_gradients() -> Iterator[Chunk]:
            for group in self._gather():
                chunk = group.subset([i for i, source in enumerate(group.sources) if source in first_gradients])
                firsts = [local(first_gradients[source]) for source in chunk.sources]
                chunk.state["first"] = [f.to(grad.dtype) for f, grad in zip(firsts, chunk.grads, strict=True)]
                if firsts:
                    yield chunk

        shear_sums = self._pairwise(flatness.shear_sums, "first")
        for chunk, sums in with_sums(self._rounds(with_both_gradients(), self._split), shear_sums, self._layout):
            shear_forces = self._maybe_compile(chunk.group)(flatness.shear_forces)
            torch._foreach_copy_(chunk.state["shear"], shear_forces(chunk.grads, chunk.state["first"], sums))

    @staticmethod
    def _is_orthogonal(chunk: Chunk) -> bool:
        """Return whether the update of a chunk depends on complete tensors."""
        group = chunk.group
        return bool(group["track"] == "matrix" and (group["geometry"] or group["energy"] is not True))

    def _move(self, chunk: Chunk) -> None:
        """Move the parameters of a chunk: ARS2-Neo for matrices, AdamW for vectors."""
        if not self._is_orthogonal(chunk):
            self._move_vectors(chunk)
            return
        group, maybe_compile = chunk.group, self._maybe_compile(chunk.group)
        if group["energy"]:
            directions: Tensors = maybe_compile(kernels.adam_directions)(*chunk.adam_arguments)
        else:
            directions = maybe_compile(kernels.momentum_directions)(
                chunk.grads, chunk.state["exp_avg"], group["betas"][0], nesterov=False
            )
        if group["energy"] is not True:
            blocks, shapes = row_blocks(chunk, directions)
            lengths: Any = [math.sqrt(shape.numel()) for shape in shapes]
            if group["energy"] == "scalar":
                lengths = self._layout.norms(blocks)
                torch._foreach_copy_(directions, chunk.state["exp_avg"])
            torch._foreach_div_(blocks, [norm.clamp_min(LEAST_NORM) for norm in self._layout.norms(blocks)])
            torch._foreach_mul_(blocks, lengths)
        if group["geometry"]:
            self._move_matrices(chunk, directions)
        else:
            self._apply(chunk, directions, None)

    def _scales(self, group: dict[str, Any], directions: Tensors, shapes: list[torch.Size]) -> Tensors:
        """Return the energies ``|u|``.

        Under ``"match_rms_adamw"`` they are divided by the norms of orthogonal factors.
        """
        energies = self._layout.norms(directions)
        if group["adjust_lr_fn"] == "match_rms_adamw":
            torch._foreach_mul_(energies, [1 / math.sqrt(n * min(rows, cols)) for n, rows, cols in shapes])
        return energies

    def _step_by_closure(self, closure: Callable[[], Any]) -> Any:
        if torch.compiler.is_compiling():  # torch then falls back to eager, unless fullgraph=True
            raise RuntimeError(
                "torch.compile of step(closure) does not support two passes: call step() uncompiled, and make the"
                " optimizer with compile=True"
            )
        params = [param for group in self.param_groups for param in group["params"]]
        before = [(p, p.grad, local(p.grad)._version) for p in params if p.grad is not None]
        with torch.enable_grad():
            result = closure()
        if self._step_state.stage != "idle":  # the closure made the passes
            self._step_by_parts()
            return result
        if before and all(p.grad is grad and local(grad)._version == version for p, grad, version in before):
            raise RuntimeError(
                "step(closure): the closure computed no gradient: zero the gradients, evaluate the loss and call"
                " backward() in it, or make the passes in a loop over optimizer.passes(model) before step()"
            )
        if not self._check_gradients():
            return result
        # Gradients that the closure zeroed in place or added to. With create_graph adding makes a new tensor.
        reused = [p for p, grad, _ in before if p.grad is not None and (p.grad is grad or p.grad.requires_grad)]
        if self.wants_second_pass():
            self._warn_of_lightning(closure)
            try:
                self.perturb()
                for param in reused:
                    # NaN marks a gradient that the closure adds to instead of replacing it.
                    param.grad = torch.full_like(self.first_gradients[param], math.nan, requires_grad=False)
                with torch.enable_grad():
                    closure()
                self.restore()
                if not self._check_gradients():
                    raise RuntimeError(
                        "step(closure): the closure computed no gradient at the adversarial point: call backward() in"
                        " every evaluation"
                    )
                _check_not_added_to(reused)
            except BaseException:
                self._abandon()
                raise
        self._update()
        return result

    def _warn_of_lightning(self, closure: Any) -> None:
        """Warn once if Lightning's automatic optimization made the closure.

        Its second call does not repeat the first.
        """
        module = str(getattr(getattr(closure, "func", None), "__module__", ""))
        if module.startswith(("lightning.pytorch.", "pytorch_lightning.")) and not self._warned_of_lightning:
            self._warned_of_lightning = True
            warnings.warn(
                "Lightning calls training_step() twice in a two-pass step: dropout differs between the passes, and"
                " logged values and BatchNorm's statistics are of both. Give the Trainer"
                " callbacks=[ars2.lightning.TwoPass()]",
                stacklevel=2,
            )

    def diagnostics(self) -> dict[str, float]:
        """Return counters and AGA quantities of the last step as plain numbers.

        Only a capturable optimizer reads the device here.

        Keys: ``steps``, ``sync_steps``, ``gradient_evaluations``, and ``effective_k`` (steps per sync step, infinite
        before the first sync step). With shear forces also ``alpha``, the strength injected by the last step, 0 on sync
        steps. With ``rho_per_step`` also ``rho`` of the last move. In AGA also ``phi``, ``phi_deviation`` and
        ``threshold`` (``-phi_lambda`` deviations).
        """
        return schedule.diagnostics(self.param_groups[0])


def _check_not_added_to(params: list[Tensor]) -> None:
    """Check that a closure did not add to gradients of NaN.

    This reads the device if there were any such gradients.
    """
    grads = [local(p.grad) for p in params if p.grad is not None and local(p.grad).numel()]
    # During CUDA graph capture the device cannot be read. The warm-up steps before it are checked.
    if not grads or (grads[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    if any(torch.stack([grad.isnan().all() for grad in grads]).tolist()):
        raise RuntimeError(
            "step(closure): the closure adds to gradients of earlier backward passes, which its second evaluation"
            " cannot repeat: zero the gradients and evaluate all micro-batches in the closure, or in a loop over"
            " optimizer.passes(model) (for Lightning's accumulate_grad_batches, give the Trainer"
            " callbacks=[ars2.lightning.TwoPass()])"
        )


def _is_made_by_zero() -> bool:
    """Return whether a ZeroRedundancyOptimizer is making this optimizer.

    It passes nothing that identifies it, so the call stack is searched.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = inspect.currentframe() if module is not None else None
    while frame is not None:
        if module is not None and isinstance(frame.f_locals.get("self"), module.ZeroRedundancyOptimizer):
            return True
        frame = frame.f_back
    return False
