"""Silence warnings and log lines of libraries."""

import logging
import warnings

# Advice on settings that are chosen here on purpose, and deprecations inside the libraries.
WARNINGS = (
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*in manual optimization.*",
    "Using ModelCheckpoint with manual optimization",
    ".*does not have many workers.*",
    "LightningCLI's args parameter.*",
    ".*number of training batches .* is smaller than the logging interval.*",
    "The dirpath has changed from",
    "Be aware that when using `ckpt_path`",
    "Checkpoint directory .* exists and is not empty",
    "Encountered `nan` values in tensor",
    "Detected pickle protocol .* in the checkpoint",
    "You're resuming from a checkpoint that ended before the epoch",  # callbacks.loader_checks says what happens
    "You're using the WeightAveraging callback",  # with a sharded network, an error of ours follows
    "You passed `Trainer\\(accelerator='cpu', precision='16-mixed'\\)`",  # an error of ours follows
)
LOG_LINES = (
    "💡",
    "TPU available",
    "GPU available",
    "`Trainer.fit` stopped",
    "Seed set to",
    "Restoring states",
    "Restored all states",
    "Loaded model weights",
    "Found current_model_state",
)


def silence_libraries() -> None:
    """Filter the warnings and log lines above."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(LOG_LINES)
