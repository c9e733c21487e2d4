"""Implement the parts of a two-pass step and detect their misuse."""

import inspect
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ars2 import flatness, sharded_flatness, updates
from ars2.batch import Batch
from ars2.sharded import local
from ars2.tracked import TrackedOptimizer


class Backup(NamedTuple):
    """Keep copies of parameters.

    With ``start`` the copy is of a flat chunk of the only parameter, from that entry on.
    """

    params: list[Tensor]
    copies: list[Tensor]
    start: int | None = None


@dataclass
class StepState:
    """Track the progress of the current step.

    It is reset after every step and never saved. The optimizer changes it in place, because the wrappers of Fabric and
    Lightning share the object, but would not share a new attribute.
    """

    stage: Literal["idle", "decided", "moved", "restored"] = "idle"
    wanted: bool = False
    phi: float = 0.0
    variance: float = 0.0
    backups: list[Backup] = field(default_factory=list)
    first_gradients: dict[Tensor, Tensor] = field(default_factory=dict)

    def assign(self, other: "StepState") -> None:
        """Copy the fields of ``other``."""
        self.stage, self.wanted, self.phi, self.variance = other.stage, other.wanted, other.phi, other.variance
        self.backups, self.first_gradients = other.backups, other.first_gradients


class TwoPassOptimizer(TrackedOptimizer):
    """Provide a base for optimizers that may request a second pass.

    Its groups have the options of :class:`ars2.ARS2Neo` that decide when a step makes a second pass, and how far it
    moves.
    """

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], compile: bool = False, capturable: bool = False
    ) -> None:
        self._step_state = StepState()
        if defaults["mode"] != "base" and _is_made_by_zero():
            raise ValueError(
                "ZeroRedundancyOptimizer gives each process only a part of the parameters, so they cannot all move to"
                f' the adversarial point: use mode "base" with it, not "{defaults["mode"]}", or shard the model with'
                " torch.distributed.fsdp.fully_shard"
            )
        super().__init__(params, defaults, compile, capturable)

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
            raise RuntimeError(f"{what} fails while the parameters are at the adversarial point: call restore() first")

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
        return bool(self.param_groups[0]["mode"] == "base")

    @property
    def decides_alike(self) -> bool:
        """Return whether ranks with equal gradients decide alike without an exchange.

        AGA's decision depends on the rounding of phi. Ranks share it after :meth:`distribute`, and always where
        parameters are sharded.
        """
        return bool(self.param_groups[0]["mode"] != "aga" or self._layout is not None)

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
            RuntimeError: the parameters are at the adversarial point.
        """
        self._refuse_while_moved("wants_second_pass()")
        if not self._check_gradients():
            self._step_state.assign(StepState())
            return False
        main = self.param_groups[0]
        t = main["step"] + 1
        state = StepState(stage="decided")
        if main["mode"] == "aga":
            if main["sync_steps"] > 0:
                chunks = [chunk for group in self.param_groups for chunk in self._chunks(self._batch(group))]
                pairs: list[tuple[updates.Tensors, updates.Tensors]] = [
                    (chunk.grads, chunk.state("shear")) for chunk in chunks
                ]
                state.phi = flatness.global_cosine(pairs, self._maybe_compile(main), self._layout)
            state.variance = flatness.next_variance(main, state.phi, t)
        state.wanted = flatness.is_sync_step(main, t, state.phi, state.variance)
        self._step_state.assign(state)
        return state.wanted

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
        state.stage = "moved"
        try:
            moves: list[sharded_flatness.Move] = []
            for group in self.param_groups:
                for chunk in [chunk for batch in self._batches_by_count(group) for chunk in self._chunks(batch)]:
                    if self._shards is None:
                        self._move_to_adversarial_point(group, chunk)
                        continue
                    state.backups.append(Backup(chunk.params, [p.clone() for p in chunk.params]))
                    moves.append(sharded_flatness.Move(chunk.params, self._offsets(group, chunk), group["rho"]))
            if self._shards is not None:
                sharded_flatness.move_all_(moves, self._shards)
            state.first_gradients = {
                # The next backward pass overwrites views, such as those into gradient buckets.
                param: param.grad.clone() if param.grad._is_view() else param.grad
                for group in self.param_groups
                for param in group["params"]
                if param.grad is not None
            }
            for param in state.first_gradients:
                param.grad = None
            # Autocast caches cast weights within its block. The cache would hide the move.
            torch.clear_autocast_cache()
        except BaseException:
            self._abandon()
            raise

    def _move_to_adversarial_point(self, group: dict[str, Any], chunk: Batch) -> None:
        state, flat_chunks = self._step_state, list(self._flat_chunks(chunk))
        if len(flat_chunks) == 1:
            state.backups.append(Backup(chunk.params, [p.clone() for p in chunk.params]))
            move = self._maybe_compile(group)(flatness.move_to_adversarial_point_)
            move(chunk.params, chunk.grads, self._adam_denominators(group, chunk), group["rho"])
            return
        # Computing the offsets of a large tensor twice costs less than storing them.
        lengths = flatness.norms([flatness.norms(self._offsets(group, flat_chunk)) for flat_chunk in flat_chunks])
        length = torch.linalg.vector_norm(lengths, keepdim=True)
        start = 0
        for flat_chunk in flat_chunks:
            state.backups.append(Backup(chunk.params, [p.clone() for p in flat_chunk.params], start))
            start += flat_chunk.params[0].numel()
            flatness.move_along_(flat_chunk.params, self._offsets(group, flat_chunk), length, group["rho"])

    def _adam_denominators(self, group: dict[str, Any], chunk: Batch) -> updates.Tensors | None:
        if "exp_avg_sq" not in self._state_keys(group):
            return None
        adam_denominator = self._maybe_compile(group)(updates.adam_denominator)
        denominators: updates.Tensors = adam_denominator(
            chunk.state("exp_avg_sq"), group["betas"][1], chunk.step, group["eps"]
        )
        return denominators

    def _offsets(self, group: dict[str, Any], chunk: Batch) -> updates.Tensors:
        return flatness.adversarial_offsets(chunk.params, chunk.grads, self._adam_denominators(group, chunk))

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the parameters, bit for bit.

        Raises:
            RuntimeError: the parameters are not at the adversarial point.
        """
        state = self._step_state
        if state.stage != "moved":
            raise RuntimeError("restore(): the parameters have not moved: call perturb() first")
        for params, copies, start in state.backups:
            if start is not None:
                params = [params[0].view(-1)[start : start + copies[0].numel()]]
            torch._foreach_copy_(params, copies)
        state.backups.clear()
        state.stage = "restored"
        torch.clear_autocast_cache()

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
        if before and all(p.grad is grad and local(grad)._version == version for p, grad, version in before):
            raise RuntimeError(
                "step(closure): the closure computed no gradient: zero the gradients, evaluate the loss and call"
                " backward() in it (a loop that makes the passes itself calls wants_second_pass() before step())"
            )
        if not self._check_gradients():
            return result
        # Gradients that the closure zeroed in place or added to. With create_graph adding makes a new tensor.
        reused = [p for p, grad, _ in before if p.grad is not None and (p.grad is grad or p.grad.requires_grad)]
        if self.wants_second_pass():
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
                self._check_not_added_to(reused)
            except BaseException:
                self._abandon()
                raise
        self._update()
        return result

    @staticmethod
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
                " cannot repeat: zero the gradients and evaluate all micro-batches in the closure, or make the passes"
                " with wants_second_pass(), perturb() and restore() (Lightning's accumulate_grad_batches does neither)"
            )

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
        self._step_state.assign(StepState())

    def _update(self) -> None:
        """Update moments and parameters from the gradients in ``.grad``; end the step."""
        raise NotImplementedError


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
