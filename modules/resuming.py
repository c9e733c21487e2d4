"""Save and restore what a task module needs to resume, evaluate and predict."""

from typing import Any, Literal, Self

import torch
from torch import nn

from experiment.library_internals import is_attached
from modules.evaluation import EvaluatedModule
from modules.optimizers import moves_parameters
from modules.saved_arguments import check_same_network, is_plain


class ResumableModule(EvaluatedModule):
    """Save arguments, counters and the parameters of schedule-free optimizers.

    A subclass sets ``network``, and ``_arguments`` to the plain arguments that it was made with.
    """

    network: nn.Module
    _arguments: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.gradient_evaluations = self.skipped_steps = 0
        self._resumed_optimizer: str | None = None
        self._at_training_parameters = False  # whether a schedule-free optimizer is at its training parameters

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **arguments: Any) -> Self:
        """Return the module of a checkpoint, as Lightning does.

        It can evaluate and predict without a Trainer.

        Args:
            checkpoint_path: of the file.
            args: as in Lightning.
            arguments: as in Lightning, and arguments of the module, which replace those in the file.

        Raises:
            ValueError: the file lacks an argument of the module, or is of another module or network.
        """
        try:
            return super().load_from_checkpoint(checkpoint_path, *args, **arguments)
        except TypeError as error:
            if "__init__() got an unexpected keyword argument" in str(error):
                unknown = str(error).rpartition(" ")[2]
                raise ValueError(
                    f"{cls.__name__} has no argument {unknown}, which {checkpoint_path} or the call gives: load the"
                    " file with the class that wrote it"
                ) from error
            if "__init__() missing" not in str(error):
                raise
            missing = str(error).rpartition(": ")[2]
            raise ValueError(
                f"{checkpoint_path} lacks arguments of {cls.__name__} ({missing}): pass them to load_from_checkpoint()."
                " For an old checkpoint without arguments, pass optimizer=None and the arguments of the network in the"
                " run's config.yaml, such as width=8"
            ) from error

    def _move_optimizers(self, to: Literal["train", "eval"]) -> None:
        """Switch schedule-free optimizers between parameters to train and to evaluate."""
        for optimizer in self.trainer.optimizers:
            if moves_parameters(optimizer):
                getattr(optimizer, to)()
                self._at_training_parameters = to == "train"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        # A subclass may have saved more hyperparameters.
        saved = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        if "_instantiator" not in saved:
            saved = {name: value for name, value in saved.items() if is_plain(value)}
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = {**saved, **self._arguments}
        if self._at_training_parameters and self.device_mesh is None:
            self._save_both(checkpoint)
        checkpoint["gradient_evaluations"] = self.gradient_evaluations
        checkpoint["skipped_steps"] = self.skipped_steps
        checkpoint["optimizer"] = type(self.trainer.optimizers[0]).__name__

    @torch.no_grad()
    def _save_both(self, checkpoint: dict[str, Any]) -> None:
        """Save the parameters to evaluate, and beside them those to train on.

        The latter are saved bit for bit.
        """
        training = {name: param.clone() for name, param in self.named_parameters()}
        self._move_optimizers("eval")
        checkpoint["state_dict"] |= {name: param.clone() for name, param in self.named_parameters()}
        self._move_optimizers("train")
        for name, param in self.named_parameters():
            param.copy_(training[name])  # switching back and forth rounds
        checkpoint["training_parameters"] = training

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters of a run.

        ``load_from_checkpoint()``, without a Trainer, restores only the weights.

        Raises:
            ValueError: without a Trainer, if the checkpoint is of another network.
        """
        if not is_attached(self):
            check_same_network(self, checkpoint["state_dict"])
            return
        super().on_load_checkpoint(checkpoint)
        # A sharded checkpoint has no training parameters here.
        if self.trainer.state.fn == "fit" and "training_parameters" in checkpoint:
            checkpoint["state_dict"].update(checkpoint["training_parameters"])
        self.gradient_evaluations = checkpoint["gradient_evaluations"]
        self.skipped_steps = checkpoint["skipped_steps"]
        self._resumed_optimizer = checkpoint["optimizer"]
