"""Compare the network with a plain causal transformer.

The plain one computes every position under a causal mask.
"""

import math

import pytest
import torch

from modules.grokking_transformer import GrokkingTransformer


def every_position(network: GrokkingTransformer, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of all positions (batch, context, vocabulary).

    Each position attends to itself and those before it.
    """
    stream = network.token_embedding.weight[tokens] + network.position_embedding.weight
    query, key, value = (torch.einsum("btd,hed->bhte", stream, w) for w in (network.query, network.key, network.value))
    scores = torch.einsum("bhse,bhte->bhst", query, key) / math.sqrt(query.shape[-1])
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    mixed = torch.einsum("bhst,bhte->bshe", weights, value).flatten(2)
    stream = stream + mixed @ network.attention_output.weight.T
    hidden = (stream @ network.mlp_in.weight.T + network.mlp_in.bias).relu()
    stream = stream + hidden @ network.mlp_out.weight.T + network.mlp_out.bias
    return stream @ network.unembedding.weight.T


def test_logits_and_gradients_equal_those_of_the_plain_transformer() -> None:
    torch.manual_seed(0)
    network = GrokkingTransformer(12, width=16, heads=4, mlp_width=24).double()
    torch.nn.init.normal_(network.mlp_in.bias)
    tokens, answers = torch.randint(0, 12, (20, 3)), torch.randint(0, 12, (20,))
    logits, expected = network(tokens), every_position(network, tokens)[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    params = list(network.parameters())
    gradients = [
        torch.autograd.grad(torch.nn.functional.cross_entropy(output, answers), params) for output in (logits, expected)
    ]
    for actual, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-10, atol=1e-13)


def test_parameters_are_those_of_the_published_model() -> None:
    network = GrokkingTransformer(114)
    shapes = {name: tuple(param.shape) for name, param in network.named_parameters()}
    assert shapes == {
        "query": (4, 32, 128),
        "key": (4, 32, 128),
        "value": (4, 32, 128),
        "token_embedding.weight": (114, 128),
        "position_embedding.weight": (3, 128),
        "attention_output.weight": (128, 128),
        "mlp_in.weight": (512, 128),
        "mlp_in.bias": (512,),
        "mlp_out.weight": (128, 512),
        "mlp_out.bias": (128,),
        "unembedding.weight": (114, 128),
    }
    assert network.get_output_embeddings() is network.unembedding


def test_initialisation_is_normal_with_the_published_deviations() -> None:
    torch.manual_seed(0)
    network = GrokkingTransformer(1000, width=256, heads=4, mlp_width=512)
    for name, param in network.named_parameters():
        if param.ndim == 1:
            assert torch.equal(param, torch.zeros_like(param))
            continue
        expected = 1 / math.sqrt(1000 if name == "unembedding.weight" else 256)
        # Five standard errors of a sample deviation, and of a sample mean.
        assert abs(param.std().item() / expected - 1) < 5 / math.sqrt(2 * param.numel()), name
        assert abs(param.mean().item()) < 5 * expected / math.sqrt(param.numel()), name


def test_heads_that_do_not_divide_the_width_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="heads=3 and width=16"):
        GrokkingTransformer(12, width=16, heads=3)
