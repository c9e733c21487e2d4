"""Two ways from lines of text to rows of tokens, of which ``row[:-1]`` predicts ``row[1:]``."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Protocol = Literal["packed", "contiguous"]
END, PAD = 0, 1  # the tokenizer's special tokens, <|endoftext|> and <pad>
UNKNOWN = "<unk>"  # what the tokens version of WikiText-2 has in place of rare words

# Texts in, the tokens of each out; a lazy iterable, so that not all tokens are Python numbers at once.
Encode = Callable[[Sequence[str]], Iterable[list[int]]]


class SplitTokens(NamedTuple):
    """A split as tokens, and the size of its text.

    ``tokens`` (int32) are rows (rows, context + 1) under ``packed``, one stream (tokens,) under ``contiguous``.
    ``words`` are whitespace-separated, with one end of line a line; ``utf8_bytes`` counts one byte an end of line;
    ``unknown_words`` are those that read ``<unk>``, of which the raw version has none.
    """

    tokens: NDArray[np.int32]
    words: int
    utf8_bytes: int
    unknown_words: int


def pieces(lines: Iterable[str]) -> Iterator[str]:
    """Split each line at its full stops, and end every piece with one of its own.

    White space around a piece is stripped first, so "an actor ." becomes "an actor."; empty pieces are dropped, and a
    piece that had no full stop, such as a heading, gets one too.
    """
    for line in lines:
        for piece in line.split("."):
            if piece := piece.strip():
                yield f"{piece}."


def packed(lines: Sequence[str], encode: Encode, context: int) -> NDArray[np.int32]:
    """Return rows (rows, context + 1) of whole pieces, each followed by the end token, padded at the end.

    Pieces of 2 to context + 1 tokens, the end token included, are sorted with the longest first (equal ones stay in
    order) and put into the current row if they fit, else into a new one.
    """
    length = context + 1
    kept = [tokens for tokens in encode(list(pieces(lines))) if 2 <= len(tokens) + 1 <= length]
    kept.sort(key=len, reverse=True)
    rows: list[list[int]] = []
    for tokens in kept:
        if not rows or len(rows[-1]) + len(tokens) + 1 > length:
            rows.append([])
        rows[-1] += [*tokens, END]
    filled = np.full((len(rows), length), PAD, dtype=np.int32)
    for row, tokens in zip(filled, rows, strict=True):
        row[: len(tokens)] = tokens
    return filled


def contiguous(lines: Sequence[str], encode: Encode) -> NDArray[np.int32]:
    """Return one stream (tokens,): the end token, then every line with its line end."""
    parts = [np.asarray(tokens, dtype=np.int32) for tokens in encode([f"{line}\n" for line in lines])]
    return np.concatenate([np.array([END], dtype=np.int32), *parts])


def split_tokens(lines: Sequence[str], encode: Encode, protocol: Protocol, context: int) -> SplitTokens:
    """Turn one split into tokens by ``protocol``; only ``packed`` depends on ``context`` here."""
    tokens = packed(lines, encode, context) if protocol == "packed" else contiguous(lines, encode)
    words = [word for line in lines for word in line.split()]
    utf8_bytes = sum(len(line.encode()) + 1 for line in lines)
    return SplitTokens(tokens, len(words) + len(lines), utf8_bytes, words.count(UNKNOWN))
