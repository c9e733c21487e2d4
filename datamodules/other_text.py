"""Provide rows of another text in the tokens of a run on WikiText-2."""

import sysconfig
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from datamodules.batches import TensorBatches
from datamodules.wikitext2 import WikiText2Data

_VALIDATION = 10  # every tenth row


class OtherText(L.LightningDataModule):
    """Provide another text as rows of the tokens that a run on WikiText2Data has.

    It is the other data of :class:`callbacks.forgetting_probe.ForgettingProbe`. It takes tokenizer, context and batch
    sizes from the run's data module. The text is one stream, of which every tenth row is for validation.

    Args:
        files: text files, of which the first ``characters`` are used. ``None`` are the modules of Python's standard
            library in the order of their names, so that the other text is source code.
        characters: length of the text.

    Raises:
        ValueError: the run has another data module, or the text is too short.
    """

    def __init__(self, files: list[str] | None = None, characters: int = 1_000_000) -> None:
        super().__init__()
        if characters < 1:
            raise ValueError(f"characters must be at least 1, got {characters}")
        self.files, self.characters = files, characters
        self.rows: Tensor

    def setup(self, stage: str) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, WikiText2Data):
            raise ValueError("OtherText is in the tokens of WikiText2Data, which is not the data of this run")
        self.data = data
        encodings = data.tokens.tokenizer.encode_batch(self._text().splitlines(keepends=True), add_special_tokens=False)
        stream = torch.tensor([token for encoding in encodings for token in encoding.ids], dtype=torch.int32)
        length = data.context + 1
        if len(stream) < 2 * _VALIDATION * length:
            raise ValueError(f"the other text has {len(stream)} tokens, too few: give OtherText longer files")
        self.rows = stream.unfold(0, length, data.context)

    def _text(self) -> str:
        paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")) if self.files is None else self.files
        text = ""
        for path in paths:
            if len(text) < self.characters:
                text += Path(path).read_text(encoding="utf-8")
        return text[: self.characters]

    def train_dataloader(self) -> TensorBatches:
        """Return nine of ten rows, shuffled in each epoch."""
        kept = torch.arange(len(self.rows)) % _VALIDATION > 0
        return TensorBatches((self.rows[kept],), self.data.batch_size, self.data.seed)

    def val_dataloader(self) -> TensorBatches:
        """Return every tenth row, in a fixed order."""
        return TensorBatches((self.rows[::_VALIDATION],), self.data.val_batch_size, None)
