"""One limit for every optimizer: a run may spend so many gradient evaluations."""

from typing import Any

import lightning.pytorch as L


class EvaluationBudget(L.Callback):
    """Stops training when the gradient evaluations reach a number; what was trained is validated before.

    Steps that look twice spend two evaluations, so that the last step may go one above.

    Args:
        gradient_evaluations: the budget, at least 1.
        finish_epoch: whether the epoch is finished in which the budget is spent; if not, it ends with that step.

    Raises:
        ValueError: a budget below 1.
    """

    changes_training = True

    def __init__(self, gradient_evaluations: int, finish_epoch: bool = True) -> None:
        if gradient_evaluations < 1:
            raise ValueError(f"gradient_evaluations must be at least 1, got {gradient_evaluations}")
        self.gradient_evaluations, self.finish_epoch = gradient_evaluations, finish_epoch

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if not self.finish_epoch:
            self._stop_if_spent(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_if_spent(trainer, pl_module)

    def _stop_if_spent(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if int(pl_module.gradient_evaluations) >= self.gradient_evaluations:  # type: ignore[arg-type]
            trainer.should_stop = True
