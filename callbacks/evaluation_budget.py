"""Limit every optimizer to the same number of gradient evaluations."""

from typing import Any

import lightning.pytorch as L

from callbacks.module_protocol import trained


class EvaluationBudget(L.Callback):
    """Stop training when the gradient evaluations reach a number, and validate first.

    Where ``check_val_every_n_epoch`` leaves out the last epoch, validation needs
    :class:`callbacks.run_summary.RunSummary` later in the list of callbacks, as in ``train.py``.

    A two-pass step spends two evaluations, so that the last step may exceed the budget by one.

    Args:
        gradient_evaluations: the budget, at least 1.
        finish_epoch: whether to finish the epoch in which the budget is spent, or to end training with that step.

    Raises:
        ValueError: a budget below 1.
    """

    changes_training = True

    def __init__(self, gradient_evaluations: int, finish_epoch: bool = True) -> None:
        if gradient_evaluations < 1:
            raise ValueError(f"gradient_evaluations must be at least 1, got {gradient_evaluations}")
        self.gradient_evaluations, self.finish_epoch = gradient_evaluations, finish_epoch

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        is_spent = trained(trainer, pl_module).gradient_evaluations >= self.gradient_evaluations
        if is_spent and (trainer.is_last_batch or not self.finish_epoch):
            trainer.should_stop = True
