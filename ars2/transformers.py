"""Train with two passes in the Trainer of Hugging Face transformers."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ars2.ars2_neo import ARS2Neo
from ars2.base import TrackedOptimizer
from ars2.param_groups import param_groups
from ars2.replay import devices_of, first_pass, frozen_statistics, random_state, second_pass

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import Trainer
except ImportError as error:
    raise ImportError(
        "ars2.transformers needs transformers and accelerate: pip install 'ars2[transformers]'"
    ) from error


class MicroBatch(NamedTuple):
    """Keep what a second pass needs to repeat a micro-batch.

    ``items`` and ``micro_batches`` normalise its loss.
    """

    inputs: dict[str, Any]
    items: Any
    micro_batches: int
    replay: Callable[[], None]


class TwoPassTrainer(Trainer):
    """Train as transformers' Trainer does, and make the second passes of ARS2Neo.

    The second pass repeats the micro-batches of the update, with the same random numbers (dropout) and the same
    normalisation of the loss. It leaves buffers, such as BatchNorm's running statistics, unchanged. The logged loss is
    that of the first pass. ``max_grad_norm`` clips the gradient of the update. Optimizers without second passes train
    as in Trainer.

    Given ``optimizer_cls_and_kwargs=(ARS2Neo, options)``, or Muon, the groups are those of ``param_groups(model,
    "hidden")``. ``learning_rate`` and ``weight_decay`` of the TrainingArguments apply unless ``options`` has ``lr`` and
    ``weight_decay``. As in Trainer, biases and norms get no weight decay. Options with ``params`` set the groups
    themselves.

    For a subclass of Trainer, such as Seq2SeqTrainer, inherit from both, with TwoPassTrainer first.

    Attributes:
        is_second_pass: whether a second pass is being made, for a ``compute_loss`` with side effects such as metrics.
    """

    is_second_pass = False
    _window: list[MicroBatch]

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Make the optimizer, with groups by the roles of the parameters if it has tracks.

        Raises:
            ValueError: it would train no parameter of the model.
        """
        if self.optimizer is None and self.optimizer_cls_and_kwargs is not None:
            optimizer_class, options = self.optimizer_cls_and_kwargs
            tracked = isinstance(optimizer_class, type) and issubclass(optimizer_class, TrackedOptimizer)
            if tracked and "params" not in options:
                options = {"lr": self.args.learning_rate, "weight_decay": self.args.weight_decay, **options}
                groups = self._groups(model or self.model, options["weight_decay"])
                self.optimizer = optimizer_class(groups, **options)
        # Early versions of transformers 5 do not pass the model.
        optimizer: Optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        found = {param for group in optimizer.param_groups for param in group["params"]}
        trainable = (param for param in (model or self.model).parameters() if param.requires_grad)  # type: ignore[union-attr]
        if not self.is_fsdp_enabled and found.isdisjoint(trainable):  # FSDP replaces the parameters
            raise ValueError(
                "the optimizer has no trainable parameter of the model: make its groups (params) after every change of"
                " the model, such as get_peft_model(), or leave them out, as with model_init"
            )
        return optimizer

    def _groups(self, model: Any, weight_decay: float) -> list[dict[str, Any]]:
        decayed = set(self.get_decay_parameter_names(model))
        groups = []
        for group in param_groups(model, policy="hidden"):
            for decays in (True, False):
                params = [(name, param) for name, param in group["params"] if (name in decayed) is decays]
                groups.append({**group, "params": params, "weight_decay": weight_decay if decays else 0.0})
        return [group for group in groups if group["params"]]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Make the first pass of a micro-batch.

        The last micro-batch of an update also makes the second pass of all.

        Returns:
            The loss of the first pass.
        """
        optimizer = _inner(self.optimizer)
        is_ddp = self.accelerator.distributed_type.name.startswith("MULTI_")
        if is_ddp and isinstance(optimizer, TrackedOptimizer) and not optimizer.is_distributed:
            optimizer.distribute(dist.group.WORLD)
        if not isinstance(optimizer, ARS2Neo) or optimizer.never_two_pass:
            if getattr(optimizer, "moves_first_pass", False):
                self._check_support()
            with first_pass(optimizer, model):
                loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        if not any(param.grad is not None for group in optimizer.param_groups for param in group["params"]):
            self._check_support()
            self._window = []  # not cleared before, if an error ended the last update
        replay = random_state(*devices_of(model))
        self._window.append(MicroBatch(inputs, num_items_in_batch, self.current_gradient_accumulation_steps, replay))
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            if optimizer.wants_second_pass():
                self._second_pass(model, optimizer)
            self._window = []
        return loss

    def _second_pass(self, model: nn.Module, optimizer: ARS2Neo) -> None:
        self.is_second_pass = True
        try:
            with second_pass(optimizer, frozen_statistics(model), devices_of(model)):
                for number, batch in enumerate(self._window, start=1):
                    batch.replay()
                    self.current_gradient_accumulation_steps = batch.micro_batches
                    is_last = number == len(self._window)
                    with nullcontext() if is_last else self.accelerator.no_sync(model):
                        super().training_step(model, batch.inputs, batch.items)
        finally:
            self.is_second_pass = False

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log as Trainer does, but nothing from a second pass."""
        if not self.is_second_pass:
            super().log(*args, **kwargs)

    def _check_support(self) -> None:
        """Check that this way of distributing the model supports second passes."""
        kind = self.accelerator.distributed_type.name
        supported = kind == "NO" or kind.startswith("MULTI_")
        if self.args.n_gpu > 1:
            supported, kind = False, "DataParallel (one process with several GPUs)"
        elif getattr(self.accelerator, "parallelism_config", None) or getattr(
            self, "is_distributed_loading_by_transformers", False
        ):
            supported, kind = False, "parallelism within the model"
        if not supported:
            raise ValueError(
                f"TwoPassTrainer moves parameters on one device or under DDP, not with {kind}: start one process for"
                ' each GPU with torchrun and without sharding, or use mode="base"'
            )


def _inner(optimizer: Any) -> Any:
    """Return the optimizer in accelerate's wrapper."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
