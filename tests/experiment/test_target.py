"""A target has any metric name and any number, and else is refused."""

import pytest

from experiment.target import Target


@pytest.mark.parametrize(
    ("text", "metric", "level", "lower"),
    [
        ("val/accuracy >= .9", "val/accuracy", 0.9, False),
        ("val/acc@5>=0.5", "val/acc@5", 0.5, False),
        ("val_acc5 >= 1", "val_acc5", 1.0, False),
        ("val/f1(macro) >= +5e-1", "val/f1(macro)", 0.5, False),
        (" val/loss < -1.5E+2 ", "val/loss", -150.0, True),
    ],
)
def test_a_target_is_read(text: str, metric: str, level: float, lower: bool) -> None:
    assert Target.parse(text) == Target(text.strip(), metric, level, lower)


@pytest.mark.parametrize(
    "text", ["val/loss <= 0.2", "val/loss > 1", "val/loss < nan", "val/loss < inf", "val loss < 1", "< 1", "val/loss <"]
)
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"a target is a metric, >= or <, and a number, such as .*; got '{text}'"):
        Target.parse(text)
