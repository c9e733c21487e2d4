"""A scaler skips a step in which either pass overflows, without a trace."""

import pytest
import torch

from tests.ars2.training import assert_identical, setup, snapshot


@pytest.mark.parametrize("mode", ["base", "sync", "aga", "periodic"])
@pytest.mark.parametrize("in_pass", [1, 2])
def test_a_step_that_overflows_in_one_pass_is_as_if_it_had_not_been(mode: str, in_pass: int) -> None:
    (model, optimizer), (other, other_optimizer) = setup(mode), setup(mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    # With a period of 3, step 3 is a two-pass step; shear forces exist since step 0.
    overflows, skipped = {0, 3, 4, 6}, 0
    for step in range(8):
        optimizer.zero_grad()
        before = snapshot(optimizer)
        overflowed = False
        for number in optimizer.passes(model):
            overflow = step in overflows and number == in_pass
            overflowed |= overflow
            scaler.scale(model.loss(step) * (torch.inf if overflow else 1.0)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        if overflowed:
            after = snapshot(optimizer)
            assert_identical({**after, "grads": None}, {**before, "grads": None})
            skipped += 1
            continue
        other_optimizer.zero_grad()
        for _ in other_optimizer.passes(other):
            other.loss(step).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        other_optimizer.step()
    assert scaler.get_scale() == 2.0 ** (8 - skipped)
    assert skipped > 0 or (mode, in_pass) == ("base", 2)
    after, expected = snapshot(optimizer), snapshot(other_optimizer)
    assert_identical({**after, "grads": None}, {**expected, "grads": None})
