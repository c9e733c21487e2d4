"""A checkpoint is not evaluated on its own training examples, and does not train on with others."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as L
import pytest

from datamodules.cifar10 import CIFAR10Data
from datamodules.modular_addition import ModularAdditionData
from datamodules.saved_split import check_same_split
from datamodules.wikitext2 import WikiText2Data
from tests.helpers.commands import ADAMW, TINY, call, fit


def test_options_that_differ_are_named_with_what_to_set() -> None:
    message = "trained with data.seed 1, which chooses other training examples than 2: set --data.seed 1"
    with pytest.raises(ValueError, match=message):
        check_same_split({"seed": 1, "more": 3}, {"seed": 2})
    with pytest.raises(ValueError, match=r"data.train_examples null, .* than 5: set --data.train_examples null"):
        check_same_split({"train_examples": None}, {"train_examples": 5})
    check_same_split({"seed": 1, "more": 3}, {"seed": 1})
    check_same_split({}, {"seed": 1})  # of an older version


def refused(data: L.LightningDataModule, stage: str, saved: dict[str, Any]) -> bool:
    """Return whether a trainer in this stage refuses data for a checkpoint."""
    data.trainer = L.Trainer(logger=False, enable_checkpointing=False)
    data.trainer.state.fn = stage  # type: ignore[assignment]
    try:
        data.load_state_dict(saved)
    except ValueError as error:
        assert str(error).startswith("the checkpoint was trained with data.")
        return True
    return False


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_split_of_another_seed_is_refused_where_it_matters(stage: str) -> None:
    for options in ({"p": 7, "seed": 1}, {"p": 7, "train_fraction": 0.5}, {"p": 11}):
        saved = ModularAdditionData(**options).state_dict()  # type: ignore[arg-type]
        assert refused(ModularAdditionData(p=7), stage, saved) == (stage != "predict")
        assert not refused(ModularAdditionData(**options), stage, saved)  # type: ignore[arg-type]

    held_out = {"validation": "holdout", "holdout_examples": 10}
    for changed in ({"seed": 1}, {"holdout_examples": 20}, {"validation": "test"}):
        saved = CIFAR10Data(**held_out | changed).state_dict()  # type: ignore[arg-type]
        assert refused(CIFAR10Data(**held_out), stage, saved) == (stage in ("fit", "validate"))  # type: ignore[arg-type]
    saved = CIFAR10Data(**held_out, train_examples=20).state_dict()  # type: ignore[arg-type]
    assert refused(CIFAR10Data(**held_out), stage, saved) == (stage == "fit")  # type: ignore[arg-type]
    saved = CIFAR10Data(seed=1).state_dict()  # the official test images are not in any split
    assert refused(CIFAR10Data(), stage, saved) == (stage == "fit")
    saved = CIFAR10Data(holdout_examples=20).state_dict()  # nothing is held out
    assert not refused(CIFAR10Data(), stage, saved)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_text_trains_on_with_the_same_part_only(stage: str) -> None:
    own = {"corpus_sha256": "a", "tokenizer_sha256": "b"}
    with patch.object(WikiText2Data, "description", return_value=own):
        half = {"train_fraction": 0.5, "fraction_seed": 0}
        for changed in ({"train_fraction": 1.0}, {"fraction_seed": 1}):
            saved = own | half | changed
            assert refused(WikiText2Data(**half), stage, saved) == (stage == "fit")  # type: ignore[arg-type]
            assert not refused(WikiText2Data(**half | changed), stage, saved)  # type: ignore[arg-type]
        assert refused(WikiText2Data(), stage, own | half) == (stage == "fit")
        # The complete text has no place.
        assert not refused(WikiText2Data(fraction_seed=1), stage, own | half | {"train_fraction": 1.0})


def test_validation_with_another_seed_is_one_sentence(tmp_path: Path) -> None:
    folder = fit(tmp_path, *ADAMW, *TINY)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    given = (*ADAMW, *TINY, "--runs", tmp_path, "--ckpt_path", checkpoint)
    result = call("validate", *given, "--data.seed", 9)
    assert result.code == 1
    assert "the checkpoint was trained with data.seed 42, which chooses other training examples than 9" in result.error
    assert call("validate", *given).code == 0
