"""Write a small corpus in the format of WikiText-2, and find the real one."""

import os
import random
from pathlib import Path

import pytest

ROOT = "ARS2_WIKITEXT2_ROOT"
FILES = {"train": "wiki.train.tokens", "validation": "wiki.valid.tokens", "test": "wiki.test.tokens"}
SUBJECTS = ("the lobster", "a red claw", "Dr. Öhm", "each small town", "the third game", "<unk> Raven", "an old song")
VERBS = ("eats", "is near", "was built before", "plays", "does not follow", "sings to")
# More than 258 tokens, every byte and two special ones, and less than BPE can reach on this text.
VOCABULARY = 320
# Of the command line, for a model that trains in no time.
SMALL_TEXT = (
    *("--data.vocabulary", "320", "--data.context", "16", "--data.batch_size", "8", "--data.val_batch_size", "8"),
    *("--model.vocabulary", "320", "--model.context", "16", "--model.width", "16", "--model.layers", "1"),
    *("--model.heads", "2", "--model.key_value_heads", "2", "--model.head_dim", "8", "--model.mlp_width", "16"),
    *("--model.sample_tokens", "4"),
)

needs_wikitext2 = pytest.mark.skipif(
    not os.environ.get(ROOT), reason=f"{ROOT} does not name a folder with the files of WikiText-2"
)


def lines(articles: int, seed: int) -> list[str]:
    """Return headings, paragraphs and lines of a single blank, as in the real files.

    Paragraphs have one to five sentences.
    """
    dice = random.Random(seed)
    text = []
    for number in range(articles):
        text += [" ", f" = Article {number} = ", " "]
        for _ in range(3):
            sentences = [
                f"{dice.choice(SUBJECTS)} {dice.choice(VERBS)} {dice.choice(SUBJECTS)} in {dice.randint(1, 3000)} ."
                for _ in range(dice.randint(1, 5))
            ]
            text.append(f" {' '.join(sentences)} ")
    return text


def write_corpus(folder: Path, articles: int = 20) -> Path:
    """Write the three files; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, name) in enumerate(FILES.items()):
        text = lines(articles if split == "train" else 5, seed)
        (folder / name).write_text("\n".join(text) + "\n", encoding="utf-8")
    return folder
