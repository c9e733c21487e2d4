"""Log the costs of a run, so that its curves can be drawn over any of them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
import torch
from torch.optim import Optimizer

from callbacks.module_protocol import trained
from experiment.distributed import gather_per_rank, local_share

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

_KEPT = ("examples", "training_seconds", "flops", "flops_per_example", "flops_per_update")


class CostCounters(L.Callback):
    """Log the costs so far in every row that an epoch's end or a validation writes.

    - ``cost/optimizer_steps``;
    - ``cost/gradient_evaluations``: a two-pass step makes two;
    - ``cost/examples``, or ``cost/tokens`` where that is the module's ``unit``: those that all processes trained on. A
      second pass over the same batch adds none;
    - ``cost/training_seconds``: includes waiting for data, excludes evaluation and saving checkpoints;
    - ``cost/flops``.

    A resumed run continues the counts. Values are logged in double precision, which is exact for counts up to 2**53.

    Floating-point operations are those of matrix products, convolutions and attention, as torch counts them. The first
    update of training is measured. It gives the operations of one gradient evaluation per example and, apart from
    these, the operations of the optimizer, which are assumed to be equal in every update. A compiled network or
    optimizer runs uncompiled in that update. With several processes, each is assumed to spend as many operations in the
    optimizer as rank zero did in the first update.
    """

    changes_training = False

    def __init__(self) -> None:
        self.examples = 0
        self.training_seconds = 0.0
        self.flops = 0.0
        self.flops_per_example: float | None = None
        self.flops_per_update = 0.0
        self._mark: float | None = None
        self._watch: FlopCounterMode | None = None
        self._eagerly: AbstractContextManager[None] = nullcontext()
        self._products, self._optimizer_from = 0.0, 0.0
        self._window, self._evaluations = 0, 0
        # The counts of this rank, from a checkpoint of equally many processes.
        self._share: dict[str, Any] | None = None

    def costs(self, trainer: L.Trainer, pl_module: Any) -> dict[str, float]:
        """Return the current costs by log key."""
        self._count()
        module = trained(trainer, pl_module)
        return {
            "cost/optimizer_steps": float(trainer.global_step),
            "cost/gradient_evaluations": float(module.gradient_evaluations),
            f"cost/{module.unit}": float(self.examples),
            "cost/training_seconds": self.training_seconds,
            "cost/flops": float(self.flops),
        }

    def _count(self) -> None:
        """Add the time since the last mark, if the clock is running."""
        if self._mark is not None:
            now = perf_counter()
            self.training_seconds += now - self._mark
            self._mark = now

    def _pause(self, pl_module: L.LightningModule) -> None:
        if self._mark is not None and pl_module.device.type == "cuda":
            # Kernels that training has queued belong to training.
            torch.cuda.synchronize(pl_module.device)
        self._count()
        self._mark = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        module = trained(trainer, pl_module)
        self._evaluations = module.gradient_evaluations

    @contextmanager
    def paused(self, pl_module: L.LightningModule) -> Iterator[None]:
        """Exclude a block from the training seconds.

        The clock runs again after the block only if it ran before it.
        """
        running = self._mark is not None
        self._pause(pl_module)
        try:
            yield
        finally:
            self._mark = perf_counter() if running else None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._mark = perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        module = trained(trainer, pl_module)
        examples = module.batch_size(batch) * trainer.world_size
        self.examples += examples
        self._window += examples
        self._count()
        # The clock stands still after a checkpoint, and where a run resumes within an epoch.
        self._mark = self._mark or perf_counter()
        if self.flops_per_example is None:
            from torch.utils.flop_counter import FlopCounterMode

            # Compiled functions refuse to run under the counter, which could not see their operations.
            self._eagerly = torch.compiler.set_stance("force_eager")
            self._eagerly.__enter__()
            self._watch = FlopCounterMode(display=False)
            self._watch.__enter__()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if self._watch is not None:
            self._optimizer_from = self._products + self._watch.get_total_flops()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self._stop_watching()
        module = trained(trainer, pl_module)
        passes = module.gradient_evaluations - self._evaluations
        if passes > 0:  # This batch completed a window and its update.
            if self.flops_per_example is None:
                self.flops_per_example = self._optimizer_from * trainer.world_size / (passes * self._window)
                self.flops_per_update = (self._products - self._optimizer_from) * trainer.world_size
            self.flops += self.flops_per_example * passes * self._window + self.flops_per_update
            self._evaluations += passes
            self._window = 0
        self._count()

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._products += self._watch.get_total_flops()
            self._watch.__exit__(None, None, None)
            self._eagerly.__exit__(None, None, None)
            self._watch = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop_watching()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pause(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._log(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pause(pl_module)
        self._log(trainer, pl_module)

    def _log(self, trainer: L.Trainer, pl_module: Any) -> None:
        shared = trainer.world_size > 1
        # Only the mean over processes needs the values on a device. Not every device has doubles.
        device = pl_module.device if shared else torch.device("cpu")
        for name, value in self.costs(trainer, pl_module).items():
            pl_module.log(name, torch.tensor(value, dtype=torch.float64, device=device), batch_size=1, sync_dist=shared)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._pause(pl_module)
        if trainer.world_size > 1:
            # The ranks differ in their examples and in the optimizer's operations.
            checkpoint["costs"] = gather_per_rank(trainer, self.state_dict())

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._share = local_share(trainer, checkpoint.get("costs", []))

    def state_dict(self) -> dict[str, Any]:
        self._count()
        return {name: getattr(self, name) for name in _KEPT}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in _KEPT:
            setattr(self, name, (self._share or state_dict)[name])
