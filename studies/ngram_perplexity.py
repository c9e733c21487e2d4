"""Compute the validation perplexity of n-gram counts.

    ARS2_WIKITEXT2_ROOT=<folder> python -m studies.ngram_perplexity [--protocol packed] [--context 128]

A unigram model with one added to every count, and a bigram model smoothed by Witten and Bell's method (Witten and Bell,
"The zero-frequency problem", IEEE Transactions on Information Theory 37(4), 1991), both counted on the training rows.
"""

import argparse
import math
import os
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from datamodules.token_rows import PAD
from datamodules.wikitext2 import ROOT, WikiText2Data


def pairs(batches: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
    """Return context tokens and targets, each (tokens,), without pairs across rows."""
    rows = [rows for (rows,) in batches]
    return (
        torch.cat([part[:, :-1].flatten().long() for part in rows]),
        torch.cat([part[:, 1:].flatten().long() for part in rows]),
    )


def unigram(vocabulary: int, targets: Tensor, at: Tensor) -> Tensor:
    """Return add-one unigram probabilities (tokens,) of ``at``."""
    counts = torch.bincount(targets, minlength=vocabulary).double() + 1
    probabilities: Tensor = counts / counts.sum()
    return probabilities[at]


def bigram(vocabulary: int, train: tuple[Tensor, Tensor], at: tuple[Tensor, Tensor]) -> Tensor:
    """Return bigram probabilities (tokens,) with unigram back-off.

    With c the count of a pair, n that of its first token and d the number of different tokens seen after it:
    ``(c + d * unigram) / (n + d)``.
    """
    seen, followed = train
    pair, count = (seen * vocabulary + followed).unique(return_counts=True)
    wanted = at[0] * vocabulary + at[1]
    place = torch.searchsorted(pair, wanted).clamp_max(len(pair) - 1)
    found = torch.where(pair[place] == wanted, count[place], 0).double()
    total = torch.bincount(seen, minlength=vocabulary).double()[at[0]]
    different = torch.bincount(pair // vocabulary, minlength=vocabulary).double()[at[0]]
    fallback = unigram(vocabulary, followed, at[1])
    return torch.where(total > 0, (found + different * fallback) / (total + different), fallback)


def perplexity(probabilities: Tensor) -> float:
    """Return the exponential of the mean negative logarithm."""
    return math.exp(-probabilities.log().mean().item())


def main() -> int:
    """Count and print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=40_479)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--protocol", choices=("packed", "contiguous"), default="packed")
    options = parser.parse_args()
    data = WikiText2Data(options.vocabulary, options.context, options.protocol, 16, root=os.environ.get(ROOT))
    data.prepare_data()
    data.setup("fit")
    train, validation = pairs(data.train_dataloader()), pairs(data.val_dataloader())
    print(f"{data.description()['corpus']}, {data.source}; {options.protocol}, vocabulary {options.vocabulary:,}")
    print(f"{len(train[1]):,} tokens to count, {len(validation[1]):,} to predict, context {options.context}")
    print(f"padding {(validation[1] == PAD).double().mean():.1%} of the tokens to predict")
    print(f"unigram perplexity {perplexity(unigram(options.vocabulary, train[1], validation[1])):9.1f}")
    print(f"bigram perplexity  {perplexity(bigram(options.vocabulary, train, validation)):9.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
