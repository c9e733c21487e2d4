"""The cache is made once and completely, and mapped into memory.

A damaged one is never trusted.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from datamodules.text_corpus import Corpus, open_corpus
from datamodules.token_cache import Tokens, cached_tokens, default_cache
from datamodules.token_rows import Protocol, run_of_lines, split_tokens
from tests.helpers.commands import clean_environment
from tests.helpers.processes import Running
from tests.helpers.text import FILES, write_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return open_corpus(write_corpus(tmp_path / "text"))


def load(
    corpus: Corpus, cache: Path, vocabulary: int = 300, protocol: Protocol = "packed", context: int = 15
) -> Tokens:
    return cached_tokens(corpus, vocabulary, protocol, context, cache)


def unreadable(corpus: Corpus) -> Corpus:
    """Return the same corpus with lines that cannot be read again."""

    def read() -> dict[str, list[str]]:
        raise AssertionError("the text was read although there is a cache")

    return Corpus(corpus.source, corpus.digest, read)


def folders(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


def test_the_second_time_nothing_is_made(corpus: Corpus, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, second = load(corpus, cache), load(unreadable(corpus), cache)
    assert len(folders(cache)) == 1
    for split, made in first.splits.items():
        assert np.array_equal(made.tokens, second.splits[split].tokens) and made[1:] == second.splits[split][1:]
    assert first.tokenizer.to_str() == second.tokenizer.to_str()


def test_tokens_are_mapped_into_memory_and_never_written_back(corpus: Corpus, tmp_path: Path) -> None:
    tokens = load(corpus, tmp_path / "cache").splits["train"].tokens
    assert isinstance(tokens, np.memmap)
    before = tokens[0, 0].item()
    tokens[0, 0] += 1
    assert load(unreadable(corpus), tmp_path / "cache").splits["train"].tokens[0, 0] == before


@pytest.mark.parametrize(
    "other", [{"vocabulary": 301}, {"protocol": "contiguous"}, {"context": 16}], ids=lambda other: next(iter(other))
)
def test_other_options_have_a_separate_cache(other: dict[str, int], corpus: Corpus, tmp_path: Path) -> None:
    load(corpus, tmp_path / "cache")
    load(corpus, tmp_path / "cache", **other)  # type: ignore[arg-type]
    assert len(folders(tmp_path / "cache")) == 2


def test_a_contiguous_stream_serves_every_context(corpus: Corpus, tmp_path: Path) -> None:
    load(corpus, tmp_path / "cache", protocol="contiguous", context=15)
    load(unreadable(corpus), tmp_path / "cache", protocol="contiguous", context=31)


@pytest.mark.parametrize("protocol", ["packed", "contiguous"])
def test_fractions_never_share_a_cache_and_all_lines_are_served_from_the_one_without(
    protocol: Protocol, corpus: Corpus, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    complete = load(corpus, cache, protocol=protocol)

    def encode(texts: Sequence[str]) -> Iterator[list[int]]:
        return (complete.tokenizer.encode(text).ids for text in texts)

    again = cached_tokens(unreadable(corpus), 300, protocol, 15, cache, 1.0, fraction_seed=7)
    assert np.array_equal(again.splits["train"].tokens, complete.splits["train"].tokens)
    for number, (fraction, seed) in enumerate([(0.3, 0), (0.6, 0), (0.3, 1)], start=2):
        found = cached_tokens(corpus, 300, protocol, 15, cache, fraction, seed)
        assert len(folders(cache)) == number
        assert found.tokenizer.to_str() == complete.tokenizer.to_str()
        for split in ("validation", "test"):
            assert np.array_equal(found.splits[split].tokens, complete.splits[split].tokens)
        text = run_of_lines(corpus.read()["train"], fraction, seed)
        expected = split_tokens(text, encode, protocol, 15)
        assert np.array_equal(found.splits["train"].tokens, expected.tokens)
        assert found.splits["train"][1:] == expected[1:]


def test_a_cache_keeps_its_name_over_versions(corpus: Corpus, tmp_path: Path) -> None:
    options = {
        "format": 3,
        "corpus": corpus.digest,
        "tokenizers": tokenizers.__version__,
        "vocabulary": 300,
        "protocol": "packed",
        "context": 15,
    }
    load(corpus, tmp_path / "cache")
    name = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:24]
    assert [folder.name for folder in folders(tmp_path / "cache")] == [name]


def test_a_fraction_without_text_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_fraction 1e-09 leaves no text: raise"):
        cached_tokens(corpus, 300, "packed", 15, tmp_path / "cache", 1e-9)
    assert folders(tmp_path / "cache") == []


def test_a_changed_corpus_is_not_served_from_the_old_cache(tmp_path: Path) -> None:
    old = load(open_corpus(write_corpus(tmp_path / "text")), tmp_path / "cache").splits["train"]
    with (tmp_path / "text" / FILES["train"]).open("a") as file:
        file.write(" something quite new . \n")
    assert load(open_corpus(tmp_path / "text"), tmp_path / "cache").splits["train"].words == old.words + 5


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / "train.npy").read_bytes())
    content[-1] ^= 1
    (folder / "train.npy").write_bytes(content)


def cut_the_tokenizer(folder: Path) -> None:
    content = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(content[: len(content) // 2])


def forget_a_split(folder: Path) -> None:
    (folder / "test.npy").unlink()


def empty_the_description(folder: Path) -> None:
    (folder / "meta.json").write_text("")


def describe_nothing(folder: Path) -> None:
    (folder / "meta.json").write_text(json.dumps({"checksums": {}, "sizes": {}}))


@pytest.mark.parametrize(
    "damage", [flip_a_byte, cut_the_tokenizer, forget_a_split, empty_the_description, describe_nothing]
)
def test_a_damaged_cache_is_made_again(damage: Callable[[Path], None], corpus: Corpus, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    expected = np.array(load(corpus, cache).splits["train"].tokens)
    (folder,) = folders(cache)
    damage(folder)
    with pytest.raises(AssertionError, match="was read"):
        load(unreadable(corpus), cache)
    assert np.array_equal(load(corpus, cache).splits["train"].tokens, expected)
    assert folders(cache) == [folder]
    load(unreadable(corpus), cache)


def test_a_failure_half_way_leaves_no_files(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(OSError, match="full"):
            load(corpus, tmp_path / "cache")
    assert folders(tmp_path / "cache") == []
    load(corpus, tmp_path / "cache")


@pytest.mark.slow
def test_of_two_processes_at_once_one_makes_it_and_both_have_it(tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "text", articles=200)
    code = (
        "import sys; from pathlib import Path\n"
        "from datamodules.text_corpus import open_corpus\n"
        "from datamodules.token_cache import cached_tokens\n"
        "tokens = cached_tokens(open_corpus(Path(sys.argv[1])), 300, 'packed', 15, Path(sys.argv[2]))\n"
        "print('sum', int(tokens.splits['train'].tokens.sum()))\n"
    )
    arguments, environment = ["-c", code, str(text), str(tmp_path / "cache")], clean_environment(tmp_path)
    with Running(arguments, environment) as first, Running(arguments, environment) as second:
        outputs = [process.communicate(120)[0].splitlines() for process in (first, second)]
        assert [process.returncode for process in (first, second)] == [0, 0]
    assert sorted(map(len, outputs)) == [1, 2], "one of the two says that it tokenizes"
    assert outputs[0][-1] == outputs[1][-1] != "sum 0"
    assert len(folders(tmp_path / "cache")) == 1


def test_the_default_place_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "ars2"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache/ars2"


@pytest.mark.parametrize("vocabulary", [257, 5000])
def test_a_vocabulary_that_bpe_cannot_give_is_refused(vocabulary: int, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocabulary .*(at least 258|too small for more than)"):
        load(corpus, tmp_path / "cache", vocabulary=vocabulary)
    assert folders(tmp_path / "cache") == []


@pytest.mark.parametrize("split", FILES)
@pytest.mark.parametrize("content", ["", " \n\n"], ids=["empty", "blank"])
def test_an_empty_split_is_refused_by_name(split: str, content: str, tmp_path: Path) -> None:
    write_corpus(tmp_path / "text")
    (tmp_path / "text" / FILES[split]).write_text(content)
    with pytest.raises(ValueError, match=f"the {split} split .* has no text"):
        load(open_corpus(tmp_path / "text"), tmp_path / "cache")


def test_a_context_below_every_sentence_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no sentence of 2 to 2 tokens"):
        load(corpus, tmp_path / "cache", context=1)
