"""Cache the tokenizer and the tokens of a corpus on disk.

The name of a cache is a digest of everything that determines its contents. A cache is a folder, written under a
temporary name and renamed when complete, so that a partial one is never read. With a lock, two runs that start at the
same time make it once. Checksums detect a damaged cache, which is made again.
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
from datamodules.token_rows import PAD, Protocol, SplitTokens, run_of_lines, split_tokens

_FORMAT = 3  # version of the cache and of the code in this folder that determines its contents
_SPECIAL_TOKENS = ["<|endoftext|>", "<pad>"]
_BYTES = 256
_ENCODED_AT_ONCE = 4096
_META = "meta.json"


class Tokens(NamedTuple):
    """Collect the tokenizer (of ``tokenizers``) and the tokens of every split."""

    tokenizer: Any
    splits: dict[str, SplitTokens]


def default_cache() -> Path:
    """Return ``ars2`` in ``XDG_CACHE_HOME`` or ``~/.cache``, the folder for caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ars2"


def cached_tokens(
    corpus: Corpus,
    vocabulary: int,
    protocol: Protocol,
    context: int,
    cache: Path,
    train_fraction: float = 1.0,
    fraction_seed: int = 0,
) -> Tokens:
    """Load the tokens of ``corpus``, making the cache if missing or damaged.

    Args:
        corpus: the corpus to tokenize.
        vocabulary: size of the byte-level BPE tokenizer, special tokens included. It is trained on the training split.
        protocol, context: of the rows, see :func:`datamodules.token_rows.split_tokens`.
        cache: folder of all caches.
        train_fraction, fraction_seed: of the training lines, see :func:`datamodules.token_rows.run_of_lines`. The
            tokenizer is trained on all of them.

    Raises:
        ValueError: a vocabulary larger than the corpus allows, an empty split, one without a full row, or a fraction
            of the training lines without text.
    """
    import tokenizers

    options = {
        "format": _FORMAT,
        "corpus": corpus.digest,
        "tokenizers": tokenizers.__version__,
        "vocabulary": vocabulary,
        "protocol": protocol,
        "context": context if protocol == "packed" else None,
    }
    if train_fraction < 1:  # later options, so that older caches keep their names
        options |= {"train_fraction": train_fraction, "fraction_seed": fraction_seed}
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:24]
    folder = cache / digest
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{digest}.lock"):
        found = _load(folder)
        if found is None:
            _make(folder, corpus, vocabulary, protocol, context, train_fraction, fraction_seed)
            found = _load(folder)
    if found is None:
        raise OSError(f"the cache {folder} cannot be read after writing it: check the disk")
    return found


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(folder: Path) -> Tokens | None:
    """Return the contents of ``folder``, with memory-mapped arrays.

    If it is missing or damaged, the result is ``None``.
    """
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


def _make(
    folder: Path,
    corpus: Corpus,
    vocabulary: int,
    protocol: Protocol,
    context: int,
    train_fraction: float,
    fraction_seed: int,
) -> None:
    lines = corpus.read()
    for split in SPLITS:
        if not any(line.strip() for line in lines[split]):
            raise ValueError(f"the {split} split of the corpus ({corpus.source}) has no text: check its file")
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.making-", dir=folder.parent))
    try:
        with _Progress(lines) as progress:
            tokenizer = _train_tokenizer(lines["train"], vocabulary, every_byte=protocol == "contiguous")
            meta: dict[str, Any] = {"sizes": {}, "checksums": {}}
            tokenizer.save(str(temporary / "tokenizer.json"))
            run = run_of_lines(lines["train"], train_fraction, fraction_seed)
            if not any(line.strip() for line in run):
                raise ValueError(f"train_fraction {train_fraction} leaves no text: raise data.train_fraction")
            for split in SPLITS:

                def encode(texts: Sequence[str], split: str = split) -> Iterator[list[int]]:
                    return progress.encode(tokenizer, texts, split)

                tokens, *sizes = split_tokens(run if split == "train" else lines[split], encode, protocol, context)
                if len(tokens) == 0 or tokens.size < 2:
                    raise ValueError(f"the {split} split has no sentence of 2 to {context + 1} tokens: raise context")
                np.save(temporary / f"{split}.npy", tokens)
                meta["sizes"][split] = sizes
        meta["checksums"] = {path.name: _checksum(path) for path in sorted(temporary.iterdir())}
        (temporary / _META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            # Damaged. Moved first, because a partly deleted folder must not be read either.
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
        vocabulary: number of tokens, special ones included.
        every_byte: whether bytes outside the split have a token, so that every text can be encoded. The published
            protocol leaves them out and has as many more merges.
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
    """Show a progress bar for slow work.

    It appears only on a terminal.
    """

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
        """Yield the tokens of each text, encoding many at once on all cores."""
        self.bar.update(self.training, visible=False)
        task = self.bar.add_task(f"tokenizing {split}", total=len(texts))
        for start in range(0, len(texts), _ENCODED_AT_ONCE):
            some = texts[start : start + _ENCODED_AT_ONCE]
            for encoding in tokenizer.encode_batch(some, add_special_tokens=False):
                yield encoding.ids
            self.bar.advance(task, len(some))
