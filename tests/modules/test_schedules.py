import pytest
import torch

from modules.schedules import WarmupDecay


def factors(steps: int, **options: object) -> list[float]:
    """Return the factor at each step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = WarmupDecay(optimizer, **options)  # type: ignore[arg-type]
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        schedule.step()
    return found


def test_the_rate_rises_to_its_value_and_falls_linearly_to_the_end() -> None:
    expected = [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert factors(9, total=7, warmup=3) == pytest.approx(expected, abs=1e-12)


def test_a_cosine_is_half_way_in_the_middle_and_ends_at_the_final_factor() -> None:
    found = factors(6, total=4, decay="cosine", final=0.2)
    assert found == pytest.approx([1.0, 0.2 + 0.8 * (1 + 0.5**0.5) / 2, 0.6, 0.2 + 0.8 * (1 - 0.5**0.5) / 2, 0.2, 0.2])


def test_without_decay_the_rate_stays() -> None:
    assert factors(4, total=3, warmup=1, decay="none") == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("options", [{"warmup": 4}, {"warmup": -1}, {"decay": "step"}, {"final": 1.5}])
def test_a_wrong_option_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must"):
        factors(1, total=4, **options)
