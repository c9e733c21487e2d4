"""What a run has spent, as columns of its log: every curve can then be drawn over any of them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
import torch
from torch.optim import Optimizer

from experiment.distributed import gather_per_rank, local_share

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

_KEPT = ("examples", "training_seconds", "flops", "flops_per_example", "flops_per_update")


class CostCounters(L.Callback):
    """Logs the costs so far with every row that an epoch's end or a validation writes.

    ``cost/optimizer_steps``; ``cost/gradient_evaluations`` (a step that looks twice makes two);
    ``cost/examples``, or ``cost/tokens`` where the module counts those (its ``unit``; handed to training, over all
    processes; a second look at the same batch adds none); ``cost/training_seconds`` (waiting for data included;
    evaluation, and saving checkpoints, excluded); and ``cost/flops``. All go on where they were when a run is resumed.
    Numbers are logged in double precision, where counts are exact up to 2**53.

    Floating-point operations are those of matrix products, convolutions and attention, as torch counts them: the
    training's first update is watched while it is made, and gives the operations per example of a gradient evaluation
    and, apart, those of the optimizer's own products, taken to be the same in every update. What is compiled, network
    or optimizer, is not until after that update. Over several processes the optimizer's are counted as if each made
    those that the first one made.
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
        self._share: dict[str, Any] | None = None  # of a checkpoint of as many processes

    def costs(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        """Return the costs by log key, as they are now."""
        self._count()
        return {
            "cost/optimizer_steps": float(trainer.global_step),
            "cost/gradient_evaluations": float(pl_module.gradient_evaluations),  # type: ignore[arg-type]
            f"cost/{getattr(pl_module, 'unit', 'examples')}": float(self.examples),
            "cost/training_seconds": self.training_seconds,
            "cost/flops": float(self.flops),
        }

    def _count(self) -> None:
        """Add the time since the last mark, if the clock runs."""
        if self._mark is not None:
            now = perf_counter()
            self.training_seconds += now - self._mark
            self._mark = now

    def _pause(self, pl_module: L.LightningModule) -> None:
        if self._mark is not None and pl_module.device.type == "cuda":
            # Work that was queued for training would otherwise be waited for by what follows.
            torch.cuda.synchronize(pl_module.device)
        self._count()
        self._mark = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._evaluations = int(pl_module.gradient_evaluations)  # type: ignore[arg-type]

    @contextmanager
    def paused(self, pl_module: L.LightningModule) -> Iterator[None]:
        """A block whose time is not training's, wherever it stands; if the clock ran before it, it runs on after it."""
        running = self._mark is not None
        self._pause(pl_module)
        try:
            yield
        finally:
            self._mark = perf_counter() if running else None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._mark = perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        examples = pl_module.batch_size(batch) * trainer.world_size  # type: ignore[operator]
        self.examples += examples
        self._window += examples
        self._count()
        # A checkpoint paused the clock, or a run resumed within an epoch has not started it.
        self._mark = self._mark or perf_counter()
        if self.flops_per_example is None:
            from torch.utils.flop_counter import FlopCounterMode

            # A compiled function would show the mode none of its operations, and refuses to run under it.
            self._eagerly = torch.compiler.set_stance("force_eager")
            self._eagerly.__enter__()
            self._watch = FlopCounterMode(display=False)
            self._watch.__enter__()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if self._watch is not None:
            self._optimizer_from = self._products + self._watch.get_total_flops()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._stop_watching()
        passes = int(pl_module.gradient_evaluations) - self._evaluations  # type: ignore[arg-type]
        if passes > 0:  # the window of batches was full, and the update was made
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

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        shared = trainer.world_size > 1
        # Only a mean over processes needs the values on their device, which may not know doubles.
        device = pl_module.device if shared else torch.device("cpu")
        for name, value in self.costs(trainer, pl_module).items():
            pl_module.log(name, torch.tensor(value, dtype=torch.float64, device=device), batch_size=1, sync_dist=shared)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._pause(pl_module)
        if trainer.world_size > 1:
            # Each process has counted its share of the examples and of the optimizer's products.
            checkpoint["costs"] = gather_per_rank(trainer, self.state_dict())

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._share = local_share(trainer, checkpoint.get("costs", []))

    def state_dict(self) -> dict[str, Any]:
        self._count()
        return {name: getattr(self, name) for name in _KEPT}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in _KEPT:
            setattr(self, name, (self._share or state_dict)[name])
