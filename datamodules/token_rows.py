"""Convert lines of text to rows of tokens, by one of two protocols.

In a row, ``row[:-1]`` predicts ``row[1:]``.
"""

import random
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Protocol = Literal["packed", "contiguous"]
END, PAD = 0, 1  # the tokenizer's special tokens, <|endoftext|> and <pad>
UNKNOWN = "<unk>"  # replaces rare words in the tokens version of WikiText-2

# Maps texts to their tokens. The iterable is lazy, so that not all tokens are Python numbers at once.
Encode = Callable[[Sequence[str]], Iterable[list[int]]]


class SplitTokens(NamedTuple):
    """Collect the tokens of a split and the size of its text.

    ``tokens`` (int32) are rows (rows, context + 1) under ``packed``, and one stream (tokens,) under ``contiguous``.
    ``words`` counts whitespace-separated words and one line end for each line. ``utf8_bytes`` counts one byte for each
    line end. ``unknown_words`` counts ``<unk>``, which the raw version does not contain.
    """

    tokens: NDArray[np.int32]
    words: int
    utf8_bytes: int
    unknown_words: int


def run_of_lines(lines: Sequence[str], fraction: float, seed: int) -> Sequence[str]:
    """Return consecutive lines with about ``fraction`` of the bytes of ``lines``.

    ``seed`` places a window of that many bytes so that it fits into the text, without wrapping around. The lines that
    start in the window are returned. With the same seed, a smaller fraction is part of a larger one.
    """
    *starts, total = accumulate((_utf8_bytes(line) for line in lines), initial=0)
    first = random.Random(seed).random() * (1 - fraction) * total
    return lines[bisect_left(starts, first) : bisect_left(starts, first + fraction * total)]


def _utf8_bytes(line: str) -> int:
    return len(line.encode()) + 1


def pieces(lines: Iterable[str]) -> Iterator[str]:
    """Split each line at full stops, and end every piece with a full stop.

    White space around a piece is removed first, so "an actor ." becomes "an actor.". Empty pieces are dropped. A piece
    without a full stop, such as a heading, gets one too.
    """
    for line in lines:
        for piece in line.split("."):
            if piece := piece.strip():
                yield f"{piece}."


def packed(lines: Sequence[str], encode: Encode, context: int) -> NDArray[np.int32]:
    """Return rows (rows, context + 1) of complete pieces, padded at the end.

    The end token follows each piece. Pieces of 2 to context + 1 tokens, the end token included, are sorted by length in
    a stable order, longest first. Each joins the current row if it fits, and starts a new one otherwise.
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
    """Return one stream (tokens,) of all lines with their line ends.

    It starts with the end token.
    """
    parts = [np.asarray(tokens, dtype=np.int32) for tokens in encode([f"{line}\n" for line in lines])]
    return np.concatenate([np.array([END], dtype=np.int32), *parts])


def split_tokens(lines: Sequence[str], encode: Encode, protocol: Protocol, context: int) -> SplitTokens:
    """Convert one split to tokens by ``protocol``.

    Only ``packed`` depends on ``context``.
    """
    tokens = packed(lines, encode, context) if protocol == "packed" else contiguous(lines, encode)
    words = [word for line in lines for word in line.split()]
    utf8_bytes = sum(map(_utf8_bytes, lines))
    return SplitTokens(tokens, len(words) + len(lines), utf8_bytes, words.count(UNKNOWN))
