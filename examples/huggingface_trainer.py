"""Fine-tune a text classifier with ARS2-Neo in the Trainer of transformers.

    python examples/huggingface_trainer.py sync

The argument is the mode: base, sync or aga. Nothing is downloaded: a small BERT with random weights learns whether
generated reviews praise more than they blame.
"""

import random
import sys
import tempfile
from typing import Any

from transformers import BertConfig, BertForSequenceClassification, EvalPrediction, TrainingArguments

from ars2 import ARS2Neo
from ars2.transformers import TwoPassTrainer

PRAISE, BLAME = ["great", "lovely", "moving"], ["dull", "awful", "clumsy"]
WORDS = [*PRAISE, *BLAME, "the", "plot", "cast", "music", "was", "but"]


def reviews(number: int, seed: int) -> list[dict[str, Any]]:
    """Return reviews of six words as token numbers, with their labels."""
    rng = random.Random(seed)
    examples: list[dict[str, Any]] = []
    while len(examples) < number:
        words = rng.choices(WORDS, k=6)
        balance = sum((word in PRAISE) - (word in BLAME) for word in words)
        if balance:
            examples.append({"input_ids": [WORDS.index(word) for word in words], "labels": int(balance > 0)})
    return examples


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    logits: Any = prediction.predictions
    return {"accuracy": (logits.argmax(-1) == prediction.label_ids).mean()}


def train(mode: str, **options: Any) -> dict[str, float]:
    """Return the metrics on other reviews; the options are those of TrainingArguments."""
    sizes: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    # The optimizer takes learning rate and weight decay from here, and Trainer makes the schedule.
    settings: Any = {"learning_rate": 1e-2, "weight_decay": 0.1, "warmup_steps": 10, "save_strategy": "no"}
    settings |= {"per_device_train_batch_size": 32, "logging_steps": 20, "report_to": [], **options}
    with tempfile.TemporaryDirectory() as folder:
        trainer = TwoPassTrainer(
            model_init=lambda: BertForSequenceClassification(BertConfig(vocab_size=len(WORDS), **sizes)),
            args=TrainingArguments(folder, **settings),
            train_dataset=reviews(2000, seed=0),
            eval_dataset=reviews(500, seed=1),
            compute_metrics=accuracy,
            optimizer_cls_and_kwargs=(ARS2Neo, {"mode": mode, "rho": 0.01, "adjust_lr_fn": "match_rms_adamw"}),
        )
        trainer.train()
        return trainer.evaluate()


if __name__ == "__main__":
    print(f"accuracy: {train(*sys.argv[1:])['eval_accuracy']:.3f}")
