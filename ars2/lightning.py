"""Train an ordinary LightningModule with second passes.

    trainer = L.Trainer(callbacks=[TwoPass()])

The module keeps automatic optimization, its ``training_step`` and its ``configure_optimizers``.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ars2.base import TrackedOptimizer
from ars2.distributed import Local
from ars2.replay import Buffers, random_state

try:
    import lightning.pytorch as L
    from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ParallelStrategy
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
    """Make the second pass of an optimizer that requests one, such as :class:`ars2.ARS2Neo`.

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
        self.between_steps = True  # whether no step is open, which has batches but no update yet
        self._window: list[Call] = []  # of the open step
        self._has_gradient = self._is_silent = False
        self._attached = ExitStack()

    def state_dict(self) -> dict[str, Any]:
        return {"gradient_evaluations": self.gradient_evaluations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.gradient_evaluations = state_dict["gradient_evaluations"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _check(trainer, pl_module)
        optimizer: Any = trainer.optimizers[0]
        if (
            isinstance(trainer.strategy, DDPStrategy)
            and isinstance(optimizer, TrackedOptimizer)
            and type(optimizer._layout) is Local
        ):
            optimizer.distribute(torch.distributed.group.WORLD)
        self._buffers = Buffers(pl_module)
        # The Trainer calls these methods of the instance, also where a strategy or a compiled module wraps it.
        for name, function in (
            ("training_step", self._recorded(pl_module, optimizer)),
            ("optimizer_step", self._with_second_pass(trainer, pl_module, optimizer)),
        ):
            self._attached.enter_context(_replaced(pl_module, name, function))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._window.clear()  # the last epoch may have ended within a window
        self.between_steps = True

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._has_gradient = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._window.clear()
        self._attached.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def _recorded(self, pl_module: L.LightningModule, optimizer: Any) -> Callable[..., Any]:
        """Return a ``training_step`` that keeps its calls for a second pass."""
        training_step = pl_module.training_step

        def recorded(*arguments: Any) -> Any:
            if self._is_silent:
                return training_step(*arguments)
            self.between_steps = False
            if not _may_want_second_pass(optimizer):
                return training_step(*arguments)
            tensors: list[tuple[Tensor, int]] = []
            call = Call(_copied(arguments, tensors), tensors, random_state(pl_module.device))
            output = training_step(*arguments)
            if output is not None:  # with None Lightning skips the batch
                self._window.append(call)
            return output

        return recorded

    def _with_second_pass(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> Callable[..., None]:
        """Return an ``optimizer_step`` whose closure makes both passes."""
        optimizer_step = pl_module.optimizer_step

        def with_second_pass(
            epoch: int, batch_idx: int, lightning_optimizer: Any, optimizer_closure: Callable[[], Any]
        ) -> None:
            def both_passes() -> Any:
                self._has_gradient = False
                result = optimizer_closure()
                if self._window and not self._has_gradient:
                    raise RuntimeError(
                        "training_step() was called without a backward pass, as StochasticWeightAveraging does for the"
                        " statistics of BatchNorm: use WeightAveraging, which averages them"
                    )
                self.gradient_evaluations += 1
                if self._window and optimizer.wants_second_pass():
                    self.gradient_evaluations += 1
                    self._second_pass(trainer, pl_module, optimizer)
                self._window.clear()
                self.between_steps = True
                return result

            optimizer_step(epoch, batch_idx, lightning_optimizer, both_passes)

        return with_second_pass

    @torch.enable_grad()
    def _second_pass(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        strategy: Any = trainer.strategy
        after = random_state(pl_module.device)
        optimizer.perturb()
        try:
            with self._buffers.unchanged(), self.silent(pl_module):
                for number, call in enumerate(self._window, start=1):
                    blocked = number < len(self._window) and isinstance(strategy, ParallelStrategy)
                    with strategy.block_backward_sync() if blocked else nullcontext():
                        strategy.backward(_repeat(call, trainer), optimizer)
        finally:
            optimizer.restore()
            after()

    @contextmanager
    def silent(self, pl_module: L.LightningModule) -> Iterator[None]:
        """Neither repeat nor log what ``training_step`` does in a block, and restore its metrics at the end.

        The block works on copies of their states, because metrics of a collection may share states.
        """
        saved = [(metric, dict(vars(metric))) for metric in pl_module.modules() if isinstance(metric, Metric)]
        for metric, _ in saved:
            for name, state in metric.metric_state.items():
                setattr(metric, name, list(state) if isinstance(state, list) else state.clone())
        self._is_silent = True
        try:
            with _replaced(pl_module, "log", lambda *_, **__: None):
                yield
        finally:
            self._is_silent = False
            for metric, attributes in saved:
                vars(metric).clear()
                vars(metric).update(attributes)


def _may_want_second_pass(optimizer: Any) -> bool:
    return hasattr(optimizer, "wants_second_pass") and not getattr(optimizer, "never_two_pass", False)


def _check(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    name, strategy = type(pl_module).__name__, trainer.strategy
    if sum(isinstance(callback, TwoPass) for callback in vars(trainer)["callbacks"]) > 1:
        raise ValueError("the Trainer has more than one TwoPass: remove all but one (train.py adds it by itself)")
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"TwoPass cannot make the passes of {name}, because it sets automatic_optimization to False: remove the"
            " callback, and loop over optimizer.passes(self) in training_step()"
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


def _repeat(call: Call, trainer: L.Trainer) -> Tensor:
    """Return the loss of a batch, divided as Lightning divides it."""
    name = type(trainer.lightning_module).__name__
    if any(tensor._version != version for tensor, version in call.versions):
        raise RuntimeError(
            f"{name}.training_step() changed a tensor of its batch in place, so that a second pass would not repeat the"
            " first: use the out-of-place operation, such as x = x.div(255) for x.div_(255)"
        )
    call.replay()
    output: Any = trainer.strategy.training_step(*call.arguments)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise RuntimeError(f"{name}.training_step() returned no loss in the second pass, but did in the first")
    return loss / trainer.accumulate_grad_batches


def _copied(value: Any, tensors: list[tuple[Tensor, int]]) -> Any:
    """Copy the containers of a batch, but not its tensors, which are added to ``tensors`` with their versions.

    A training step may take items out of a dictionary.
    """
    if isinstance(value, Tensor):
        tensors.append((value, value._version))
    elif isinstance(value, MutableMapping):
        copied = copy.copy(value)
        for key, item in value.items():
            copied[key] = _copied(item, tensors)
        return copied
    elif type(value) in (list, tuple):
        return type(value)(_copied(item, tensors) for item in value)
    return value


@contextmanager
def _replaced(pl_module: L.LightningModule, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of one module in a block."""
    before = vars(pl_module).get(name)  # a compiled module has its methods here
    functools.update_wrapper(function, method := getattr(pl_module, name))
    # Lightning unwraps one level to find the parameters of the method.
    function.__wrapped__ = getattr(method, "__wrapped__", method)  # type: ignore[attr-defined]
    setattr(pl_module, name, function)
    try:
        yield
    finally:
        delattr(pl_module, name) if before is None else setattr(pl_module, name, before)
