"""Each validation writes a sample, and training is unchanged."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger

from callbacks.cost_counters import CostCounters
from callbacks.run_summary import RunSummary
from callbacks.text_samples import TextSamples
from tests.callbacks.fits import rows
from tests.modules.language import data, model, trainer
from tests.modules.small_task import assert_equal_states, state_of


class TextLogger(CSVLogger):
    """Accept text, as the logger of Weights & Biases does."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), name="", version="run")
        self.texts: list[list[Any]] = []

    def log_text(self, key: str, columns: list[str], data: list[list[Any]]) -> None:
        assert key == "val/sample" and columns == ["epoch", "text"]
        self.texts += data


def fit(folder: Path, *callbacks: Any, logger: Logger | bool = False, **options: Any) -> Any:
    module = model("sync")
    trainer(max_epochs=2, callbacks=list(callbacks), logger=logger, **options).fit(module, data(folder))
    return module


def test_each_validation_leaves_one_sample_that_begins_with_the_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = TextLogger(tmp_path)
    fit(tmp_path, TextSamples(), logger=logger, num_sanity_val_steps=1)
    text = (tmp_path / "run/samples.txt").read_text()
    assert text.startswith("--- epoch 1, step ") and text.count("--- epoch") == 2
    assert [epoch for epoch, _ in logger.texts] == [1, 2]
    assert all(sample.startswith("<|endoftext|>") and sample in text for _, sample in logger.texts)
    assert capsys.readouterr().out.count("epoch 2, step") == 1


@pytest.mark.slow
def test_sampling_changes_no_weight(tmp_path: Path) -> None:
    assert_equal_states(state_of(fit(tmp_path, TextSamples())), state_of(fit(tmp_path)))


def test_costs_count_tokens_and_the_summary_names_corpus_and_protocol(tmp_path: Path) -> None:
    import json

    fit(tmp_path, CostCounters(), RunSummary(), logger=CSVLogger(str(tmp_path), name="", version="run"))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    described = summary["data"]
    assert described["protocol"] == "contiguous" and "tokens version" in described["corpus"]
    tokens = 2 * described["splits"]["train"]["rows"] * 16
    assert summary["costs"]["tokens"] == tokens and "examples" not in summary["costs"]
    assert rows(tmp_path / "run", "cost/tokens")[-1]["cost/tokens"] == tokens
    assert "contiguous" in (tmp_path / "run/hparams.yaml").read_text()
    # Lower is better for all of them.
    for name in ("loss", "perplexity", "word_perplexity", "bits_per_byte"):
        assert summary["metrics"][f"val/{name}"]["best_epoch"] == 2
