"""Write a sample of text at each validation, to watch a language model learn."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from rich import get_console

from callbacks.lookup import folder_of


class TextSamples(L.Callback):
    """Continue the data's first prompt after each validation.

    The module's sampling options apply. The text goes to the console, to ``samples.txt`` in the run folder together
    with the completed epochs and steps, and to every logger that takes text (``log_text``). Sampling uses a separate
    generator and does not affect training. A run that resumes from a checkpoint drops later samples from the file.
    """

    changes_training = False

    def __init__(self) -> None:
        self._size = 0  # bytes in the file

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        file = self._file(trainer)
        if file is None or not file.exists():
            self._size = 0
        else:
            os.truncate(file, self._size)

    @staticmethod
    def _file(trainer: L.Trainer) -> Path | None:
        folder = folder_of(trainer) if trainer.is_global_zero and trainer.loggers else None
        return None if folder is None else folder / "samples.txt"

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        module: Any = pl_module
        prompt = trainer.datamodule.prompt_tokens()[0].to(module.device)  # type: ignore[attr-defined]
        # Every rank must take part: each has a part of a sharded network.
        text = module.continue_text(prompt)
        if not trainer.is_global_zero:
            return
        place = f"epoch {trainer.current_epoch + 1}, step {trainer.global_step}"
        if path := self._file(trainer):
            with path.open("a", encoding="utf-8") as file:
                file.write(f"--- {place}\n{text}\n")
                self._size = file.tell()
        get_console().print(f"{place}: {text!r}", markup=False, highlight=False, soft_wrap=True)
        for logger in trainer.loggers:
            if hasattr(logger, "log_text"):
                logger.log_text("val/sample", columns=["epoch", "text"], data=[[trainer.current_epoch + 1, text]])

    def state_dict(self) -> dict[str, Any]:
        return {"size": self._size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._size = state_dict["size"]
