"""Load WikiText-2 (Merity et al. 2017) as rows of byte-level BPE tokens.

There are two protocols.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.batches import TensorBatches, device_of
from datamodules.saved_split import check_same_split
from datamodules.text_corpus import open_corpus
from datamodules.token_cache import Tokens, cached_tokens, default_cache
from datamodules.token_rows import UNKNOWN, Protocol, SplitTokens

ROOT = "ARS2_WIKITEXT2_ROOT"
_PROMPTS, _PROMPT_TOKENS = 3, 16


class WikiText2Data(L.LightningDataModule):
    """Provide batches (rows (batch, context + 1),) of int32 tokens.

    A row's tokens but the last predict those but the first. ``packed`` is the published protocol. It packs complete
    sentences into rows, longest first, and pads them. Padding counts in the loss, and the last short batch of training
    and validation is dropped. Its perplexities are comparable only with each other. ``contiguous`` is the standard
    protocol, with the text as one stream. It predicts every token of a validation or test text once, the last ones in a
    shorter row, so that perplexity per word and bits per byte can be computed. Training rows are shuffled.

    Args:
        vocabulary: of the tokenizer, special tokens included. It is trained on the training split.
        context: number of tokens in a row to predict from.
        protocol: ``"packed"`` or ``"contiguous"``.
        batch_size: rows in a training batch.
        val_batch_size: rows in a validation batch. ``None`` is ``batch_size``.
        seed: of the training order.
        root: folder of the corpus, see :func:`datamodules.text_corpus.open_corpus`. ``None`` is the environment
            variable ``ARS2_WIKITEXT2_ROOT``, or else the raw version from the hub.
        on_device: store the rows on the training device instead of copying every batch to it.
        cache: folder for tokenizers and tokens. ``None`` is ``ars2`` in the user's cache folder.
        prompts: texts to continue for ``predict``. ``None`` is the beginnings of three validation rows.
        train_fraction: train on consecutive lines with about this fraction of the training split's bytes. Their place
            depends on ``fraction_seed``, see :func:`datamodules.token_rows.run_of_lines`. The tokenizer is still
            trained on the complete split. Validation and test are complete.
        fraction_seed: of the place of these lines. It is not ``seed``, so that all seeds train on the same text.

    Raises:
        ValueError: a value is out of range, at construction. At setup as :func:`datamodules.token_cache.cached_tokens`,
            a prompt without tokens or with more than ``context``, or a fraction with too few rows for a batch.
    """

    task = "wikitext"
    places = ("root", "cache")
    words = ("corpus", "source")

    def __init__(
        self,
        vocabulary: int = 40_479,
        context: int = 255,
        protocol: Protocol = "contiguous",
        batch_size: int = 8,
        val_batch_size: int | None = None,
        seed: int = 42,
        root: str | None = None,
        cache: str | None = None,
        on_device: bool = False,
        prompts: list[str] | None = None,
        train_fraction: float = 1.0,
        fraction_seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("context", context), ("batch_size", batch_size), ("val_batch_size", val_batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < train_fraction <= 1:
            raise ValueError(f"train_fraction must be above 0 and at most 1, got {train_fraction}")
        self.vocabulary, self.context, self.protocol = vocabulary, context, protocol
        self.batch_size, self.val_batch_size, self.seed = batch_size, val_batch_size or batch_size, seed
        self.root, self.cache, self.on_device, self.prompts = root, cache, on_device, prompts
        self.train_fraction, self.fraction_seed = train_fraction, fraction_seed
        self.source, self.digest = "", ""
        self._tokens: Tokens | None = None

    def prepare_data(self) -> None:
        """Make the cache, on one process of a machine."""
        self._load()

    def setup(self, stage: str) -> None:
        """Load the tokens, on every process.

        Loggers get the description of the corpus and protocol, on which every result depends.
        """
        self._load()
        if stage == "predict":
            self.prompt_tokens()
        elif stage == "fit":
            # This fails before anything is written, if there are too few rows for a batch.
            self.train_dataloader()
            self.val_dataloader()
            for logger in [] if self.trainer is None else self.trainer.loggers:
                logger.log_hyperparams(self.description())

    def _load(self) -> None:
        if self._tokens is not None:
            return
        root = self.root or os.environ.get(ROOT)
        corpus = open_corpus(Path(root).expanduser() if root else None)
        cache = Path(self.cache).expanduser() if self.cache else default_cache()
        self._tokens = cached_tokens(
            corpus, self.vocabulary, self.protocol, self.context, cache, self.train_fraction, self.fraction_seed
        )
        self.source, self.digest = corpus.source, corpus.digest

    @property
    def tokens(self) -> Tokens:
        """Return the tokenizer and the splits.

        Raises:
            RuntimeError: :meth:`setup` has not been called.
        """
        if self._tokens is None:
            raise RuntimeError("the tokens are not loaded: call setup() first")
        return self._tokens

    def description(self) -> dict[str, Any]:
        """Return the properties of the data that results depend on.

        These are corpus, protocol, vocabulary, sizes by split, and the fraction of the training text if it is not 1.
        """
        sizes = {}
        for name, split in self.tokens.splits.items():
            rows, rest = self._rows(split)
            tokens = rows[:, 1:].numel() + max(0, len(rest) - 1)
            sizes[name] = {"rows": len(rows), "predicted_tokens": tokens}
            sizes[name] |= {"words": split.words, "utf8_bytes": split.utf8_bytes}
        unknown = sum(split.unknown_words for split in self.tokens.splits.values())
        version = f"tokens version ({unknown:,} words are {UNKNOWN})" if unknown else f"raw version (no {UNKNOWN})"
        return {
            "corpus": f"WikiText-2, {version}",
            "source": self.source,
            "corpus_sha256": self.digest,
            "tokenizer_sha256": hashlib.sha256(self.tokens.tokenizer.to_str().encode()).hexdigest(),
            "protocol": self.protocol,
            "vocabulary": self.vocabulary,
            "context": self.context,
            "splits": sizes,
        } | (self._fraction if self.train_fraction < 1 else {})

    @property
    def _fraction(self) -> dict[str, Any]:
        # The complete text has no place that a seed chooses.
        place = {"fraction_seed": self.fraction_seed} if self.train_fraction < 1 else {}
        return {"train_fraction": self.train_fraction, **place}

    def state_dict(self) -> dict[str, Any]:
        """Return the tokenizer, two digests and the fraction for a checkpoint.

        Without the tokenizer the tokens have no meaning.
        """
        description = self.description()
        digests = {name: description[name] for name in ("corpus_sha256", "tokenizer_sha256")}
        return {**digests, **self._fraction, "tokenizer": self.tokens.tokenizer.to_str()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint was trained on this corpus, and if it trains on, on the same part of it.

        Raises:
            ValueError: it was trained on another corpus or part, or with another tokenizer.
        """
        description = self.description()
        for name, kind in (("corpus_sha256", "corpus"), ("tokenizer_sha256", "tokenizer")):
            if state_dict[name] != description[name]:
                raise ValueError(
                    f"the checkpoint was trained with another {kind} ({state_dict[name][:8]}) than the one of"
                    f" {self.source} ({description[name][:8]}): set --data.root or {ROOT} to the folder of its corpus"
                )
        if self.trainer is None or self.trainer.state.fn == "fit":
            check_same_split(state_dict, self._fraction)

    def _rows(self, split: SplitTokens) -> tuple[Tensor, Tensor]:
        """Return the full rows of a split, and the tokens of a last shorter row.

        The rows are a view of the mapped memory.
        """
        tokens = torch.from_numpy(split.tokens)
        if self.protocol == "packed":
            return tokens, tokens.new_empty(0)
        # Neighbouring rows share a token, the last target of one and the first input of the next.
        full_rows = (len(tokens) - 1) // self.context
        rows = tokens[: full_rows * self.context + 1].unfold(0, self.context + 1, self.context) if full_rows else None
        return tokens.new_empty(0, self.context + 1) if rows is None else rows, tokens[full_rows * self.context :]

    def train_dataloader(self) -> TensorBatches:
        """Return the training rows, shuffled in each epoch."""
        rows, _ = self._rows(self.tokens.splits["train"])
        if self.train_fraction < 1 and len(rows) < self.batch_size:
            raise ValueError(
                f"train_fraction {self.train_fraction} leaves {len(rows)} rows, too few for one batch of"
                f" {self.batch_size}: raise data.train_fraction or lower data.batch_size"
            )
        return TensorBatches(
            (rows.to(device_of(self, self.on_device)),), self.batch_size, self.seed, drop_last=self.protocol == "packed"
        )

    def val_dataloader(self) -> Any:
        """Return the validation rows, in a fixed order."""
        return self._evaluated("validation")

    def test_dataloader(self) -> Any:
        """Return the test rows, in a fixed order."""
        return self._evaluated("test")

    def _evaluated(self, name: str) -> Any:
        rows, rest = self._rows(self.tokens.splits[name])
        rows = rows.to(device_of(self, self.on_device))
        if self.protocol == "packed":
            return TensorBatches((rows,), self.val_batch_size, None, drop_last=True)
        return _CompleteText(rows, rest, self.val_batch_size)

    def prompt_tokens(self) -> list[Tensor]:
        """Return each prompt as tokens (1, tokens).

        Raises:
            ValueError: a prompt without tokens, or with more than ``context``.
        """
        if self.prompts is None:
            rows, rest = self._rows(self.tokens.splits["validation"])
            first = [*rows[:_PROMPTS], rest][:_PROMPTS]
            return [row[: min(_PROMPT_TOKENS, self.context)].unsqueeze(0) for row in first if len(row)]
        prompts = []
        for prompt in self.prompts:
            ids = self.tokens.tokenizer.encode(prompt, add_special_tokens=False).ids
            if self.tokens.tokenizer.decode(ids, skip_special_tokens=False) != prompt:
                raise ValueError(
                    f"the prompt {prompt[:40]!r} has characters outside the training text, which the packed"
                    " protocol cannot encode: leave them out"
                )
            if not 1 <= len(ids) <= self.context:
                raise ValueError(
                    f"the prompt {prompt[:40]!r} has {len(ids)} tokens, and the context allows 1 to {self.context}:"
                    f" use a {'shorter' if ids else 'longer'} one"
                )
            prompts.append(torch.tensor([ids], dtype=torch.int32))
        return prompts

    def predict_dataloader(self) -> Any:
        """Return the prompts in their order, one in each batch."""
        return DataLoader([(prompt,) for prompt in self.prompt_tokens()], batch_size=None)  # type: ignore[arg-type]


class _CompleteText:
    """Load full rows in batches, then the rest of the text as one shorter row."""

    def __init__(self, rows: Tensor, rest: Tensor, batch_size: int) -> None:
        self.rows: TensorBatches | list[Any] = TensorBatches((rows,), batch_size, None) if len(rows) else []
        # With several processes, one gets the row and the others an empty slice.
        self.rest: TensorBatches | list[Any] = TensorBatches((rest.unsqueeze(0),), 1, None) if len(rest) > 1 else []

    def __len__(self) -> int:
        return len(self.rows) + len(self.rest)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        yield from self.rows
        yield from self.rest
