"""Train any optimizer, with a second pass where it requests one.

The training step evaluates the gradient once or twice and updates once. It knows neither the task nor the optimizer.
Both passes use the same batches and random numbers. Buffers (BatchNorm's statistics) and the reported loss come from
the first pass. :mod:`modules.evaluation` logs metrics, and :mod:`modules.nonfinite` finds steps that must be skipped.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DistributedSampler

from ars2.param_groups import Policy
from ars2.replay import first_pass, random_state, second_pass
from experiment.library_internals import is_compiled
from modules.checks import check_average, check_callbacks, check_complete, check_trainer
from modules.evaluation import EvaluatedModule
from modules.metrics import snapshot
from modules.nonfinite import StepRecord, lower_scale
from modules.optimizers import build_optimizer, first_step
from modules.resuming import ResumableModule
from modules.saved_arguments import arguments_of
from modules.sharding import shard

# An epoch that ends with this many skipped steps in a row ends the run, because the model no longer learns.
MOST_SKIPPED = 100


class TwoPassModule(ResumableModule):
    """Provide a base for task modules with manual optimization.

    It implements schedulers, clipping and accumulation. A task module sets ``self.network``, calls :meth:`set_metrics`,
    and implements :meth:`compute_loss`. An optimizer with the parts of a two-pass step (``wants_second_pass``,
    ``perturb``, ``restore``) is driven through them; any other makes one pass. The optional attributes
    ``never_two_pass``, ``always_two_pass`` and ``decides_alike``, see :class:`ars2.ARS2Neo`, save
    stored batches and exchanges. With its attribute ``moves_first_pass``, each batch is evaluated at moved parameters,
    and so are the reported training loss and BatchNorm's statistics.

    Args:
        optimizer: takes parameter groups and returns the optimizer. With ``None``, the default of
            ``load_from_checkpoint()``, the module can be evaluated but not trained.
        scheduler: takes the optimizer and returns a learning-rate scheduler. The ``ReduceLROnPlateau`` of
            ``lightning.pytorch.cli`` has a ``monitor``, the metric whose value it gets at the end of every epoch.
        scheduler_interval: whether the scheduler is stepped after every ``"epoch"``, after every ``"step"`` (update),
            or once for every ``"gradient_evaluation"`` of an update, so that one schedule serves one budget with any
            optimizer.
        policy: which parameters are matrices, see :func:`ars2.param_groups`. Every optimizer gets these groups.
        matrix, vector: options for the groups of that track, such as ``{"weight_decay": 0.0}``.
        gradient_clip_val: limit of the gradient in the update. ``None`` does not clip.
        gradient_clip_algorithm: ``"norm"`` (global) or ``"value"`` (elementwise).
        accumulate_grad_batches: batches in an update, in both passes. The last window of an epoch may be shorter; its
            losses are divided by the same number, as in Lightning. Several processes exchange gradients once for each
            window and pass. Until then each has a full gradient, even of a sharded network.
        clip_first_pass: whether the first gradient of a two-pass step is clipped too, with the same limit.
        nonfinite: reaction to a loss or gradient, of either pass, that is not finite. Such a step is never made.
            ``"stop"`` ends the run with an error that names step, pass and parameter; ``"skip"`` continues with the
            next batch. A gradient scaler needs such steps to find its scale: they are skipped and the scale is lowered,
            and ``"stop"`` ends the run only when the scale has become useless. ``train/skipped_steps`` counts skipped
            steps. Schedulers and the optimizer do not count them, and the metrics of the epoch exclude their
            batches. An epoch with only skipped steps is logged as NaN. An epoch that ends with 100 of them in a row
            ends the run.
        local_first_pass: whether each of several processes computes the adversarial point from its part of the batch,
            if every step is a two-pass step (m-sharpness, Foret et al. 2021). This saves one all-reduce of the
            gradient.
        gather: whether several processes exchange orthogonal directions ``"exact"`` or in ``"bfloat16"``, see
            :meth:`ars2.base.TrackedOptimizer.distribute`.
        splits: row blocks of fused weights by patterns of their names, see :func:`ars2.param_groups`.

    Raises:
        ValueError: an option out of its range.
    """

    # Other methods that use the network's parameters. A sharded network is gathered for them as for compute_loss().
    uses_parameters: tuple[str, ...] = ("predict_step",)
    unit = "examples"  # the unit of batch_size() and of mean losses

    def __init__(
        self,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: Literal["epoch", "step", "gradient_evaluation"] = "epoch",
        policy: Policy = "all",
        matrix: dict[str, Any] | None = None,
        vector: dict[str, Any] | None = None,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        accumulate_grad_batches: int = 1,
        clip_first_pass: bool = False,
        nonfinite: Literal["stop", "skip"] = "stop",
        local_first_pass: bool = False,
        gather: Literal["exact", "bfloat16"] = "exact",
        splits: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._arguments = arguments_of(self, inspect.currentframe())
        if gather not in ("exact", "bfloat16"):
            raise ValueError(f"gather must be 'exact' or 'bfloat16', got {gather!r}")
        if scheduler_interval not in ("epoch", "step", "gradient_evaluation"):
            raise ValueError(
                f"scheduler_interval must be 'epoch', 'step' or 'gradient_evaluation', got {scheduler_interval!r}"
            )
        if nonfinite not in ("stop", "skip"):
            raise ValueError(f"nonfinite must be 'stop' or 'skip', got {nonfinite!r}")
        if accumulate_grad_batches < 1:
            raise ValueError(f"accumulate_grad_batches must be at least 1, got {accumulate_grad_batches}")
        if gradient_clip_val is not None and gradient_clip_val <= 0:
            raise ValueError(f"gradient_clip_val must be above 0, or null for no clipping, got {gradient_clip_val}")
        self.automatic_optimization = False
        self.make_optimizer, self.make_scheduler, self.scheduler_interval = optimizer, scheduler, scheduler_interval
        self.policy, self.matrix, self.vector, self.splits = policy, matrix, vector, splits
        self.gradient_clip_val, self.gradient_clip_algorithm = gradient_clip_val, gradient_clip_algorithm
        self.accumulate_grad_batches = accumulate_grad_batches
        self.clip_first_pass, self.nonfinite = clip_first_pass, nonfinite
        self.local_first_pass, self.gather = local_first_pass, gather
        self._skipped_in_a_row = 0
        # The error that ends training. It is raised at the end of the batch, after callbacks could save a checkpoint.
        self.fatal_error: str | None = None
        # Whether this process was asked to stop, and whether any was at the last update. None with a single process.
        self.stop_asked = False
        self.stop_agreed: bool | None = None
        # For each batch of the open window: batch, weight and random state, or None if no second pass repeats it
        self._window: list[Any] = []
        self._record = StepRecord()
        self._is_second_pass = False
        self._restore_metrics: Callable[[], None] = lambda: None
        self._has_exchanged = False
        self._has_updated = False  # in this process

    def configure_model(self) -> None:
        """Shard the network over the processes under ModelParallelStrategy.

        Raises:
            ValueError: the network or the options do not allow sharding.
        """
        if self.device_mesh is None:
            return
        if self.local_first_pass:
            raise ValueError(
                "local_first_pass does not support a sharded network: use strategy ddp, or set local_first_pass to"
                " false"
            )
        # Shard the module, because a loss may call submodules of the network directly.
        shard(self, ("compute_loss", *self.uses_parameters), self.device_mesh)

    @staticmethod
    def compile_once(network: nn.Module) -> None:
        """Compile ``network`` in place, unless it is compiled already.

        A wrapper would change the names of the parameters.
        """
        if not is_compiled(network):
            network.compile()

    @property
    def between_steps(self) -> bool:
        """Return whether no window of batches is open.

        Only then a checkpoint contains everything that training needs.
        """
        return not self._window

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        scaler: torch.amp.GradScaler | None = getattr(self.trainer.precision_plugin, "scaler", None)
        return scaler

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """Make the passes of one batch, and the update when its window is full.

        A window is ``accumulate_grad_batches`` batches.

        Returns:
            The loss of the first pass.
        """
        wrapped: Any = self.optimizers()
        # Only step() may be called on Lightning's wrapper. Its other methods would act on the wrapper itself.
        optimizer = wrapped.optimizer
        two_pass = hasattr(optimizer, "wants_second_pass") and not getattr(optimizer, "never_two_pass", False)
        if self.between_steps:
            optimizer.zero_grad()
            self._record.begin(self.network)
            self._restore_metrics = snapshot(metric for _, metric in self._train_metrics())
        weight = self._weight(batch)
        self._window.append((batch, weight, random_state(self.device)) if two_pass else None)
        is_last = len(self._window) == self.accumulate_grad_batches or self.trainer.is_last_batch
        with first_pass(optimizer, self):
            loss = self.checked_loss(batch, self.train_metrics)
            self.train_metrics["loss"].update(loss.detach(), self.batch_size(batch))
            self._record.losses[0].append(loss.detach())
            local = self.local_first_pass and getattr(optimizer, "always_two_pass", False)
            self._backward(loss * weight, sync=is_last and not local)
        if not is_last:
            return loss.detach()
        if two_pass and self.clip_first_pass and self.gradient_clip_val is not None:
            scale = 1.0 if self._scaler is None else self._scaler.get_scale()
            self.clip_gradients(optimizer, self.gradient_clip_val * scale, self.gradient_clip_algorithm)
        if again := two_pass and self._wants_second_pass(optimizer):
            self._second_pass(optimizer)
        self._window.clear()
        self.gradient_evaluations += 1 + again
        nonfinite, stop = self._on_any_rank(~self._record.is_finite(optimizer), self.stop_asked)
        if self.trainer.world_size > 1:
            self.stop_agreed = stop
        if not nonfinite:
            if self._has_updated:
                wrapped.step()
            else:
                saves = bool(self.trainer.checkpoint_callbacks)
                first_step(wrapped, self.network, self.gradient_clip_val is not None, saves)
                self._has_updated = True
            self._skipped_in_a_row = 0
            self._step_scheduler("step")
            for _ in range(1 + again):
                self._step_scheduler("gradient_evaluation")
        else:
            self._skip_step(optimizer)
        return loss.detach()

    def log(self, *args: Any, **options: Any) -> None:
        """Log as Lightning does, but nothing from a second pass.

        Logged values are those of the first pass.
        """
        if not self._is_second_pass:
            super().log(*args, **options)

    def _second_pass(self, optimizer: Any) -> None:
        self._is_second_pass = True
        try:
            with second_pass(optimizer, self._record.frozen_statistics(self.network), [self.device]):
                for number, (batch, weight, replay) in enumerate(self._window, start=1):
                    replay()
                    loss = self.compute_loss(batch, None)
                    self._record.losses[1].append(loss.detach())
                    self._backward(loss * weight, sync=number == len(self._window))
        finally:
            self._is_second_pass = False

    def _backward(self, loss: Tensor, sync: bool) -> None:
        """Add the gradient of one batch of a window.

        The gradient of the window so far is exchanged only if ``sync``.
        """
        strategy: Any = self.trainer.strategy
        if self.device_mesh is not None:
            module: Any = self  # an FSDPModule by now
            module.set_requires_gradient_sync(sync)
        blocked = not sync and isinstance(strategy, DDPStrategy)
        # DDP records a static graph in its first backward pass, which fails without the exchange.
        blocked = blocked and (self._has_exchanged or not strategy.model.static_graph)
        self._has_exchanged = True
        with strategy.block_backward_sync() if blocked else nullcontext():
            self.manual_backward(loss / self.accumulate_grad_batches)

    def _wants_second_pass(self, optimizer: Any) -> bool:
        wanted: bool = optimizer.wants_second_pass()
        if getattr(optimizer, "decides_alike", False) or getattr(optimizer, "always_two_pass", False):
            return wanted
        # All ranks must agree, or the next collective deadlocks.
        return self._on_any_rank(wanted)[0]

    def _on_any_rank(self, *flags: Tensor | bool) -> list[bool]:
        """Return for each flag whether it is set on any rank.

        All flags take one reduction, and one read of the device.
        """
        if self.trainer.world_size == 1:
            return [bool(flag) for flag in flags]
        packed = torch.zeros(len(flags), device=self.device)
        for index, flag in enumerate(flags):
            # fill_ copies from the device, or passes a number to the kernel. Neither synchronises.
            packed[index].fill_(flag)
        torch.distributed.all_reduce(packed, torch.distributed.ReduceOp.MAX)
        return [bool(flag) for flag in packed.tolist()]

    def _weight(self, batch: Any) -> Tensor | float:
        """Return the weight of this process' mean loss in the mean over the batch.

        It is 1 where all processes have equally many examples. The processes exchange their counts only if the loader
        does not provide the weight.
        """
        if self.trainer.world_size == 1:
            return 1.0
        loader: Any = self.trainer.train_dataloader
        if self.same_units or type(self).batch_size is EvaluatedModule.batch_size:
            if isinstance(getattr(loader, "sampler", None), DistributedSampler):
                return 1.0  # it pads the last share
            if hasattr(loader, "share_weight"):
                return float(loader.share_weight)
        count = torch.full((), float(self.batch_size(batch)), device=self.device)
        total = count.clone()
        torch.distributed.all_reduce(total)
        return count * self.trainer.world_size / total

    def _skip_step(self, optimizer: Any) -> None:
        """Undo the effects of the step's batches, and record a fatal error if any.

        Training then continues as without these batches.
        """
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        self._record.restore_batchnorm()
        self._restore_metrics()
        # So that an epoch with only skipped steps has a mean, over no examples.
        self.train_metrics["loss"].update(torch.zeros((), device=self.device), 0)
        # With a scaler, the scale may be the cause.
        scale_is_useless = self._scaler is None or lower_scale(self._scaler, optimizer)
        if scale_is_useless and self.nonfinite == "stop":
            where = f"step {self.trainer.global_step + 1} in epoch {self.current_epoch + 1}"
            self.fatal_error = self._record.describe(self.network, optimizer, where)

    def configure_callbacks(self) -> Any:
        """Check the Trainer's options and callbacks, in the first hook of all."""
        if self.trainer.state.fn == "fit":
            check_trainer(self)
            check_callbacks(self)
        return super().configure_callbacks()

    def on_fit_start(self) -> None:
        # A subclass that replaces configure_optimizers() has not been checked yet.
        check_complete(self, TwoPassModule)
        # An evaluation before training left inference tensors, which cannot be updated in training.
        for metric in self.val_metrics.values():
            metric.reset()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradient of the update.

        A gradient scaler has unscaled it by now.
        """
        if self.gradient_clip_val is not None:
            self.clip_gradients(optimizer, self.gradient_clip_val, self.gradient_clip_algorithm)

    def _step_scheduler(self, interval: Literal["epoch", "step", "gradient_evaluation"]) -> None:
        # Lightning's learning-rate finder replaces the scheduler and its interval for a while.
        for config in self.trainer.lr_scheduler_configs:
            if config.interval != interval:
                continue
            if isinstance(config.scheduler, ReduceLROnPlateau):
                self._reduce_on_plateau(config.scheduler)
            else:
                config.scheduler.step()

    def _reduce_on_plateau(self, scheduler: Any) -> None:
        logged, monitor = self.trainer.callback_metrics, scheduler.monitor
        if monitor in logged:
            scheduler.step(float(logged[monitor]))
        elif self.trainer.is_last_batch:  # max_steps may end training before the first validation
            raise ValueError(
                f"scheduler.monitor is {monitor}, which was not logged by the end of epoch {self.current_epoch + 1}:"
                f" give one of {', '.join(logged)}"
            )

    def on_train_epoch_start(self) -> None:
        """Use the batches of the first epoch in every epoch under overfit_batches.

        Lightning disables shuffling only in torch's DataLoader.
        """
        # Other loaders than torch's get the epoch number instead.
        sampler: Any = getattr(getattr(self.trainer.train_dataloader, "batch_sampler", None), "sampler", None)
        if vars(self.trainer)["overfit_batches"] > 0 and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(0)

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        self._move_optimizers("train")

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self._move_optimizers("eval")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        if self.fatal_error is not None:
            error, self.fatal_error = self.fatal_error, None
            raise FloatingPointError(error)
        # Not in on_train_epoch_end, because callbacks read the metrics there before this module's hook runs.
        if self.trainer.is_last_batch:
            self._log_epoch()
            # Callbacks and checkpoints at the epoch's end need the parameters to evaluate.
            self._move_optimizers("eval")

    def on_train_epoch_end(self) -> None:
        if not self.between_steps:  # training ended before the window was full
            self._window.clear()
            self._restore_metrics()
        self._log_epoch()
        self._step_scheduler("epoch")

    def on_train_end(self) -> None:
        """Fail if nothing was trained.

        Raises:
            RuntimeError: there were batches, but no optimizer step.
        """
        self._move_optimizers("eval")
        if self.trainer.global_step == 0 and self.trainer.fit_loop.total_batch_idx >= 0:
            why = "though there were batches: check training_step, max_time and accumulate_grad_batches"
            if self.skipped_steps:
                why = (
                    f"since all {self.skipped_steps} had a loss or gradient that is not finite: lower the learning rate"
                )
            raise RuntimeError(f"training ended without one optimizer step, {why}")

    def _log_epoch(self) -> None:
        skipped = {"skipped_steps": float(self.skipped_steps)} if self.skipped_steps else {}
        self._log_metrics("train", self.train_metrics, **skipped)
        if self._skipped_in_a_row >= MOST_SKIPPED:
            raise FloatingPointError(
                f"all of the last {self._skipped_in_a_row} steps up to the end of epoch {self.current_epoch + 1} were"
                " skipped, since a loss or gradient was not finite: lower the learning rate, clip the gradient"
                " (gradient_clip_val), or check the data"
            )

    def configure_optimizers(self) -> Any:
        """Build the groups, the optimizer and the scheduler.

        Raises:
            ValueError: the task module is incomplete, ``matrix`` or ``vector`` have an option that the optimizer lacks,
                the scheduler lacks its metric, or the checkpoint to resume is of another optimizer.
        """
        check_complete(self, TwoPassModule)
        check_callbacks(self)  # again, because a subclass may add some in configure_callbacks()
        optimizer: Any = build_optimizer(
            self.network, self.make_optimizer, self.policy, self.matrix, self.vector, self.splits
        )
        check_average(self, optimizer)
        self._record = StepRecord()  # the old record may be on another device
        self._has_exchanged = False
        sharded = self.device_mesh is not None
        if (sharded or isinstance(self.trainer.strategy, DDPStrategy)) and hasattr(optimizer, "distribute"):
            optimizer.distribute(None if sharded else torch.distributed.group.WORLD, self.gather)
        if self._resumed_optimizer not in (None, type(optimizer).__name__):
            raise ValueError(
                f"the checkpoint is of a run with {self._resumed_optimizer} and cannot be resumed with"
                f" {type(optimizer).__name__}: use the config of that run"
            )
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(optimizer)
        complete = self.scheduler_interval == "epoch" and hasattr(scheduler, "monitor")
        if isinstance(scheduler, ReduceLROnPlateau) and not complete:
            raise ValueError(
                "ReduceLROnPlateau needs a metric at the end of every epoch: use"
                " lightning.pytorch.cli.ReduceLROnPlateau with monitor, such as val/loss, and scheduler_interval epoch"
            )
        interval = {"scheduler": scheduler, "interval": self.scheduler_interval}
        return {"optimizer": optimizer, "lr_scheduler": interval}
