"""The loop of the example learns with one pass a step and with two."""

import pytest

from examples.plain_loop import train


@pytest.mark.parametrize(("mode", "evaluations"), [("base", 60), ("sync", 120)])
def test_the_loop_learns_with_one_pass_and_with_two(
    mode: str, evaluations: int, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = train(steps=60, mode=mode, rho=0.05)
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert f"gradient evaluations: {evaluations} in 60 steps" in capsys.readouterr().out
