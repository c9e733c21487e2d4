"""The checkpoint to resume from: where training really ended, and every so often on the way there."""

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Keeps one file, ``last.ckpt``, of every n-th epoch's end and of the end of training.

    Lightning's own ``save_last`` follows its other saves: with a period above 1 it leaves the last multiple of it.

    Args:
        every_n_epochs: epochs from one save to the next, at least 1; what a killed run can lose.
        dirpath: where to; ``None`` is ``checkpoints`` in the run folder.

    Raises:
        ValueError: ``every_n_epochs`` below 1.
    """

    def __init__(self, every_n_epochs: int = 10, dirpath: str | None = None) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, got {every_n_epochs}")
        super().__init__(
            dirpath=dirpath,
            filename="last",
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))
