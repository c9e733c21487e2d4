"""One training step for every optimizer: a gradient, a second one where the optimizer wants it, one update.

Knows nothing of any task and names no optimizer. Both passes see the same batches and the same random numbers;
buffers (BatchNorm's statistics) and the reported loss come from the first one alone. What is measured is in
:mod:`modules.evaluation`, what must not be taken in in :mod:`modules.nonfinite`.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, Self

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DistributedSampler

from ars2.param_groups import Policy
from ars2.replay import random_state
from experiment.library_internals import is_attached, is_compiled
from modules.checks import check_callbacks, check_complete
from modules.evaluation import EvaluatedModule
from modules.metrics import snapshot
from modules.nonfinite import StepRecord, lower_scale
from modules.optimizer_setup import build_optimizer, build_scheduler
from modules.saved_arguments import arguments_of, check_same_network, is_plain
from modules.sharding import shard

# An epoch that ends with so many steps left out in a row ends the run: nothing is learnt any more.
MOST_SKIPPED = 100


class TwoPassModule(EvaluatedModule):
    """Base of the task modules: manual optimization, schedulers, clipping and accumulation.

    A task module sets ``self.network``, calls :meth:`set_metrics`, and implements :meth:`compute_loss`. An optimizer
    that has the parts of a two-pass step (``wants_second_pass``, ``perturb``, ``restore``) is driven through them; any
    other gets one pass. Where it also has ``never_two_pass``, ``always_two_pass`` or ``decides_alike``, see
    :class:`ars2.two_pass.TwoPassOptimizer`, batches are not kept, and processes need not vote on second passes.

    Args:
        optimizer: takes parameter groups, returns the optimizer; ``None``, which ``load_from_checkpoint()`` gives if it
            is given none, makes a module that can be evaluated and not trained.
        scheduler: takes the optimizer, returns a learning-rate scheduler.
        scheduler_interval: whether the scheduler is stepped after every ``"epoch"`` or every ``"step"`` (update).
        policy: which parameters are matrices, see :func:`ars2.param_groups`; every optimizer gets these groups.
        matrix, vector: options for the groups of that track alone, such as ``{"weight_decay": 0.0}``.
        gradient_clip_val: limit on the gradient that updates; ``None`` does not clip.
        gradient_clip_algorithm: ``"norm"`` (global) or ``"value"`` (elementwise).
        accumulate_grad_batches: batches to an update, in both passes; the last window of an epoch may be shorter, its
            losses are divided by the same number (as Lightning does it). Several processes exchange gradients once a
            window and pass; until then each has a whole gradient, also of a sharded network.
        clip_first_pass: whether the first gradient of a step that looks twice is clipped too, to the same limit.
        nonfinite: what comes of a step whose loss or gradient is not finite, in either pass. It is never made; with
            ``"stop"`` the run ends with a sentence that names step, pass and parameter, with ``"skip"`` it goes on with
            the next batch. Under a gradient scaler such steps are part of finding the scale: they are skipped and the
            scale lowered, and ``"stop"`` ends the run only when the scale has become useless. Skipped steps are counted
            in ``train/skipped_steps``; they are no optimizer steps, no scheduler counts them, and no metric of the
            epoch has their batches. An epoch of nothing else is logged as NaN; one that ends with 100 of them in a row
            ends the run.
        local_first_pass: over several processes, whether each takes its adversarial point from its own part of the
            batch where every step looks twice (m-sharpness, Foret et al. 2021): one all-reduce of the gradient fewer.
        gather: over several processes, whether orthogonal directions are exchanged ``"exact"`` or in ``"bfloat16"``,
            see :meth:`ars2.tracked.TrackedOptimizer.distribute`.

    Raises:
        ValueError: ``accumulate_grad_batches`` below 1 or ``gradient_clip_val`` not above 0.
    """

    network: nn.Module
    # Methods beside compute_loss() that use the network's parameters: a sharded network is gathered for them.
    uses_parameters: tuple[str, ...] = ("predict_step",)
    unit = "examples"  # what batch_size() counts, and losses are means over

    def __init__(
        self,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: Literal["epoch", "step"] = "epoch",
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
    ) -> None:
        super().__init__()
        self._arguments = arguments_of(self, inspect.currentframe())
        if gather not in ("exact", "bfloat16"):
            raise ValueError(f"gather must be 'exact' or 'bfloat16', got {gather!r}")
        if nonfinite not in ("stop", "skip"):
            raise ValueError(f"nonfinite must be 'stop' or 'skip', got {nonfinite!r}")
        if accumulate_grad_batches < 1:
            raise ValueError(f"accumulate_grad_batches must be at least 1, got {accumulate_grad_batches}")
        if gradient_clip_val is not None and gradient_clip_val <= 0:
            raise ValueError(f"gradient_clip_val must be above 0, or null for no clipping, got {gradient_clip_val}")
        self.automatic_optimization = False
        self.make_optimizer, self.make_scheduler, self.scheduler_interval = optimizer, scheduler, scheduler_interval
        self.policy, self.matrix, self.vector = policy, matrix, vector
        self.gradient_clip_val, self.gradient_clip_algorithm = gradient_clip_val, gradient_clip_algorithm
        self.accumulate_grad_batches = accumulate_grad_batches
        self.clip_first_pass, self.nonfinite = clip_first_pass, nonfinite
        self.local_first_pass, self.gather = local_first_pass, gather
        self.gradient_evaluations = self.skipped_steps = self._skipped_in_a_row = 0
        # Why training cannot go on, from the step that found it until the batch's end, when it is raised.
        self.fatal_error: str | None = None
        # Whether this process is to stop, and whether any was at the last update; None where there is no other.
        self.stop_asked = False
        self.stop_agreed: bool | None = None
        self._resumed_optimizer: str | None = None
        # Of the window so far, and what a second pass needs of them.
        self._batches_so_far = 0
        self._window: list[tuple[Any, Tensor | float, Callable[[], None]]] = []
        self._record = StepRecord()
        self._is_second_pass = False
        self._restore_metrics: Callable[[], None] = lambda: None
        self._has_exchanged = False
        self._is_elsewhere = False  # where its optimizer trains and is not to be evaluated

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **arguments: Any) -> Self:
        """Return the module of a checkpoint, which evaluates and predicts without a Trainer, as Lightning does.

        Args:
            checkpoint_path: of the file.
            args: as Lightning's.
            arguments: as Lightning's, and those of the module, before the ones in the file.

        Raises:
            ValueError: the file does not hold what the module is made with, or another network.
        """
        try:
            return super().load_from_checkpoint(checkpoint_path, *args, **arguments)
        except TypeError as error:
            if "__init__() missing" not in str(error):
                raise
            missing = str(error).rpartition(": ")[2]
            raise ValueError(
                f"{checkpoint_path} does not hold what {cls.__name__} needs ({missing}): give load_from_checkpoint()"
                " these arguments too; of a checkpoint older than those that hold any, give optimizer=None and the"
                " arguments of the network in the run's config.yaml, such as width=8"
            ) from error

    def configure_model(self) -> None:
        """Shard the network over the processes where that is the strategy's (ModelParallelStrategy).

        Raises:
            ValueError: a network or a choice of options that cannot be sharded.
        """
        if self.device_mesh is None:
            return
        if self.local_first_pass:
            raise ValueError(
                "local_first_pass needs whole gradients on every process, which a sharded network has not: use"
                " strategy ddp, or set local_first_pass to false"
            )
        # The module, not the network: a loss may use parts of the network in its own way.
        shard(self, ("compute_loss", *self.uses_parameters), self.device_mesh)

    @staticmethod
    def compile_once(network: nn.Module) -> None:
        """Compile ``network`` in place, unless it is; a wrapper would change the names of the parameters."""
        if not is_compiled(network):
            network.compile()

    @property
    def between_steps(self) -> bool:
        """Whether no window of batches is open: only then does a checkpoint hold everything that training needs."""
        return self._batches_so_far == 0

    def _close_window(self) -> None:
        self._window.clear()
        self._batches_so_far = 0

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        scaler: torch.amp.GradScaler | None = getattr(self.trainer.precision_plugin, "scaler", None)
        return scaler

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """Make the passes of one batch and, when its window is full, the update; returns the first pass's loss."""
        wrapped: Any = self.optimizers()
        # The wrapper's class inherits from the optimizer's: only step() may be called on it.
        optimizer = wrapped.optimizer
        two_pass = hasattr(optimizer, "wants_second_pass")
        if self.between_steps:
            optimizer.zero_grad()
            self._record.begin(self.network)
            self._restore_metrics = snapshot(metric for _, metric in self._train_metrics())
        weight = self._weight(batch)
        self._batches_so_far += 1
        if two_pass and not getattr(optimizer, "never_two_pass", False):
            self._window.append((batch, weight, random_state(self.device)))
        is_last = self._batches_so_far == self.accumulate_grad_batches or self.trainer.is_last_batch
        loss = self.checked_loss(batch, self.train_metrics)
        self.train_metrics["loss"].update(loss.detach(), self.batch_size(batch))
        self._record.losses[0].append(loss.detach())
        local = self.local_first_pass and getattr(optimizer, "always_two_pass", False)
        self._backward(loss * weight, sync=is_last and not local)
        if not is_last:
            return loss.detach()
        passes = 1
        scale = 1.0 if self._scaler is None or not two_pass else self._scaler.get_scale()
        if two_pass and self.clip_first_pass and self.gradient_clip_val is not None:
            self.clip_gradients(optimizer, self.gradient_clip_val * scale, self.gradient_clip_algorithm)
        if two_pass and self._wants_second_pass(optimizer, scale):
            self._second_pass(optimizer)
            passes = 2
        self._close_window()
        self.gradient_evaluations += passes
        if self._agree(self._record.is_finite(optimizer)):
            wrapped.step()
            self._skipped_in_a_row = 0
            if self.scheduler_interval == "step":
                self._step_scheduler()
        else:
            self._skip_step(optimizer)
        return loss.detach()

    def log(self, *args: Any, **options: Any) -> None:
        """Log as Lightning does, but nothing that a second pass says: values are the first one's."""
        if not self._is_second_pass:
            super().log(*args, **options)

    def _second_pass(self, optimizer: Any) -> None:
        after = random_state(self.device)
        optimizer.perturb()
        self._is_second_pass = True
        try:
            with self._record.frozen_statistics(self.network):
                for number, (batch, weight, replay) in enumerate(self._window, start=1):
                    replay()
                    loss = self.compute_loss(batch, None)
                    self._record.losses[1].append(loss.detach())
                    self._backward(loss * weight, sync=number == len(self._window))
        finally:
            self._is_second_pass = False
            optimizer.restore()
            after()

    def _backward(self, loss: Tensor, sync: bool) -> None:
        """Add the gradient of one batch of a window; only if ``sync``, exchange that of the window so far."""
        strategy: Any = self.trainer.strategy
        if self.device_mesh is not None:
            module: Any = self  # an FSDPModule by now
            module.set_requires_gradient_sync(sync)
        blocked = not sync and isinstance(strategy, DDPStrategy)
        # DDP learns a static graph in its first backward pass, which fails without the exchange.
        blocked = blocked and (self._has_exchanged or not strategy.model.static_graph)
        self._has_exchanged = True
        with strategy.block_backward_sync() if blocked else nullcontext():
            self.manual_backward(loss / self.accumulate_grad_batches)

    def _wants_second_pass(self, optimizer: Any, scale: float) -> bool:
        wanted: bool = optimizer.wants_second_pass(scale)
        if getattr(optimizer, "decides_alike", False):
            return wanted
        # One rank's wish is everybody's: ranks that disagree would wait for each other forever.
        return self.trainer.strategy.reduce_boolean_decision(wanted, all=False)

    def _agree(self, finite: Tensor) -> bool:
        """Return whether the step is finite on all processes; they also learn whether any was asked to stop.

        One reduction, and one reading of the device.
        """
        if self.trainer.world_size == 1:
            return bool(finite)
        # Filled on the device: a tensor made from a Python number is sent there, and waited for.
        flags = torch.full((2,), float(self.stop_asked), device=finite.device)
        flags[0] = ~finite
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        spoiled, stop = flags.tolist()
        self.stop_agreed = bool(stop)
        return not spoiled

    def _weight(self, batch: Any) -> Tensor | float:
        """Return what makes the mean over processes of their mean losses the mean over the whole batch.

        That is 1 where all have equally many examples, and always for one process. The processes ask each other only
        where their loader does not say it.
        """
        if self.trainer.world_size == 1:
            return 1.0
        loader: Any = self.trainer.train_dataloader
        if self.same_units or type(self).batch_size is EvaluatedModule.batch_size:
            if isinstance(getattr(loader, "sampler", None), DistributedSampler):
                return 1.0  # it fills up the last share
            if hasattr(loader, "share_weight"):
                return float(loader.share_weight)
        mine = torch.full((), float(self.batch_size(batch)), device=self.device)
        mean = mine.clone()
        torch.distributed.all_reduce(mean)
        return mine * self.trainer.world_size / mean

    def _skip_step(self, optimizer: Any) -> None:
        """Go on as if the step's batches had not been, and say so where the run is to stop for it."""
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        self._record.restore_batchnorm()
        self._restore_metrics()
        # An epoch that had nothing else has a mean all the same, over no examples.
        self.train_metrics["loss"].update(torch.zeros((), device=self.device), 0)
        # Under a scaler the scale may be what is wrong.
        hopeless = self._scaler is None or lower_scale(self._scaler, optimizer)
        if hopeless and self.nonfinite == "stop":
            where = f"step {self.trainer.global_step + 1} in epoch {self.current_epoch + 1}"
            self.fatal_error = self._record.describe(self.network, optimizer, where)

    def on_fit_start(self) -> None:
        # Where it replaces configure_optimizers(), nothing has looked before.
        check_complete(self, TwoPassModule)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradient that updates; by now a gradient scaler has unscaled it."""
        if self.gradient_clip_val is not None:
            self.clip_gradients(optimizer, self.gradient_clip_val, self.gradient_clip_algorithm)

    def _step_scheduler(self) -> None:
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, LRScheduler):
            scheduler.step()

    def on_train_epoch_start(self) -> None:
        """Train every epoch on the first one's batches where the trainer is to overfit a few (overfit_batches)."""
        # Lightning turns off shuffling in torch's DataLoader alone.
        sampler: Any = getattr(getattr(self.trainer.train_dataloader, "batch_sampler", None), "sampler", None)
        if vars(self.trainer)["overfit_batches"] > 0 and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(0)

    def _move_optimizers(self, to: Literal["train", "eval"]) -> None:
        """Let optimizers that train at other parameters than they are evaluated at go over to one of these.

        Those without a schedule (Defazio et al. 2024) have methods ``train()`` and ``eval()`` for it.
        """
        for optimizer in self.trainer.optimizers:
            if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
                getattr(optimizer, to)()
                self._is_elsewhere = to == "train"

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        self._move_optimizers("train")

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self._move_optimizers("eval")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        if self.fatal_error is not None:
            error, self.fatal_error = self.fatal_error, None
            raise FloatingPointError(error)
        # Here, not at the epoch's end: callbacks read the epoch's metrics there, before this module's turn.
        if self.trainer.is_last_batch:
            self._log_epoch()
            # What looks at the epoch's end, and the checkpoints of it, find what is evaluated.
            self._move_optimizers("eval")

    def on_train_epoch_end(self) -> None:
        if not self.between_steps:  # training ended before the window was full
            self._close_window()
            self._restore_metrics()
        self._log_epoch()
        if self.scheduler_interval == "epoch":
            self._step_scheduler()

    def on_train_end(self) -> None:
        """Refuse to end well where nothing was trained.

        Raises:
            RuntimeError: there were batches, and no optimizer step.
        """
        self._move_optimizers("eval")
        if self.trainer.global_step == 0 and self.trainer.fit_loop.total_batch_idx >= 0:
            why = "though there were batches: look at training_step, max_time and accumulate_grad_batches"
            if self.skipped_steps:
                why = f"since all {self.skipped_steps} had a loss or gradient that is not finite"
            raise RuntimeError(f"training ended without one optimizer step, {why}")

    def _log_epoch(self) -> None:
        skipped = {"skipped_steps": float(self.skipped_steps)} if self.skipped_steps else {}
        self._log_metrics("train", self.train_metrics, **skipped)
        if self._skipped_in_a_row >= MOST_SKIPPED:
            raise FloatingPointError(
                f"none of the last {self._skipped_in_a_row} steps was made, up to the end of epoch"
                f" {self.current_epoch + 1}, since every loss or gradient was not finite: lower the learning rate, clip"
                " the gradient (gradient_clip_val), or look at the data"
            )

    def configure_optimizers(self) -> Any:
        """Build the groups, the optimizer and the scheduler.

        Raises:
            ValueError: something that a task module must have is missing, ``matrix`` or ``vector`` name an option that
                the optimizer does not have, the scheduler needs a metric, or the checkpoint that the run goes on from
                was another optimizer's.
        """
        check_complete(self, TwoPassModule)
        check_callbacks(self)
        optimizer: Any = build_optimizer(self.network, self.make_optimizer, self.policy, self.matrix, self.vector)
        self._record = StepRecord()  # the old one is of the device that the network was on before
        self._has_exchanged = False
        sharded = self.device_mesh is not None
        if (sharded or isinstance(self.trainer.strategy, DDPStrategy)) and hasattr(optimizer, "distribute"):
            optimizer.distribute(None if sharded else torch.distributed.group.WORLD, self.gather)
        if self._resumed_optimizer not in (None, type(optimizer).__name__):
            raise ValueError(
                f"the checkpoint is of a run under {self._resumed_optimizer} and cannot go on under"
                f" {type(optimizer).__name__}: resume with the config of that run"
            )
        if self.make_scheduler is None:
            return optimizer
        scheduler = build_scheduler(optimizer, self.make_scheduler)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": self.scheduler_interval},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        # A subclass may have saved hyperparameters of its own.
        saved = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        if "_instantiator" not in saved:
            saved = {name: value for name, value in saved.items() if is_plain(value)}
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = {**saved, **self._arguments}
        if self._is_elsewhere and self.device_mesh is None:
            self._save_both(checkpoint)
        checkpoint["gradient_evaluations"] = self.gradient_evaluations
        checkpoint["skipped_steps"] = self.skipped_steps
        checkpoint["optimizer"] = type(self.trainer.optimizers[0]).__name__

    @torch.no_grad()
    def _save_both(self, checkpoint: dict[str, Any]) -> None:
        """Let a checkpoint hold the parameters to evaluate, and beside them those to train on from, to the bit."""
        training = {name: param.clone() for name, param in self.named_parameters()}
        self._move_optimizers("eval")
        checkpoint["state_dict"] |= {name: param.clone() for name, param in self.named_parameters()}
        self._move_optimizers("train")
        for name, param in self.named_parameters():
            param.copy_(training[name])  # there and back rounds
        checkpoint["training_parameters"] = training

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from the counts of a run; ``load_from_checkpoint()``, without a Trainer, takes the weights alone.

        Raises:
            ValueError: without a Trainer, if the module's network is another one.
        """
        if not is_attached(self):
            check_same_network(self, checkpoint["state_dict"])
            return
        super().on_load_checkpoint(checkpoint)
        # A checkpoint in parts, one a process, has neither here.
        if self.trainer.state.fn == "fit" and "training_parameters" in checkpoint:
            checkpoint["state_dict"].update(checkpoint["training_parameters"])
        self.gradient_evaluations = checkpoint["gradient_evaluations"]
        self.skipped_steps = checkpoint["skipped_steps"]
        self._resumed_optimizer = checkpoint["optimizer"]
