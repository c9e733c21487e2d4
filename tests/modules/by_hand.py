"""Train with plain torch loops, to compare Lightning with."""

from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ars2 import ARS2Neo, param_groups
from tests.modules.small_task import SmallNetwork, SmallTask, batches, make_optimizer, state_of


@dataclass
class Loop:
    """Train without Lightning, in one pass or two, with accumulation.

    Windows of batches add up their gradients. ``damaged`` are steps, counted from 0, that a gradient which is not
    finite spoils: nothing of them may stay.
    """

    name: str
    epochs: int = 2
    window: int = 1
    clip: float | None = None
    clip_algorithm: Literal["norm", "value"] = "norm"
    clip_first_pass: bool = False
    autocast: torch.dtype | None = None
    dtype: torch.dtype = torch.float32
    scaler: torch.amp.GradScaler | None = None
    scheduler: Callable[[Any], Any] | None = None
    interval: Literal["epoch", "step", "gradient_evaluation"] = "epoch"
    max_steps: int | None = None
    limit: int | None = None
    same_batches: bool = False
    damaged: Collection[int] = ()

    def train(self) -> dict[str, Tensor]:
        """Return what :func:`tests.modules.small_task.state_of` returns for a module."""
        torch.manual_seed(0)
        self.network = SmallNetwork().to(self.dtype)
        self.optimizer: Any = make_optimizer(self.name)(param_groups(self.network))
        self.steps, self.made = 0, 0
        scheduler = None if self.scheduler is None else self.scheduler(self.optimizer)
        loader = batches()
        first_epoch: list[Any] = []
        for _ in range(self.epochs):
            epoch = first_epoch if self.same_batches and first_epoch else list(loader)[: self.limit]
            first_epoch = first_epoch or epoch
            for start in range(0, len(epoch), self.window):
                if self.made == self.max_steps:
                    break
                before = self._sync_steps()
                made = self._step(epoch[start : start + self.window])
                times = {"epoch": 0, "step": 1, "gradient_evaluation": 1 + self._sync_steps() - before}[self.interval]
                for _ in range(times if scheduler is not None and made else 0):
                    scheduler.step()  # type: ignore[union-attr]
            if scheduler is not None and self.interval == "epoch" and self.made != self.max_steps:
                scheduler.step()
        module = SmallTask(optimizer=lambda params: self.optimizer)
        module.network = self.network
        module.optimizers = lambda: type("Wrapped", (), {"optimizer": self.optimizer})  # type: ignore[assignment, return-value]
        return state_of(module)

    def _sync_steps(self) -> int:
        return int(self.optimizer.param_groups[0].get("sync_steps", 0))

    def _passes(self, members: list[Any]) -> None:
        for images, classes in members:
            with nullcontext() if self.autocast is None else torch.autocast("cpu", self.autocast, cache_enabled=False):
                loss = F.cross_entropy(self.network(images.to(self.dtype)), classes) / self.window
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def _clip(self, scale: float = 1.0) -> None:
        if self.clip is None:
            return
        ordered = [param for group in self.optimizer.param_groups for param in group["params"]]
        if self.clip_algorithm == "norm":
            nn.utils.clip_grad_norm_(ordered, self.clip * scale)
        else:
            nn.utils.clip_grad_value_(ordered, self.clip * scale)

    def _step(self, members: list[Any]) -> bool:
        """Return whether there was an update."""
        before = [buffer.clone() for buffer in self.network.buffers()]
        self.optimizer.zero_grad()
        if getattr(self.optimizer, "moves_first_pass", False):
            self.optimizer.move_along_momentum()
        self._passes(members)
        if getattr(self.optimizer, "moves_first_pass", False):
            self.optimizer.restore()
        statistics = [buffer.clone() for buffer in self.network.buffers()]
        if isinstance(self.optimizer, ARS2Neo):
            if self.clip_first_pass:
                self._clip(1.0 if self.scaler is None else self.scaler.get_scale())
            if self.optimizer.wants_second_pass():
                self.optimizer.perturb()
                self._passes(members)
                self.optimizer.restore()
        gradients = [param.grad for param in self.network.parameters() if param.grad is not None]
        if self.steps in self.damaged:
            gradients[0].view(-1)[0] = torch.inf
        made = all(bool(gradient.isfinite().all()) for gradient in gradients)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
            self._clip()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif made:
            self._clip()
            self.optimizer.step()
        for buffer, value in zip(self.network.buffers(), statistics if made else before, strict=True):
            buffer.copy_(value)
        self.steps += 1
        self.made += made
        return made
