"""One limit for every optimizer: a run may spend so many gradient evaluations."""

import lightning.pytorch as L


class EvaluationBudget(L.Callback):
    """Stops training at the end of the epoch in which the gradient evaluations reach a number.

    An epoch is finished, so that its validation counts; steps that look twice spend two evaluations.

    Args:
        gradient_evaluations: the budget, at least 1.

    Raises:
        ValueError: a budget below 1.
    """

    def __init__(self, gradient_evaluations: int) -> None:
        if gradient_evaluations < 1:
            raise ValueError(f"gradient_evaluations must be at least 1, got {gradient_evaluations}")
        self.gradient_evaluations = gradient_evaluations

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if int(pl_module.gradient_evaluations) >= self.gradient_evaluations:  # type: ignore[arg-type]
            trainer.should_stop = True
