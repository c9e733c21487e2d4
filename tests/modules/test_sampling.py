"""Continuations are reproducible and leave no trace in training.

They are drawn from the likeliest tokens.
"""

import torch
from torch import Tensor

from modules.sampling import continuation
from tests.modules.language import model

PROMPT = torch.tensor([[5, 9, 200]], dtype=torch.int32)


def draw(temperature: float = 1.0, top_k: int | None = None, seed: int = 0, length: int = 20) -> list[int]:
    return continuation(model().network, PROMPT, length, 16, temperature, top_k, seed).tolist()


def test_draws_depend_on_the_seed() -> None:
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)


def test_at_temperature_zero_each_token_is_the_likeliest_after_the_context_before_it() -> None:
    network, text = model().network, PROMPT.long()
    for token in draw(temperature=0.0):
        logits = network(input_ids=text[:, -16:]).logits[0, -1]
        assert token == logits.argmax()
        text = torch.cat([text, torch.tensor([[token]])], dim=1)
    assert draw(temperature=0.0, seed=1) == draw(temperature=0.0, seed=2)


def test_a_low_temperature_comes_near_to_the_likeliest() -> None:
    assert draw(temperature=1e-4) == draw(temperature=0.0) != draw(temperature=10.0)


def test_only_the_likeliest_are_drawn() -> None:
    top_k = 3
    logits = model().network(input_ids=PROMPT.long()).logits[0, -1]
    drawn = {draw(temperature=50.0, top_k=top_k, seed=seed, length=1)[0] for seed in range(30)}
    assert drawn == set(logits.topk(top_k).indices.tolist())


def test_tokens_are_drawn_with_the_probabilities_of_the_softmax() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, input_ids: Tensor, **_: object) -> object:
            logits = torch.tensor([2.0, 0.0, -1.0]).expand(1, 1, 3)
            return type("Output", (), {"logits": logits})()

    drawn = continuation(Fixed(), torch.tensor([[0]]), 4000, 8, 2.0, None, seed=3)
    expected = (torch.tensor([2.0, 0.0, -1.0]) / 2).softmax(0)
    torch.testing.assert_close(drawn.bincount() / 4000, expected, rtol=0, atol=0.03)


def test_training_mode_and_random_state_are_unchanged() -> None:
    network = model().network.train()
    state = torch.get_rng_state()
    continuation(network, PROMPT, 3, 16, 1.0, 5, seed=0)
    assert network.training and torch.equal(torch.get_rng_state(), state)
