"""Train an ordinary LightningModule with second passes.

    trainer = L.Trainer(callbacks=[TwoPass()])

The module keeps automatic optimization, its ``training_step`` and its ``configure_optimizers``.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ars2.base import TrackedOptimizer
from ars2.replay import Buffers, random_state, second_pass

try:
    import lightning.pytorch as L
    from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ParallelStrategy
    from lightning_utilities.core.apply_func import apply_to_collection
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError("ars2.lightning needs Lightning: pip install 'ars2[lightning]'") from error


class Call(NamedTuple):
    """Keep what repeats a call of ``training_step``.

    ``versions`` has each tensor of the batch with its version counter, which changes when the tensor is written to.
    """

    arguments: tuple[Any, ...]
    versions: list[tuple[Tensor, int]]
    replay: Callable[[], None]


class TwoPass(L.Callback):
    """Make the second passes of an optimizer such as :class:`ars2.ARS2Neo`.

    The second pass calls ``training_step`` again with the same batches and random numbers (dropout). Logged values,
    metrics and buffers, such as BatchNorm's running statistics, are those of the first pass. The Trainer's options of
    clipping, accumulation, precision and strategy apply as without the callback; clipping limits the gradient of the
    update. ``trainer.global_step`` counts one step. Anything else that ``training_step`` changes, such as a list of
    outputs, changes in both passes.

    An optimizer without second passes trains as without the callback. Under DDP the processes share the Newton-Schulz
    iterations, see :meth:`ars2.base.TrackedOptimizer.distribute`.

    Attributes:
        gradient_evaluations: the passes so far. Accumulated batches count as one. Checkpoints contain it.
        between_steps: whether the batches so far have been used in an update.

    Raises:
        ValueError: at the start of training, if the module or the strategy does not allow second passes.
        RuntimeError: ``training_step`` changed its batch in place, or returned no loss in the second pass.
    """

    def __init__(self) -> None:
        self.gradient_evaluations = 0
        self.between_steps = True
        self._window: list[Call] = []  # of the open step
        self._has_loss = self._has_gradient = False  # of the last call of training_step
        self._attached = ExitStack()

    def state_dict(self) -> dict[str, Any]:
        return {"gradient_evaluations": self.gradient_evaluations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.gradient_evaluations = state_dict["gradient_evaluations"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _check(trainer, pl_module)
        optimizer: Any = trainer.optimizers[0]
        is_ddp = isinstance(trainer.strategy, DDPStrategy)
        if is_ddp and isinstance(optimizer, TrackedOptimizer) and not optimizer.is_distributed:
            optimizer.distribute(torch.distributed.group.WORLD)
        self._buffers = Buffers(pl_module)
        # Only the training loop calls these methods. The module's may be called elsewhere, as in validation_step().
        step = trainer.strategy.training_step
        replaced = {
            "training_step": self._recorded(step, pl_module, optimizer),
            "optimizer_step": self._with_second_pass(step, trainer, optimizer),
        }
        for name, function in replaced.items():
            self._attached.enter_context(_replaced(trainer.strategy, name, function))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._window.clear()  # training may have ended within a window
        self.between_steps = True

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._has_gradient = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._attached.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._attached.close()

    def _recorded(
        self, training_step: Callable[..., Any], pl_module: L.LightningModule, optimizer: Any
    ) -> Callable[..., Any]:
        """Return a ``training_step`` that keeps its calls for a second pass."""

        def recorded(*arguments: Any) -> Any:
            self.between_steps = self._has_gradient = False
            if not _may_want_second_pass(optimizer):
                return training_step(*arguments)
            versions: list[tuple[Tensor, int]] = []

            def noted(tensor: Tensor) -> Tensor:
                versions.append((tensor, tensor._version))
                return tensor

            # In new containers, because a training step may take items out of a dictionary.
            copied = tuple(apply_to_collection(part, Tensor, noted, allow_frozen=True) for part in arguments)
            call = Call(copied, versions, random_state(pl_module.device))
            output = training_step(*arguments)
            self._has_loss = output is not None  # with None Lightning skips the batch
            if self._has_loss:
                self._window.append(call)
            return output

        return recorded

    def _with_second_pass(
        self, training_step: Callable[..., Any], trainer: L.Trainer, optimizer: Any
    ) -> Callable[..., Any]:
        """Return an ``optimizer_step`` whose closure makes both passes."""
        optimizer_step = trainer.strategy.optimizer_step

        def with_second_pass(optimizer_: Any, closure: Callable[[], Any], *arguments: Any, **options: Any) -> Any:
            def both_passes() -> Any:
                result = closure()
                if self._window and self._has_loss and not self._has_gradient:
                    raise RuntimeError(
                        "training_step() was called without a backward pass, as StochasticWeightAveraging does for the"
                        " statistics of BatchNorm: use WeightAveraging, which averages them"
                    )
                self.gradient_evaluations += 1
                if self._window and _wants_second_pass(optimizer, trainer):
                    self.gradient_evaluations += 1
                    self._second_pass(training_step, trainer, optimizer)
                self._window.clear()
                self.between_steps = True
                return result

            return optimizer_step(optimizer_, both_passes, *arguments, **options)

        return with_second_pass

    def _second_pass(self, training_step: Callable[..., Any], trainer: L.Trainer, optimizer: Any) -> None:
        strategy: Any = trainer.strategy
        module = trainer.lightning_module
        with second_pass(optimizer, self._buffers.unchanged(), [module.device]), silent(module):
            for number, call in enumerate(self._window, start=1):
                if any(tensor._version != version for tensor, version in call.versions):
                    raise RuntimeError(
                        f"{type(module).__name__}.training_step() changed a tensor of its batch in place, so that a"
                        " second pass would not repeat the first: use the out-of-place operation, such as"
                        " x = x.div(255) for x.div_(255)"
                    )
                blocked = number < len(self._window) and isinstance(strategy, ParallelStrategy)
                with strategy.block_backward_sync() if blocked else nullcontext():
                    call.replay()
                    loss = loss_of(training_step(*call.arguments), module)
                    strategy.backward(loss / trainer.accumulate_grad_batches, optimizer)


def _may_want_second_pass(optimizer: Any) -> bool:
    return hasattr(optimizer, "wants_second_pass") and not getattr(optimizer, "never_two_pass", False)


def _wants_second_pass(optimizer: Any, trainer: L.Trainer) -> bool:
    wanted: bool = optimizer.wants_second_pass()
    if getattr(optimizer, "decides_alike", False) or getattr(optimizer, "always_two_pass", False):
        return wanted
    return trainer.strategy.reduce_boolean_decision(wanted, all=False)


def _check(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    name, strategy = type(pl_module).__name__, trainer.strategy
    if sum(isinstance(callback, TwoPass) for callback in vars(trainer)["callbacks"]) > 1:
        raise ValueError("the Trainer has more than one TwoPass: remove all but one (train.py adds it by itself)")
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"TwoPass cannot make the passes of {name}, because it sets automatic_optimization to False: remove the"
            " callback, and loop over optimizer.passes(self) in training_step()"
        )
    if getattr(trainer.optimizers[0], "moves_first_pass", False):
        raise ValueError(
            f'TwoPass cannot move the parameters before {name}.training_step(), which mode "momentum" needs: set'
            " automatic_optimization to False there, and loop over optimizer.passes(self)"
        )
    if not _may_want_second_pass(trainer.optimizers[0]):
        return
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise ValueError(
            f"TwoPass cannot repeat the batches of {name}, whose training_step(dataloader_iter) draws them itself: let"
            " it take batch and batch_idx"
        )
    if strategy.handles_gradient_accumulation or isinstance(strategy, FSDPStrategy):
        raise ValueError(
            f"TwoPass does not support {type(strategy).__name__}, which makes its own steps or parameters: use ddp, or"
            " ModelParallelStrategy with fully_shard in configure_model()"
        )


def loss_of(output: Any, module: L.LightningModule) -> Tensor:
    """Return the loss in the output of a ``training_step``.

    Raises:
        RuntimeError: there is none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        name = type(module).__name__
        raise RuntimeError(f"{name}.training_step() returned no loss when its batch was evaluated again")
    return loss


@contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of one object in a block."""
    before = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        delattr(owner, name) if before is None else setattr(owner, name, before)


@contextmanager
def silent(pl_module: L.LightningModule) -> Iterator[None]:
    """Ignore what a module logs in a block, and restore its metrics at the end.

    The block works on copies of their states, because metrics of a collection may share states.
    """
    saved = [(metric, dict(vars(metric))) for metric in pl_module.modules() if isinstance(metric, Metric)]
    for metric, _ in saved:
        for name, state in metric.metric_state.items():
            setattr(metric, name, list(state) if isinstance(state, list) else state.clone())
    try:
        with _replaced(pl_module, "log", lambda *_, **__: None):
            yield
    finally:
        for metric, attributes in saved:
            vars(metric).clear()
            vars(metric).update(attributes)
