"""One training step for every optimizer: a gradient, a second one where the optimizer wants it, one update.

Knows nothing of any task and names no optimizer. Both passes see the same batches and the same random numbers;
BatchNorm statistics and the reported loss come from the first one alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeAlias

import lightning.pytorch as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torchmetrics import Metric

from ars2.param_groups import Policy, param_groups
from ars2.sharded import is_sharded, local
from modules.nonfinite import RunningStatistics, all_finite, describe, gradients_of, spoil
from modules.sharding import shard

# A stage's torchmetrics by log name: an nn.ModuleDict, whose values type checkers take for tensors.
Metrics: TypeAlias = Any
# Fifteen skipped steps below a scale of one: no scale makes these gradients finite.
SMALLEST_SCALE = 2.0**-15


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Normalise with batch statistics, as in training, and leave running statistics and their counters alone."""
    tracking = [m for m in module.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True


def random_state(device: torch.device) -> Callable[[], None]:
    """Remember the random state of the host and of ``device``; calling the result goes back to it."""
    host = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def go_back() -> None:
        torch.set_rng_state(host)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)

    return go_back


class MeanLoss(Metric):
    """Mean over examples that lets NaN through and reads nothing back from the device; torchmetrics' own does both."""

    total: Tensor
    examples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("examples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, examples: int, only_finite: bool = False) -> None:
        """Take in the mean ``loss`` of a number of ``examples``; ``only_finite`` leaves out one that is not."""
        count: int | Tensor = examples
        if only_finite:
            count, loss = examples * loss.isfinite(), loss.nan_to_num(0.0, 0.0, 0.0)
        self.total += loss * examples
        self.examples += count

    def compute(self) -> Tensor:
        """Return the mean over all examples so far."""
        return self.total / self.examples


def metric_state(metric: Metric, shared: bool) -> dict[str, Any]:
    """Return copies of what ``metric`` has gathered, over all processes if it is ``shared`` by several."""
    with metric.sync_context(should_sync=shared):
        values = {
            name: [v.detach().clone() for v in value] if isinstance(value, list) else value.detach().clone()
            for name, value in metric.metric_state.items()
        }
    return {"values": values, "updates": metric.update_count}


def load_metric_state(metric: Metric, state: dict[str, Any]) -> None:
    """Give ``metric`` what :func:`metric_state` returned of it."""
    for name, value in state["values"].items():
        moved = [v.to(metric.device) for v in value] if isinstance(value, list) else value.to(metric.device)
        setattr(metric, name, moved)
    metric._update_count, metric._computed = state["updates"], None


class TwoPassModule(L.LightningModule):
    """Base of the task modules: manual optimization, metrics by stage, schedulers, clipping and accumulation.

    A task module sets ``self.network``, calls :meth:`set_metrics`, and implements :meth:`compute_loss`. An optimizer
    that has the parts of a two-pass step (``wants_second_pass``, ``perturb``, ``restore``) is driven through them; any
    other gets one pass.

    Args:
        optimizer: takes parameter groups, returns the optimizer.
        scheduler: takes the optimizer, returns a learning-rate scheduler.
        scheduler_interval: whether the scheduler is stepped after every ``"epoch"`` or every ``"step"`` (update).
        policy: which parameters are matrices, see :func:`ars2.param_groups`; every optimizer gets these groups.
        matrix, vector: options for the groups of that track alone, such as ``{"weight_decay": 0.0}``.
        gradient_clip_val: limit on the gradient that updates; ``None`` does not clip.
        gradient_clip_algorithm: ``"norm"`` (global) or ``"value"`` (elementwise).
        accumulate_grad_batches: batches to an update, in both passes; the last window of an epoch may be shorter, its
            losses are divided by the same number (as Lightning does it).
        clip_first_pass: whether the first gradient of a step that looks twice is clipped too, to the same limit.
        nonfinite: what comes of a step whose loss or gradient is not finite, in either pass. It is never made; with
            ``"stop"`` the run ends with a sentence that names step, pass and parameter, with ``"skip"`` it goes on with
            the next batch. Under a gradient scaler such steps are part of finding the scale: they are skipped and the
            scale lowered, and ``"stop"`` ends the run only when the scale has become useless. Skipped steps are counted
            in ``train/skipped_steps``; they are no optimizer steps, and no scheduler counts them.
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
        self.gradient_evaluations = self.skipped_steps = 0
        # Why training cannot go on, from the step that found it until the batch's end, when it is raised.
        self.damage: str | None = None
        self._resumed_optimizer: str | None = None
        self._window: list[tuple[Any, Callable[[], None]]] = []
        self._losses: tuple[list[Tensor], list[Tensor]] = [], []  # of the window, by pass
        self._statistics: RunningStatistics | None = None

    def compute_loss(self, batch: Any, metrics: Metrics | None) -> Tensor:
        """Return the mean loss of ``batch``, a scalar; update ``metrics`` with what was seen, if there are any."""
        raise NotImplementedError

    def batch_size(self, batch: Any) -> int:
        """Return the number of examples, or other units, in ``batch``: the length of its first tensor."""
        return len(batch[0])

    def configure_model(self) -> None:
        """Shard the network over the processes where the strategy is to (ModelParallelStrategy).

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

    def set_metrics(self, metrics: Mapping[str, Metric]) -> None:
        """Take the task's metrics, by log name; every stage gets its own copies, and the mean loss with them."""

        def stage() -> nn.ModuleDict:
            return nn.ModuleDict({"loss": MeanLoss(), **{name: metric.clone() for name, metric in metrics.items()}})

        self.train_metrics: Metrics = stage()
        self.val_metrics: Metrics = stage()
        self.test_metrics: Metrics = stage()

    @property
    def between_steps(self) -> bool:
        """Whether no window of batches is open: only then does a checkpoint hold everything that training needs."""
        return not self._window

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
        if not self._window:
            optimizer.zero_grad()
            self._losses = [], []
            self._statistics = self._statistics or RunningStatistics(self.network)
            self._statistics.keep()
        self._window.append((batch, random_state(self.device) if two_pass else lambda: None))
        loss = self.compute_loss(batch, self.train_metrics)
        # A loss that is not finite is that of a step that is not made.
        self.train_metrics["loss"].update(loss.detach(), self.batch_size(batch), only_finite=True)
        self._losses[0].append(loss.detach())
        with self._first_pass(optimizer):
            self.manual_backward(loss * self._weight(batch) / self.accumulate_grad_batches)
        if len(self._window) < self.accumulate_grad_batches and not self.trainer.is_last_batch:
            return loss.detach()
        passes = 1
        scale = 1.0 if self._scaler is None or not two_pass else self._scaler.get_scale()
        if two_pass and self.clip_first_pass and self.gradient_clip_val is not None:
            self.clip_gradients(optimizer, self.gradient_clip_val * scale, self.gradient_clip_algorithm)
        # One rank's wish is everybody's: ranks that disagree would wait for each other forever.
        if two_pass and self.trainer.strategy.reduce_boolean_decision(optimizer.wants_second_pass(scale), all=False):
            self._second_pass(optimizer)
            passes = 2
        self._window.clear()
        self.gradient_evaluations += passes
        if self._is_finite(optimizer):
            wrapped.step()
            if self.scheduler_interval == "step":
                self._step_scheduler()
        else:
            self._leave_out(optimizer)
        return loss.detach()

    def _second_pass(self, optimizer: Any) -> None:
        after = random_state(self.device)
        optimizer.perturb()
        try:
            with frozen_statistics(self.network):
                for batch, replay in self._window:
                    replay()
                    loss = self.compute_loss(batch, None)
                    self._losses[1].append(loss.detach())
                    self.manual_backward(loss * self._weight(batch) / self.accumulate_grad_batches)
        finally:
            optimizer.restore()
            after()

    def _first_pass(self, optimizer: Any) -> AbstractContextManager[None]:
        """Keep the gradient of a first pass on its process, if it may stay there."""
        strategy = self.trainer.strategy
        if (
            self.local_first_pass
            and getattr(optimizer, "always_looks_twice", False)
            and isinstance(strategy, DDPStrategy)
        ):
            return strategy.block_backward_sync()
        return nullcontext()

    def _weight(self, batch: Any) -> Tensor | float:
        """Return what makes the mean over processes of their mean losses the mean over the whole batch.

        That is 1 where all have equally many examples, and always for one process.
        """
        if self.trainer.world_size == 1:
            return 1.0
        mine = torch.tensor(float(self.batch_size(batch)), device=self.device)
        mean = mine.clone()
        torch.distributed.all_reduce(mean)
        return mine * self.trainer.world_size / mean

    def _is_finite(self, optimizer: Any) -> bool:
        """Look, once a step and before anything is updated, at the losses and gradients of both passes."""
        first = self._first_gradients(optimizer).values()
        finite = all_finite([*self._losses[0], *self._losses[1]], [*first, *gradients_of(optimizer).values()])
        return not self.trainer.strategy.reduce_boolean_decision(not finite, all=False)

    def _first_gradients(self, optimizer: Any) -> dict[Tensor, Tensor]:
        # Without a second pass they may be those of an earlier step, which a scaler skipped.
        first: dict[Tensor, Tensor] = getattr(optimizer, "first_gradients", {}) if self._losses[1] else {}
        return {param: local(gradient) for param, gradient in first.items()}

    def _leave_out(self, optimizer: Any) -> None:
        """Go on as if the step's batches had not been, and say so where the run is to stop for it."""
        self.skipped_steps += 1
        if self._statistics is not None:
            self._statistics.go_back()
        hopeless = self._scaler is None
        gradients = gradients_of(optimizer)
        first = self._first_gradients(optimizer)
        passes = [("first", self._losses[0], first or gradients), ("second", self._losses[1], gradients)]
        where = f"step {self.trainer.global_step + 1} in epoch {self.current_epoch}"
        if self._scaler is not None and gradients:
            spoil(gradients)
            # Not through the optimizer's step: nobody is to take this for one.
            self._scaler.unscale_(optimizer)
            self._scaler.update()
            hopeless = self._scaler.get_scale() < SMALLEST_SCALE
        if hopeless and self.nonfinite == "stop":
            self.damage = describe(self.network, passes[: 1 + bool(first)], where)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradient that updates; by now a gradient scaler has unscaled it."""
        if self.gradient_clip_val is not None:
            self.clip_gradients(optimizer, self.gradient_clip_val, self.gradient_clip_algorithm)

    def _step_scheduler(self) -> None:
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
            scheduler.step()

    def on_train_epoch_start(self) -> None:
        """Train every epoch on the first one's batches where the trainer is to overfit a few (overfit_batches)."""
        # Lightning turns off shuffling in torch's DataLoader alone.
        sampler: Any = getattr(getattr(self.trainer.train_dataloader, "batch_sampler", None), "sampler", None)
        if vars(self.trainer)["overfit_batches"] > 0 and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(0)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        if self.damage is not None:
            damage, self.damage = self.damage, None
            raise FloatingPointError(damage)
        # Here, not at the epoch's end: callbacks read the epoch's metrics there, before this module's turn.
        if self.trainer.is_last_batch:
            self._log_metrics("train", self.train_metrics)

    def on_train_epoch_end(self) -> None:
        self._window.clear()
        self._log_metrics("train", self.train_metrics)
        if self.scheduler_interval == "epoch":
            self._step_scheduler()

    def validation_step(self, batch: Any, batch_index: int) -> None:
        self._evaluate(batch, self.val_metrics)

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val", self.val_metrics)

    def test_step(self, batch: Any, batch_index: int) -> None:
        self._evaluate(batch, self.test_metrics)

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test", self.test_metrics)

    def _evaluate(self, batch: Any, metrics: Metrics) -> None:
        loss = self.compute_loss(batch, metrics)
        metrics["loss"].update(loss, self.batch_size(batch))

    def _log_metrics(self, stage: str, metrics: Metrics) -> None:
        if not metrics["loss"].update_called:
            return
        values = {f"{stage}/{name}": metric.compute() for name, metric in metrics.items()}
        for metric in metrics.values():
            metric.reset()
        if stage == "train":
            if not torch.isfinite(values["train/loss"]):
                raise FloatingPointError(
                    f"the training loss is {values['train/loss'].item()} in epoch {self.current_epoch}: lower the"
                    " learning rate, clip the gradient (gradient_clip_val), or look at the data"
                )
            if self.skipped_steps:
                values["train/skipped_steps"] = torch.tensor(float(self.skipped_steps))
        self.log_dict(values, prog_bar=True, on_step=False, on_epoch=True, batch_size=1)

    def configure_optimizers(self) -> Any:
        """Build the groups, the optimizer and the scheduler.

        Raises:
            ValueError: ``matrix`` or ``vector`` name an option that the optimizer does not have, the scheduler needs a
                metric, or the checkpoint that the run goes on from was another optimizer's.
        """
        groups: Iterable[Any] = param_groups(self.network, self.policy, self.matrix, self.vector)
        optimizer = self.make_optimizer(groups)
        self._statistics = None  # of the device that the network was on before
        sharded = any(is_sharded(param) for param in self.network.parameters())
        if (sharded or isinstance(self.trainer.strategy, DDPStrategy)) and hasattr(optimizer, "distribute"):
            optimizer.distribute(None if sharded else torch.distributed.group.WORLD, self.gather)
        if self._resumed_optimizer not in (None, type(optimizer).__name__):
            raise ValueError(
                f"the checkpoint is of a run under {self._resumed_optimizer} and cannot go on under"
                f" {type(optimizer).__name__}: resume with the config of that run"
            )
        for track, options in (("matrix", self.matrix), ("vector", self.vector)):
            if unknown := set(options or {}) - set(optimizer.defaults):
                raise ValueError(
                    f"{track} names {sorted(unknown)}, which {type(optimizer).__name__} does not have: "
                    f"it knows {', '.join(sorted(optimizer.defaults))}"
                )
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(optimizer)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ValueError(
                "ReduceLROnPlateau needs a metric to watch, which is not supported: name another scheduler"
            )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": self.scheduler_interval},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["gradient_evaluations"] = self.gradient_evaluations
        checkpoint["skipped_steps"] = self.skipped_steps
        checkpoint["optimizer"] = type(self.trainer.optimizers[0]).__name__
        # What the epoch has shown so far: a run that goes on in the middle of it reports the whole of it.
        checkpoint["train_metrics"] = {
            name: metric_state(metric, self.trainer.world_size > 1) for name, metric in self._train_metrics()
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.gradient_evaluations = checkpoint["gradient_evaluations"]
        self.skipped_steps = checkpoint["skipped_steps"]
        self._resumed_optimizer = checkpoint["optimizer"]
        saved = checkpoint["train_metrics"]
        for name, metric in self._train_metrics():
            # Of several processes' sums one takes all: the others start from nothing.
            if name in saved and self.trainer.is_global_zero:
                load_metric_state(metric, saved[name])

    def _train_metrics(self) -> Iterator[tuple[str, Metric]]:
        return ((name, m) for name, m in self.train_metrics.named_modules() if isinstance(m, Metric))
