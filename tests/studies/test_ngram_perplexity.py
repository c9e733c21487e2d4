"""Compare the n-gram references with counting by hand."""

import math

import pytest
import torch

from studies.ngram_perplexity import bigram, pairs, perplexity, unigram

VOCABULARY = 5
TEXT = torch.tensor([[0, 1, 2, 1, 2, 3, 0, 1, 3, 1]])


def test_rows_become_pairs_of_a_token_and_its_next_without_crossing_rows() -> None:
    seen, followed = pairs([(torch.tensor([[0, 1, 2], [3, 4, 0]]),)])
    assert seen.tolist() == [0, 1, 3, 4] and followed.tolist() == [1, 2, 4, 0]


def test_bigram_probabilities_are_those_of_the_formula_counted_by_hand() -> None:
    seen, followed = pairs([(TEXT,)])
    predicted = torch.arange(VOCABULARY)
    for first in range(VOCABULARY):
        after = [b for a, b in zip(TEXT[0].tolist(), TEXT[0, 1:].tolist(), strict=False) if a == first]
        for token, probability in enumerate(
            bigram(VOCABULARY, (seen, followed), (torch.full_like(predicted, first), predicted))
        ):
            base = (followed.tolist().count(token) + 1) / (len(followed) + VOCABULARY)
            different = len(set(after))
            expected = (after.count(token) + different * base) / (len(after) + different) if after else base
            assert probability.item() == pytest.approx(expected, rel=1e-12)


def test_probabilities_of_all_tokens_sum_to_one_after_any_token() -> None:
    train, tokens = pairs([(TEXT,)]), torch.arange(VOCABULARY)
    assert unigram(VOCABULARY, train[1], tokens).sum().item() == pytest.approx(1)
    for first in range(VOCABULARY):
        total = bigram(VOCABULARY, train, (torch.full_like(tokens, first), tokens)).sum().item()
        assert total == pytest.approx(1)


def test_perplexity_of_a_fair_die_is_its_number_of_sides() -> None:
    assert perplexity(torch.full((7,), 1 / 6, dtype=torch.float64)) == pytest.approx(6)
    assert perplexity(torch.tensor([1.0, 1 / math.e**2], dtype=torch.float64)) == pytest.approx(math.e)
