"""Tokenizer and tokens of a corpus, made once and kept on disk under a digest of all that they follow from.

A cache is a folder. It is made under another name and renamed when it is whole, so that nobody ever sees half of one;
a lock lets two runs that start at once make it only once; and checksums tell a damaged one, which is made again.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from rich import get_console
from rich.progress import Progress

from datamodules.text_corpus import SPLITS, Corpus
from datamodules.token_rows import PAD, Protocol, SplitTokens, split_tokens

_FORMAT = 3  # of the cache, and of everything in this folder that its contents follow from
_SPECIAL_TOKENS = ["<|endoftext|>", "<pad>"]
_BYTES = 256
_ENCODED_AT_ONCE = 4096
_META = "meta.json"


class Tokens(NamedTuple):
    """What a cache holds: the tokenizer (of ``tokenizers``) and every split."""

    tokenizer: Any
    splits: dict[str, SplitTokens]


def default_cache() -> Path:
    """Return the folder for caches: ``ars2`` in ``XDG_CACHE_HOME``, or in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ars2"


def cached_tokens(corpus: Corpus, vocabulary: int, protocol: Protocol, context: int, cache: Path) -> Tokens:
    """Load the tokens of ``corpus``, making them if they are not there, or damaged.

    Args:
        corpus: what to tokenize.
        vocabulary: of the byte-level BPE tokenizer that is trained on the training split, special tokens included.
        protocol, context: of the rows, see :func:`datamodules.token_rows.split_tokens`.
        cache: folder that holds the folders of all caches.

    Raises:
        ValueError: a vocabulary that the corpus does not give, an empty split, or one without a whole row.
    """
    import tokenizers

    options = {
        **{"format": _FORMAT, "corpus": corpus.digest, "tokenizers": tokenizers.__version__},
        **{"vocabulary": vocabulary, "protocol": protocol, "context": context if protocol == "packed" else None},
    }
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:24]
    folder = cache / digest
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{digest}.lock"):
        found = _load(folder)
        if found is None:
            _make(folder, corpus, vocabulary, protocol, context)
            found = _load(folder)
    if found is None:
        raise OSError(f"the cache {folder} was written and cannot be read back: look at the disk")
    return found


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(folder: Path) -> Tokens | None:
    """Return what ``folder`` holds, arrays mapped into memory; ``None`` if it is missing or damaged."""
    import tokenizers

    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        if any(_checksum(folder / name) != checksum for name, checksum in meta["checksums"].items()):
            return None
        splits = {
            split: SplitTokens(np.load(folder / f"{split}.npy", mmap_mode="c"), *meta["sizes"][split])
            for split in SPLITS
        }
        return Tokens(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), splits)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _make(folder: Path, corpus: Corpus, vocabulary: int, protocol: Protocol, context: int) -> None:
    lines = corpus.read()
    for split in SPLITS:
        if not any(line.strip() for line in lines[split]):
            raise ValueError(f"the {split} split of the corpus ({corpus.source}) holds no text")
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.making-", dir=folder.parent))
    try:
        with _Progress(lines) as progress:
            tokenizer = _train_tokenizer(lines["train"], vocabulary, every_byte=protocol == "contiguous")
            meta: dict[str, Any] = {"sizes": {}, "checksums": {}}
            tokenizer.save(str(temporary / "tokenizer.json"))
            for split in SPLITS:

                def encode(texts: Sequence[str], split: str = split) -> Iterator[list[int]]:
                    return progress.encode(tokenizer, texts, split)

                tokens, *sizes = split_tokens(lines[split], encode, protocol, context)
                if len(tokens) == 0 or tokens.size < 2:
                    raise ValueError(f"the {split} split of the corpus holds no piece of 2 to {context + 1} tokens")
                np.save(temporary / f"{split}.npy", tokens)
                meta["sizes"][split] = sizes
        meta["checksums"] = {path.name: _checksum(path) for path in sorted(temporary.iterdir())}
        (temporary / _META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            # Damaged. Moved first, because a folder that is half removed must not be looked at either.
            damaged = Path(tempfile.mkdtemp(prefix=f"{folder.name}.damaged-", dir=folder.parent))
            os.replace(folder, damaged)
            shutil.rmtree(damaged)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _train_tokenizer(lines: Sequence[str], vocabulary: int, every_byte: bool) -> Any:
    """Train the tokenizer on the training split.

    Args:
        lines: of the training split.
        vocabulary: tokens, special ones included.
        every_byte: whether bytes that the split does not hold have a token too, so that no text is unknown. The
            published protocol leaves them out, and has as many more merges.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    smallest = _BYTES + len(_SPECIAL_TOKENS)
    if vocabulary < smallest:
        raise ValueError(f"vocabulary must be at least {smallest}, every byte and two special tokens, got {vocabulary}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()) if every_byte else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{line}\n" for line in lines), trainer, length=len(lines))
    if tokenizer.get_vocab_size() < vocabulary:
        raise ValueError(
            f"vocabulary is {vocabulary}, but the training split is too small for more than"
            f" {tokenizer.get_vocab_size()}: lower data.vocabulary and model.vocabulary"
        )
    assert tokenizer.token_to_id(_SPECIAL_TOKENS[PAD]) == PAD
    return tokenizer


class _Progress:
    """A bar for what takes seconds; on a terminal only, as everywhere."""

    def __init__(self, lines: dict[str, list[str]]) -> None:
        self.lines = sum(map(len, lines.values()))
        self.bar = Progress(console=get_console(), transient=True, disable=not get_console().is_terminal)

    def __enter__(self) -> "_Progress":
        if self.bar.disable:
            print(f"training a tokenizer and tokenizing {self.lines:,} lines, once for this corpus", flush=True)
        self.bar.start()
        self.training = self.bar.add_task("training the tokenizer", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def encode(self, tokenizer: Any, texts: Sequence[str], split: str) -> Iterator[list[int]]:
        """Yield the tokens of each text, many of them encoded at once on all cores."""
        self.bar.update(self.training, visible=False)
        task = self.bar.add_task(f"tokenizing {split}", total=len(texts))
        for start in range(0, len(texts), _ENCODED_AT_ONCE):
            some = texts[start : start + _ENCODED_AT_ONCE]
            for encoding in tokenizer.encode_batch(some, add_special_tokens=False):
                yield encoding.ids
            self.bar.advance(task, len(some))
