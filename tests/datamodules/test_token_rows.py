"""Compare both protocols with plain versions written from the definition."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.text_corpus import open_corpus
from datamodules.token_cache import cached_tokens
from datamodules.token_rows import Protocol, contiguous, packed, pieces, run_of_lines, split_tokens
from datamodules.wikitext2 import WikiText2Data
from tests.helpers.text import ROOT, lines, needs_wikitext2, write_corpus


def letters(texts: Sequence[str]) -> list[list[int]]:
    """Return a tokenizer with a token for each character."""
    return [[ord(letter) for letter in text] for text in texts]


def packed_by_hand(text: list[str], encode: Callable[[str], list[int]], length: int) -> list[list[int]]:
    long_enough = []
    for line in text:
        for piece in map(str.strip, line.split(".")):
            if piece and len(tokens := [*encode(piece + "."), 0]) <= length:
                long_enough.append(tokens)
    rows: list[list[int]] = [[]]
    for tokens in sorted(long_enough, key=lambda tokens: -len(tokens)):
        if len(rows[-1]) + len(tokens) > length:
            rows.append([])
        rows[-1] = rows[-1] + tokens
    return [row + [1] * (length - len(row)) for row in rows]


def contiguous_by_hand(text: list[str], encode: Callable[[str], list[int]], context: int) -> list[list[int]]:
    tokens = [0]
    for line in text:
        tokens += encode(line + "\n")
    return [tokens[start : start + context + 1] for start in range(0, len(tokens) - 1, context)]


def one(tokenizer: Any) -> Callable[[str], list[int]]:
    return lambda text: tokenizer.encode(text).ids  # type: ignore[no-any-return]


def rows_of(data: WikiText2Data) -> list[list[int]]:
    return [row for (batch,) in data.val_dataloader() for row in batch.tolist()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([" an actor . "], ["an actor."]),
        ([" = A title = "], ["= A title =."]),
        (["..."], []),
        (["", " ", " . . "], []),
        (["and so on ... he said"], ["and so on.", "he said."]),
        (["3.5 is", " One . Two . ", "ends here. "], ["3.", "5 is.", "One.", "Two.", "ends here."]),
    ],
)
def test_every_part_between_full_stops_ends_with_one(text: list[str], expected: list[str]) -> None:
    assert list(pieces(text)) == expected


@pytest.mark.real_data
@needs_wikitext2
@pytest.mark.slow
def test_the_published_packing_gives_its_number_of_rows(tmp_path: Path) -> None:
    corpus = open_corpus(Path(os.environ[ROOT]))
    if "<unk>" not in "".join(corpus.read()["validation"]):
        pytest.skip("the published numbers are of the tokens version of WikiText-2")
    splits = cached_tokens(corpus, 40_479, "packed", 128, tmp_path).splits
    assert (len(splits["train"].tokens), len(splits["validation"].tokens)) == (21_730, 2_377)


def test_sentences_of_two_tokens_up_to_a_full_row_are_kept() -> None:
    rows = packed(["a.", "abcdef", "abcdefg."], letters, context=7)
    assert [row[row > 1].tolist() for row in rows] == letters(["abcdef.", "a."])


def test_sentences_are_packed_longest_first_and_stably() -> None:
    rows = packed(["ab.", "cd.", "abcd.", "x."], letters, context=8)
    a, b, c, d, x, stop = map(ord, "abcdx.")
    assert rows.tolist() == [
        [a, b, c, d, stop, 0, 1, 1, 1],
        [a, b, stop, 0, c, d, stop, 0, 1],
        [x, stop, 0, 1, 1, 1, 1, 1, 1],
    ]


@pytest.mark.parametrize("context", [15, 40, 255])
def test_packed_rows_are_those_of_the_definition(context: int, tmp_path: Path) -> None:
    corpus = open_corpus(write_corpus(tmp_path / "text"))
    tokenizer, splits = cached_tokens(corpus, 300, "packed", context, tmp_path)
    text = corpus.read()
    for split, found in splits.items():
        assert found.tokens.tolist() == packed_by_hand(text[split], one(tokenizer), context + 1), split


def test_contiguous_tokens_are_those_of_the_definition(tmp_path: Path) -> None:
    data = WikiText2Data(300, 7, "contiguous", 4, root=str(write_corpus(tmp_path / "text")), cache=str(tmp_path))
    data.setup("fit")
    text = open_corpus(tmp_path / "text").read()["validation"]
    assert rows_of(data) == contiguous_by_hand(text, one(data.tokens.tokenizer), 7)


def test_contiguous_tokens_decode_to_the_text() -> None:
    text = lines(2, seed=0)
    stream = contiguous(text, letters)
    assert "".join(map(chr, stream[1:])) == "\n".join(text) + "\n" and stream[0] == 0


@pytest.mark.parametrize("protocol", ["packed", "contiguous"])
def test_words_and_bytes_are_those_of_the_file(protocol: Protocol) -> None:
    text = [" ", " Öhm ate  <unk> . ", "two words"]
    sizes = split_tokens(text, letters, protocol, 9)[1:]
    assert sizes == (4 + 2 + 3, len("\n".join(text).encode()) + 1, 1)


@pytest.mark.parametrize("fraction", [0.05, 0.4, 0.9])
def test_a_run_of_lines_is_consecutive_and_has_about_its_fraction_of_the_bytes(fraction: float) -> None:
    text = [f"{number} {line}" for number, line in enumerate(lines(20, seed=0))]
    sizes = [len(line.encode()) + 1 for line in text]
    places = set()
    for seed in range(20):
        run = run_of_lines(text, fraction, seed)
        first = int(run[0].split()[0])
        places.add(first)
        assert list(run) == text[first : first + len(run)] and run == run_of_lines(text, fraction, seed)
        assert abs(sum(sizes[first : first + len(run)]) - fraction * sum(sizes)) <= max(sizes)
        assert set(run) <= set(run_of_lines(text, min(1.0, fraction + 0.1), seed))
        assert list(run_of_lines(text, 1.0, seed)) == text
    assert len(places) > 2 and max(places) > 0


@pytest.mark.parametrize("protocol", ["packed", "contiguous"])
def test_a_fraction_trains_on_fewer_rows_and_is_described(protocol: Protocol, tmp_path: Path) -> None:
    def data(**options: Any) -> WikiText2Data:
        module = WikiText2Data(300, 15, protocol, 4, root=root, cache=str(tmp_path), **options)
        module.setup("fit")
        return module

    root = str(write_corpus(tmp_path / "text"))
    complete, half = data(), data(train_fraction=0.5)
    described, expected = half.description(), complete.description()
    assert expected.keys().isdisjoint({"train_fraction", "fraction_seed"})
    assert data(train_fraction=1.0, fraction_seed=3).description() == expected
    assert (described.pop("train_fraction"), described.pop("fraction_seed")) == (0.5, 0)
    trained, all_trained = described["splits"].pop("train"), expected["splits"].pop("train")
    for name in ("rows", "predicted_tokens", "words", "utf8_bytes"):
        assert 0.4 < trained[name] / all_trained[name] < 0.6
    described.pop("corpus"), expected.pop("corpus")  # it counts unknown words
    assert described == expected
    assert rows_of(half) == rows_of(complete)
    rows = [row for (batch,) in half.train_dataloader() for row in batch.tolist()]
    assert trained["rows"] - 4 < len(rows) <= trained["rows"]
    other = data(train_fraction=0.5, fraction_seed=1, seed=43)
    assert sorted(rows) != sorted(row for (batch,) in other.train_dataloader() for row in batch.tolist())


@pytest.mark.parametrize("protocol", ["packed", "contiguous"])
def test_a_fraction_of_less_than_one_batch_is_refused(protocol: Protocol, tmp_path: Path) -> None:
    root = str(write_corpus(tmp_path / "text"))
    data = WikiText2Data(300, 15, protocol, 64, root=root, cache=str(tmp_path), train_fraction=0.1)
    with pytest.raises(ValueError, match=r"train_fraction 0.1 leaves \d+ rows, too few for one batch of 64: raise"):
        data.setup("fit")


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_a_fraction_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="train_fraction must be above 0 and at most 1"):
        WikiText2Data(train_fraction=fraction)


@pytest.mark.real_data
@needs_wikitext2
@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["packed", "contiguous"])
def test_the_real_validation_text_gives_the_rows_of_the_definition(protocol: Protocol, tmp_path: Path) -> None:
    root = os.environ[ROOT]
    by_hand, context = (packed_by_hand, 256) if protocol == "packed" else (contiguous_by_hand, 255)
    data = WikiText2Data(2048, 255, protocol, 1, root=root, cache=str(tmp_path))
    data.setup("fit")
    text = open_corpus(Path(root)).read()["validation"]
    expected = by_hand(text, one(data.tokens.tokenizer), context)
    assert rows_of(data) == expected
    assert np.mean([len(row) for row in expected]) > 250


@pytest.mark.real_data
@needs_wikitext2
def test_the_real_validation_text_has_its_known_number_of_words() -> None:
    """Papers that count ends of lines report 217,646 words.

    The raw version and the one of tokens have the same words.
    """
    text = open_corpus(Path(os.environ[ROOT])).read()["validation"]
    assert split_tokens(text, letters, "contiguous", 255).words == 217_646
