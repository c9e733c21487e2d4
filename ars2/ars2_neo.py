"""ARS2-Neo: Adam's statistics give a step its energy, Newton-Schulz its geometry, a second gradient its flatness.

In a plain loop ``step(closure)`` does everything. A loop that scales, clips or accumulates in between calls the parts:

    loss.backward()                           # gradient at the parameters
    if optimizer.wants_second_pass():
        optimizer.perturb()                   # move to the adversarial point, take the first gradients away
        try:
            forward_and_backward_again()
        finally:
            optimizer.restore()               # back, to the bit
    optimizer.step()                          # update from the gradients that are there now
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ars2 import flatness, sharded_flatness, updates, validation
from ars2.capturable import to_device_
from ars2.tracked import Batch, TrackedOptimizer
from ars2.updates import Tensors

Mode = Literal["base", "sync", "aga", "periodic", "random"]
MODES: tuple[Mode, ...] = ("base", "sync", "aga", "periodic", "random")


@dataclass
class _Pass:
    """What is known of the step under way; none of it outlives the step, none of it is saved."""

    stage: Literal["idle", "decided", "moved", "restored"] = "idle"
    wanted: bool = False
    phi: float = 0.0
    variance: float = 0.0
    grad_scale: float = 1.0
    saved: list[tuple[list[Tensor], list[Tensor]]] = field(default_factory=list)
    first_gradients: dict[Tensor, Tensor] = field(default_factory=dict)


class ARS2Neo(TrackedOptimizer):
    """The ARS2-Neo optimizer.

    A *matrix* parameter moves by ``p <- (1 - lr*wd) p - lr * |u| * NewtonSchulz(u)`` with Adam's pre-whitened momentum
    ``u = m_hat / (sqrt(v_hat) + eps)``; a *vector* parameter by ``p <- (1 - lr*wd) p - lr * u``, which is AdamW. On a
    step that looks twice, the gradient that enters the moments is taken at ``p + rho * n / |n|``,
    ``n = g / (sqrt(v_hat) + eps) * |p|``, tensor by tensor.

    Flatness (``mode``), geometry and energy can be switched off for matrices. Without geometry they move by ``lr * u``:
    AdamW, and in mode ``"sync"`` SAM on AdamW. Without energy no second moment is kept: ``n = g * |p|``, and ``u`` is
    the momentum at root mean square 1, ``sqrt(numel) * m / |m|``: Muon at another scale, or normalised momentum SGD.
    Its length is Adam's at the first step; that of the raw momentum would fall with the gradient, a second change.

    Args:
        params: parameters, (name, parameter) pairs, or groups of either. A group may say ``track`` (``"matrix"``, the
            default, or ``"vector"``), ``flatten``, ``lr``, ``betas``, ``eps``, ``weight_decay`` and ``rho`` for itself.
            :func:`ars2.param_groups` builds the groups of a model.
        lr: learning rate. On matrices the step is about sqrt(min(rows, cols)) times Adam's at the same value.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, multiplied by ``lr``.
        rho: length of each tensor's move to the adversarial point.
        mode: when the gradient is evaluated twice: ``"base"`` never, ``"sync"`` every step, ``"aga"`` when the global
            cosine ``phi`` of gradient and cached shear force falls below ``-phi_lambda * sqrt(variance)``; its controls
            ``"periodic"`` (steps 1, k+1, 2k+1, ...) and ``"random"`` (step 1, then with ``probability``).
        k: the period of ``"periodic"``; in ``"aga"`` the longest stretch without a look if above 1.
        alpha: strength of the shear force that stands in for the second gradient on steps without a look, in
            ``"aga"`` times ``(1 + max(0, phi))^phi_gamma``.
        phi_beta, phi_lambda, phi_gamma: AGA's variance decay, threshold in standard deviations, and exponent.
        ns_steps, ns_coefficients, ns_dtype: iterations, ``"jordan"`` or ``"polar_express"``, and the products' dtype
            (``"bfloat16"``, ``"float32"``, ``"float64"``).
        energy, geometry: whether matrices take Adam's second moment, and Newton-Schulz, or go without; see above.
        ns_algorithm: ``"standard"``, ``"gram"``, or ``"auto"``: the faster one for each shape, by measurement.
        probability, seed: of ``"random"``; the draws depend on the seed and the step number alone.
        compile: compile the step's arithmetic with ``torch.compile`` when it is first used. Not saved.
        capturable: keep what changes from step to step on the device, the learning rate too, so that a CUDA graph can
            hold a step (modes ``"base"`` and ``"sync"``); a loaded state needs a new graph. Not saved.

    Raises:
        ValueError: an option out of its range, or a parameter that its track cannot take; named in the message.
    """

    shared_options = (
        *("mode", "energy", "geometry", "k", "alpha", "phi_beta", "phi_lambda", "phi_gamma"),
        *("ns_steps", "ns_coefficients", "ns_dtype", "ns_algorithm", "probability", "seed"),
    )
    fixed_options = ("mode", "energy", "geometry")

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
        ns_coefficients: str = "jordan",
        ns_dtype: str = "bfloat16",
        ns_algorithm: str = "auto",
        probability: float = 0.1,
        seed: int = 0,
        compile: bool = False,
        capturable: bool = False,
    ) -> None:
        self._pass = _Pass()
        super().__init__(
            params,
            {
                **{"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rho": rho},
                **{"mode": mode, "energy": energy, "geometry": geometry, "k": k, "alpha": alpha},
                **{"phi_beta": phi_beta, "phi_lambda": phi_lambda, "phi_gamma": phi_gamma},
                **{"ns_steps": ns_steps, "ns_coefficients": ns_coefficients, "ns_dtype": ns_dtype},
                **{"ns_algorithm": ns_algorithm, "probability": probability, "seed": seed},
            },
            *(compile, capturable),
        )
        counters = {"sync_steps": 0, "last_sync": 0, "phi": 0.0, "phi_variance": 0.0, "injected_alpha": 0.0}
        self.param_groups[0].update(counters)
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
                ' a period belongs to mode "periodic" or "aga"'
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
        second = () if group["track"] == "matrix" and not group["energy"] else ("exp_avg_sq",)
        return ("exp_avg", *second, *(("shear",) if keeps_shear else ()))

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
        self._pass = _Pass()

    def _refuse_while_moved(self, what: str) -> None:
        if self._pass.stage == "moved":
            raise RuntimeError(f"{what} while the parameters are at the adversarial point: call restore() first")

    @property
    def always_looks_twice(self) -> bool:
        """Whether every step wants a second pass, so that the first one need not be shared among processes."""
        return bool(self.param_groups[0]["mode"] == "sync")

    @property
    def first_gradients(self) -> dict[Tensor, Tensor]:
        """The gradients of the first pass by parameter, from :meth:`perturb` until :meth:`step`; otherwise empty."""
        return self._pass.first_gradients

    @torch.no_grad()
    def wants_second_pass(self, grad_scale: float = 1.0) -> bool:
        """Say, after the first backward, whether this step evaluates the gradient a second time.

        A second call begins the step anew, as after a step that a gradient scaler skipped.

        Args:
            grad_scale: what the loss was multiplied by, if the gradients are still scaled (a gradient scaler's scale).

        Raises:
            RuntimeError: no parameter has a gradient, or the parameters are at the adversarial point.
        """
        self._refuse_while_moved("wants_second_pass()")
        if not self._check_gradients():
            raise RuntimeError("wants_second_pass(): no parameter has a gradient: call it after backward()")
        main = self.param_groups[0]
        t = main["step"] + 1
        now = _Pass(stage="decided", grad_scale=grad_scale)
        if main["mode"] == "aga":
            if main["sync_steps"] > 0:
                batches = [self._batch(group) for group in self.param_groups]
                now.phi = flatness.global_cosine(
                    [(b.grads, b.state("shear")) for b in batches], grad_scale, self._run(main), self._shards
                )
            now.variance = flatness.next_variance(main, now.phi, t)
        now.wanted = flatness.looks_again(main, t, now.phi, now.variance)
        self._pass = now
        return now.wanted

    @torch.no_grad()
    def perturb(self) -> None:
        """Move the parameters to the adversarial point and take the first gradients out of ``.grad``.

        Raises:
            RuntimeError: :meth:`wants_second_pass` was not called in this step, or the parameters are moved already.
        """
        now = self._pass
        if now.stage != "decided":
            raise RuntimeError("perturb() needs wants_second_pass() right before it, once in each step")
        now.stage = "moved"
        try:
            moves: list[sharded_flatness.Move] = []
            for group in self.param_groups:
                batch = self._batch(group)
                if not batch.params:
                    continue
                now.saved.append((batch.params, [p.clone() for p in batch.params]))
                run, roots = self._run(group), None
                if "exp_avg_sq" in self._state_keys(group):
                    seconds = batch.state("exp_avg_sq")
                    roots = run(updates.second_moment_root)(seconds, group["betas"][1], group["step"], group["eps"])
                if self._shards is None:
                    move = run(flatness.move_to_adversarial_point_)
                    move(batch.params, batch.grads, roots, group["rho"], now.grad_scale)
                else:
                    offsets = flatness.adversarial_offsets(batch.params, batch.grads, roots)
                    moves.append(sharded_flatness.Move(batch.params, offsets, group["rho"]))
            if self._shards is not None:
                sharded_flatness.move_all_(moves, now.grad_scale, self._shards)
            now.first_gradients = {
                # A view, such as into a bucket of gradients, is written over by the next backward pass.
                param: param.grad.clone() if param.grad._is_view() else param.grad
                for group in self.param_groups
                for param in group["params"]
                if param.grad is not None
            }
            for param in now.first_gradients:
                param.grad = None
            # Autocast keeps cast copies of the weights while its block lasts: they would hide the move.
            torch.clear_autocast_cache()
        except BaseException:
            self._abandon()
            raise

    @torch.no_grad()
    def restore(self) -> None:
        """Put the parameters back, to the bit.

        Raises:
            RuntimeError: the parameters are not at the adversarial point.
        """
        now = self._pass
        if now.stage != "moved":
            raise RuntimeError("restore(): the parameters are where they belong; it needs perturb() before it")
        for params, copies in now.saved:
            torch._foreach_copy_(params, copies)
        now.saved.clear()
        now.stage = "restored"
        torch.clear_autocast_cache()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters once.

        Args:
            closure: zeroes the gradients, evaluates the loss, calls backward and returns the loss; it is evaluated once
                or twice as the mode says. If the parts were called in this step, the passes have been made: a closure
                is then evaluated once for its other effects, and only the update is applied.

        Returns:
            What the closure's first evaluation returned; ``None`` without a closure.

        Raises:
            RuntimeError: there is no gradient, the second one is missing, or the parameters are still moved.
        """
        self._refuse_while_moved("step()")
        now, result = self._pass, None
        if closure is not None:
            if now.stage == "idle" and self.param_groups[0]["mode"] != "base":
                return self._step_by_closure(closure)
            with torch.enable_grad():
                result = closure()
        elif now.stage == "idle" and self.param_groups[0]["mode"] != "base":
            raise RuntimeError(
                f"step() without a closure in mode {self.param_groups[0]['mode']!r}: pass step(closure), or call"
                " wants_second_pass(), and if it says so perturb() and restore(), before it"
            )
        if now.stage == "decided" and now.wanted:
            raise RuntimeError("step(): a second pass was wanted and not made: call perturb(), backward and restore()")
        if not self._check_gradients():
            raise RuntimeError("step(): no parameter has a gradient: call it after backward()")
        self._update()
        return result

    def _step_by_closure(self, closure: Callable[[], Any]) -> Any:
        before = [(p, p.grad, p.grad._version) for g in self.param_groups for p in g["params"] if p.grad is not None]
        with torch.enable_grad():
            result = closure()
        if before and all(p.grad is grad and grad._version == version for p, grad, version in before):
            raise RuntimeError(
                "step(closure): the closure computed no gradient; it must zero the gradients, evaluate the loss and"
                " call backward() (in a loop that makes the passes itself, call wants_second_pass() before step())"
            )
        if self.wants_second_pass():
            try:
                self.perturb()
                with torch.enable_grad():
                    closure()
                self.restore()
                if not self._check_gradients():
                    raise RuntimeError("step(closure): the closure computed no gradient at the adversarial point")
            except BaseException:
                self._abandon()
                raise
        self._update()
        return result

    def _abandon(self) -> None:
        """End a step that failed: the parameters where they belong, the first gradients in ``.grad`` again."""
        if self._pass.stage == "moved":
            self.restore()
        if first := self._pass.first_gradients:
            for group in self.param_groups:
                for param in group["params"]:
                    param.grad = first.get(param)
        self._pass = _Pass()

    def _update(self) -> None:
        """Take the gradients that are there into the moments and move the parameters; ends the step."""
        now, main = self._pass, self.param_groups[0]
        self._pass = _Pass()
        synced, t = now.stage == "restored", main["step"] + 1
        alpha = main["alpha"] * (1 + max(0.0, now.phi)) ** main["phi_gamma"] if main["mode"] == "aga" else main["alpha"]
        keeps = "shear" in self._state_keys(main)
        injects = keeps and not synced and alpha > 0
        with self._without_autocast():
            batches = self._batches(now, keeps and synced, alpha if injects else 0.0)
            for group, batch in zip(self.param_groups, batches, strict=True):
                group["step"] += 1
                if batch.params:
                    self._move(group, batch)
        if synced:
            main["sync_steps"] += 1
            main["last_sync"] += t - main["last_sync"]  # in place where it is a tensor
        main["phi"], main["phi_variance"] = now.phi, now.variance
        main["injected_alpha"] = alpha if injects else 0.0

    def _batches(self, now: _Pass, keeps: bool, alpha: float) -> Iterator[Batch]:
        """Yield each group's batch, its shear forces kept if this step looked twice, or injected if ``alpha`` > 0."""
        if self._shards is not None:
            batches = [self._batch(group) for group in self.param_groups]
            if keeps:
                sharded_flatness.keep_shears_(batches, now.first_gradients, now.grad_scale, self._shards)
            yield from sharded_flatness.injected(batches, alpha, self._shards) if alpha > 0 else batches
            return
        for group in self.param_groups:
            batch, run = self._batch(group), self._run(group)
            if batch.params and keeps:
                flatness.keep_shear_(batch.params, batch.grads, batch.states, now.first_gradients, now.grad_scale, run)
            elif batch.params and alpha > 0:
                batch = batch._replace(grads=run(flatness.inject)(batch.grads, batch.state("shear"), alpha))
            yield batch

    def _move(self, group: dict[str, Any], batch: Batch) -> None:
        if group["track"] == "vector" or (group["energy"] and not group["geometry"]):
            self._move_vectors(group, batch)
            return
        run = self._run(group)
        if group["energy"]:
            directions: Tensors = run(updates.adam_directions)(
                *(batch.grads, batch.state("exp_avg"), batch.state("exp_avg_sq")),
                *(group["betas"], group["step"], group["eps"]),
            )
        else:
            numels = [shape.numel() for shape in batch.shapes]
            directions = run(updates.momentum_directions)(
                batch.grads, batch.state("exp_avg"), group["betas"][0], numels=numels, shards=self._shards
            )
        energies = None
        if group["geometry"]:
            energies = run(updates.energies)(directions, self._shards)
            directions = updates.orthogonal_directions(
                *(directions, group["flatten"], group["ns_steps"], group["ns_coefficients"]),
                *(validation.DTYPES[group["ns_dtype"]], group["ns_algorithm"]),
                ranks=self._ranks,
                run=run,
                shapes=batch.shapes,
            )
        run(updates.apply_)(batch.params, directions, energies, group["lr"], group["weight_decay"])

    def diagnostics(self) -> dict[str, float]:
        """Return what the last step saw, as plain numbers; reads the device only where the step is capturable.

        Keys: ``steps``, ``sync_steps`` (steps that looked twice), ``gradient_evaluations``, ``effective_k`` (steps a
        look, infinite before the first); where a shear force is kept ``alpha`` (what the last step injected, 0 if it
        looked); in AGA ``phi``, ``phi_deviation`` and ``threshold`` (``-phi_lambda`` deviations).
        """
        main = self.param_groups[0]
        return flatness.diagnostics(main, keeps_shear="shear" in self._state_keys(main))
