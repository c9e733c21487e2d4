"""The example of transformers' Trainer learns with one pass a step and with two."""

import pytest

from examples.huggingface_trainer import train


@pytest.mark.parametrize("mode", ["base", "sync"])
def test_the_classifier_learns_with_one_pass_and_with_two(mode: str) -> None:
    metrics = train(mode, use_cpu=True, num_train_epochs=2, disable_tqdm=True)
    assert metrics["eval_accuracy"] > 0.9
