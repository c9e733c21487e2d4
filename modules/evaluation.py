"""Evaluate a task module and log its metrics once an epoch.

Checkpoints contain the metrics of an unfinished epoch.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as L
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torchmetrics import Metric

from experiment.distributed import gather_per_rank, local_share
from modules.checks import examples_in
from modules.metrics import MeanLoss, Metrics, load_metric_state, metric_state


class EvaluatedModule(L.LightningModule):
    """Evaluate, and log the metrics of every stage.

    A subclass implements training and updates ``train_metrics`` with every batch. If its unit is not examples,
    ``same_units`` states whether every example has equally many units.
    """

    same_units = False

    def compute_loss(self, batch: Any, metrics: Metrics | None) -> Tensor:
        """Return the mean loss of ``batch``, a scalar, and update ``metrics``.

        ``metrics`` is ``None`` in a second pass and where a callback probes the loss, so that nothing is logged.
        """
        raise NotImplementedError

    def checked_loss(self, batch: Any, metrics: Metrics | None) -> Tensor:
        """Return the result of :meth:`compute_loss`.

        Raises:
            TypeError: it is not a scalar tensor, or has no gradient in training.
        """
        loss: Any = self.compute_loss(batch, metrics)
        name = type(self).__name__
        if not isinstance(loss, Tensor) or loss.ndim:
            got = f"one of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise TypeError(f"{name}.compute_loss() must return the mean loss, a scalar tensor, and returned {got}")
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise TypeError(
                f"{name}.compute_loss() returned a loss that depends on no parameter of self.network: compute it from"
                " the network's output, without detach(), item() or torch.no_grad()"
            )
        return loss

    def batch_size(self, batch: Any) -> int:
        """Return the number of examples, or other units, in ``batch``.

        By default this is the length of all its tensors with a dimension.

        Raises:
            TypeError: its sequences and mappings contain no such tensor, or some of other lengths.
        """
        counts = examples_in(batch)
        if len(counts) != 1:
            found = f"tensors of lengths {', '.join(map(str, sorted(counts)))}" if counts else "no tensor with a length"
            raise TypeError(
                f"a batch of type {type(batch).__name__} has {found}, so that its number of examples is not known:"
                f" override batch_size(batch) in {type(self).__name__}"
            )
        return next(iter(counts))

    def set_metrics(self, metrics: Mapping[str, Metric]) -> None:
        """Set the metrics of the task, by log name.

        Every stage gets copies and a mean loss.

        Raises:
            TypeError: it is not a mapping of metrics.
            ValueError: a name is that of the mean loss, or contains a dot.
        """
        what = f"{type(self).__name__}.set_metrics() takes a dictionary of torchmetrics by name"
        if not isinstance(metrics, Mapping):
            raise TypeError(f"{what}, such as {{'accuracy': BinaryAccuracy()}}, and got a {type(metrics).__name__}")
        for name, metric in metrics.items():
            if not isinstance(metric, Metric):
                got = f"the class {metric.__name__}: make an object of it" if isinstance(metric, type) else repr(metric)
                raise TypeError(f"{what}, and {name!r} is {got}")
            if name == "loss" or "." in name:
                raise ValueError(f"{what}, and {name!r} is no valid name: it is that of the mean loss, or has a dot")

        def stage() -> nn.ModuleDict:
            return nn.ModuleDict({"loss": MeanLoss(), **{name: metric.clone() for name, metric in metrics.items()}})

        self.train_metrics: Metrics = stage()
        self.val_metrics: Metrics = stage()
        self.test_metrics: Metrics = stage()

    def validation_step(self, batch: Any, batch_index: int) -> None:
        self._evaluate(batch, self.val_metrics)

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val", self.val_metrics)

    def test_step(self, batch: Any, batch_index: int) -> None:
        self._evaluate(batch, self.test_metrics)

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test", self.test_metrics)

    def _evaluate(self, batch: Any, metrics: Metrics) -> None:
        if examples := self.batch_size(batch):
            metrics["loss"].update(self.checked_loss(batch, metrics), examples)
            return
        # This process has no example of the batch. A sharded network needs the forward pass of every process, so it
        # runs an example of zeros, because few networks accept an empty batch.
        if self.device_mesh is not None:
            self.compute_loss(apply_to_collection(batch, Tensor, lambda t: t.new_zeros(1, *t.shape[1:])), None)
        metrics["loss"].update(torch.zeros((), device=self.device), 0)

    def _log_metrics(self, stage: str, metrics: Metrics, **more: float) -> None:
        """Log the values of ``metrics`` and ``more``, and reset the metrics.

        Nothing is logged if there was no batch.

        Raises:
            ValueError: :meth:`compute_loss` has not updated a metric in an evaluation.
            FloatingPointError: the training loss is not finite.
        """
        if not metrics["loss"].update_called:
            return
        unused = [name for name, metric in metrics.items() if not metric.update_called]
        if unused and stage != "train" and self.trainer.world_size == 1 and metrics["loss"].examples:
            raise ValueError(
                f"{type(self).__name__}.compute_loss() did not update the metric {unused[0]}: call"
                f" metrics[{unused[0]!r}].update(...) in it, or remove the metric from set_metrics()"
            )
        # A metric without updates has no value. All processes skip the same training steps, but in evaluation some may
        # have had no example. They must call compute() too, which is a collective.
        same_updates = stage == "train" or self.trainer.world_size == 1
        none = torch.full((), torch.nan, device=self.device)
        values = {
            f"{stage}/{name}": none.clone() if same_updates and not metric.update_called else metric.compute()
            for name, metric in metrics.items()
        }
        trained = stage == "train" and bool(metrics["loss"].examples)
        for metric in metrics.values():
            metric.reset()
        if trained and not torch.isfinite(values["train/loss"]):
            raise FloatingPointError(
                f"the training loss is {values['train/loss'].item()} in epoch {self.current_epoch + 1}: lower the"
                " learning rate, clip the gradient (gradient_clip_val), or check the data"
            )
        values |= {f"{stage}/{name}": torch.full((), value, device=self.device) for name, value in more.items()}
        self._log_identical(values, prog_bar=True)

    def _log_identical(self, values: Mapping[str, Tensor], prog_bar: bool = False) -> None:
        """Log once in an epoch values that are equal on every process."""
        # Lightning warns of values that it does not reduce. The maximum of equal values is exact; their mean may round.
        shared = self.trainer.world_size > 1
        self.log_dict(
            values,
            prog_bar=prog_bar,
            on_step=False,
            on_epoch=True,
            batch_size=1,
            sync_dist=shared,
            reduce_fx="max" if shared else "mean",
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # A run resumed in the middle of an epoch then reports the full epoch.
        several = self.trainer.world_size > 1
        checkpoint["train_metrics"] = {name: metric_state(metric, several) for name, metric in self._train_metrics()}
        if several:
            # Rounding depends on the order of summation, so resuming with as many processes starts from local sums.
            local = {name: metric_state(metric, False) for name, metric in self._train_metrics()}
            checkpoint["train_metric_shares"] = gather_per_rank(self.trainer, local)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = local_share(self.trainer, checkpoint.get("train_metric_shares", []))
        if saved is None:
            # Rank 0 takes the sums over all processes; the others start from zero.
            saved = checkpoint["train_metrics"] if self.trainer.is_global_zero else {}
        for name, metric in self._train_metrics():
            if name in saved:
                load_metric_state(metric, saved[name])

    def _train_metrics(self) -> Iterator[tuple[str, Metric]]:
        return ((name, m) for name, m in self.train_metrics.named_modules() if isinstance(m, Metric))
