import pytest

from experiment.quantities import count, duration, quantity


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.0421, "0.042 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (125, "2 min 5 s"),
        (3599.7, "1 h"),
        (3629, "1 h"),
        (12000, "3 h 20 min"),
        (187200, "2 d 4 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0 epochs"), (1, "1 epoch"), (2000, "2,000 epochs")])
def test_counts(number: int, text: str) -> None:
    assert count(number, "epoch") == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 FLOP"),
        (12.5, "12.5 FLOP"),
        (999.6, "1 kFLOP"),
        (5.1749e12, "5.17 TFLOP"),
        (1.2e6, "1.2 MFLOP"),
        (999_999, "1 MFLOP"),
        (3e23, "3e+05 EFLOP"),
        (float("nan"), "-"),
    ],
)
def test_quantities(number: float, text: str) -> None:
    assert quantity(number, "FLOP") == text


@pytest.mark.parametrize(("number", "text"), [(5.17e12, "5.17 TFLOP"), (2e10, "0.02 TFLOP"), (float("nan"), "-")])
def test_a_column_has_one_prefix(number: float, text: str) -> None:
    assert quantity(number, "FLOP", largest=5.17e12) == text
