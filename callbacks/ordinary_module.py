"""Train, count and probe an ordinary LightningModule like a task module."""

import inspect
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from ars2.lightning import TwoPass, loss_of, silent


class OrdinaryModule(TwoPass):
    """Provide what other callbacks need of a module with automatic optimization.

    It has the members of :class:`callbacks.module_protocol.TrainedModule`, and makes second passes. It logs the mean
    training loss of every epoch as ``train/loss``, which reports read. Checkpoints contain the sums behind it, so that
    the mean of an epoch resumed in its middle includes the batches before the stop. Of several processes they contain
    those of the first, which stand for the others'.
    """

    changes_training = False
    policy, splits = "all", None
    unit = "examples"
    fatal_error, stop_agreed = None, None

    def __init__(self) -> None:
        super().__init__()
        self.stop_asked = False
        self.val_metrics: dict[str, Any] = {}
        self._loss: Tensor | float = 0.0
        self._examples = self._in_batch = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.network = pl_module
        if not pl_module.automatic_optimization:
            name = type(pl_module).__name__
            raise ValueError(
                f"{name} makes its own optimizer steps (automatic_optimization is False), which train.py cannot count:"
                " leave them to Lightning, or derive the class from modules.two_pass.TwoPassModule"
            )

    @property
    def device(self) -> torch.device:
        return self.network.device

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.network.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.network.named_parameters()

    def buffers(self) -> Iterator[Tensor]:
        return self.network.buffers()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "loss": float(self._loss), "examples": self._examples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # Older checkpoints lack them.
        self._loss, self._examples = state_dict.get("loss", 0.0), state_dict.get("examples", 0)

    def batch_size(self, batch: Any) -> int:
        counted: Any = getattr(self.network, "batch_size", None)  # of many modules it is a number
        if callable(counted):
            return int(counted(batch))
        try:
            return extract_batch_size(batch)
        except (MisconfigurationException, RecursionError) as error:
            name = type(self.network).__name__
            raise ValueError(
                f"the number of examples in a batch of {name}, a {type(batch).__name__}, is not known, because it has"
                f" no tensors: add the method batch_size(batch) to {name}"
            ) from error

    def compute_loss(self, batch: Any, metrics: None) -> Tensor:
        """Return the loss of ``training_step``, without its logs and metrics."""
        step = self.network.training_step
        arguments = (batch, 0)[: len(inspect.signature(step).parameters)]
        with silent(self.network):
            return loss_of(step(*arguments), self.network)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._in_batch = self.batch_size(batch)  # before the training step, which may take the tensors out

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if outputs:  # a step without a loss has none
            self._loss = self._loss + outputs["loss"].detach() * (trainer.accumulate_grad_batches * self._in_batch)
            self._examples += self._in_batch
        # Not in on_train_epoch_end, because other callbacks read the loss there.
        if trainer.is_last_batch:
            self._log_loss(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._loss, self._examples = 0.0, 0  # not where an epoch is resumed

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_last_batch:  # max_steps has ended it
            self._log_loss(trainer, pl_module)

    def _log_loss(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._examples:
            return
        loss = self._loss / self._examples
        if not torch.isfinite(torch.as_tensor(loss)):
            raise FloatingPointError(
                f"the training loss is {float(loss)} in epoch {trainer.current_epoch + 1}: lower the learning rate,"
                " clip the gradient (trainer.gradient_clip_val), or check the data"
            )
        several = trainer.world_size > 1
        pl_module.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=1, sync_dist=several, prog_bar=True)
