"""A tiny language model on the text that tests write."""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from datamodules.wikitext2 import WikiText2Data
from modules.language_model import LanguageModel
from tests.helpers.text import VOCABULARY, write_corpus
from tests.modules.small_task import make_optimizer

SIZES: dict[str, Any] = {
    **{"vocabulary": VOCABULARY, "context": 16, "layers": 2, "width": 16, "heads": 2, "key_value_heads": 2},
    **{"head_dim": 8, "mlp_width": 16, "sample_tokens": 6},
}


def model(optimizer: str = "adamw", **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(optimizer=make_optimizer(optimizer), **{**SIZES, **options})


def data(folder: Path, **options: Any) -> WikiText2Data:
    """Return data whose text is written below ``folder``, once."""
    if not (folder / "text").exists():
        write_corpus(folder / "text")
    defaults = {"vocabulary": VOCABULARY, "context": 16, "protocol": "contiguous", "batch_size": 8}
    return WikiText2Data(**{**defaults, "root": str(folder / "text"), "cache": str(folder / "cache"), **options})


def trainer(**options: Any) -> L.Trainer:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", **{**quiet, "logger": False, "num_sanity_val_steps": 0, **options})
