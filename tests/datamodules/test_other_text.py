from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from callbacks.forgetting_probe import ForgettingProbe
from datamodules.other_text import OtherText
from datamodules.wikitext2 import WikiText2Data
from tests.callbacks.fits import values_of_a_test
from tests.modules import language


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> WikiText2Data:
    found = language.data(tmp_path_factory.mktemp("other_text"))
    found.prepare_data()
    return found


def other(data: Any, **options: Any) -> OtherText:
    found = OtherText(**options)
    found.trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    found.setup("fit")
    return found


def test_the_rows_are_the_text_of_the_files_in_the_tokens_of_the_run(data: WikiText2Data, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("def f(x):\n    return x\n" * 100)
    (tmp_path / "b.txt").write_text("Öl und Käse\n" * 100)
    found = other(data, files=[str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], characters=3000)
    assert found.rows.shape[1] == data.context + 1
    # Neighbouring rows share a token. The last one may end within a letter.
    stream = [*found.rows[:, :-1].flatten().tolist(), int(found.rows[-1, -1])]
    text = "def f(x):\n    return x\n" * 100 + "Öl und Käse\n" * 100
    decoded = data.tokens.tokenizer.decode(stream).rstrip("\ufffd")
    assert text[:3000].startswith(decoded) and len(decoded) > 2900
    train, validation = ([rows for (rows,) in loader] for loader in (found.train_dataloader(), found.val_dataloader()))
    held_out = torch.arange(len(found.rows)) % 10 == 0
    assert torch.equal(torch.cat(validation), found.rows[held_out])
    assert sorted(torch.cat(train).tolist()) == sorted(found.rows[~held_out].tolist())


def test_a_short_text_and_other_data_are_refused(data: WikiText2Data) -> None:
    with pytest.raises(ValueError, match=r"the other text has \d+ tokens, too few: give OtherText longer files"):
        other(data, characters=50)
    with pytest.raises(ValueError, match="which is not the data of this run"):
        other(None)
    with pytest.raises(ValueError, match="characters must be at least 1, got 0"):
        OtherText(characters=0)


def test_a_language_model_learns_source_code(data: WikiText2Data) -> None:
    probe = ForgettingProbe(OtherText(characters=20_000), steps=20, lr=0.01)
    row = values_of_a_test(language.model(), probe, data)
    assert row["forgetting/new_loss_after"] < row["forgetting/new_loss_before"]
    assert row["forgetting/loss_after"] != row["forgetting/loss_before"]
