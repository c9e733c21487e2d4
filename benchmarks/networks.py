"""The networks that the benchmarks measure, built from their libraries, with a batch and a loss for each.

grokking    the transformer of configs/grok_*.yaml, batch 512
resnet18    torchvision's ResNet-18 with the CIFAR stem (3x3, stride 1, no max-pool), 10 classes, batch 256
qwen3       transformers' Qwen3, 3 layers of width 512, vocabulary 40,479, tied embeddings, batch 8 of 255 tokens
gpt2        GPT-2 small, for its shapes alone
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TASKS = ("grokking", "resnet18", "qwen3")
NETWORKS = (*TASKS, "gpt2")


def build(name: str) -> nn.Module:
    """Return the network ``name``, newly initialised on the default device.

    Raises:
        ValueError: an unknown name.
    """
    if name == "grokking":
        from modules.grokking_transformer import GrokkingTransformer

        return GrokkingTransformer(114)
    if name == "resnet18":
        from torchvision.models import resnet18

        network = resnet18(num_classes=10)
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        network.maxpool = nn.Identity()
        return network
    if name == "qwen3":
        from transformers import Qwen3Config, Qwen3ForCausalLM

        return Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=40_479,
                hidden_size=512,
                intermediate_size=2048,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=4,
                head_dim=128,
                tie_word_embeddings=True,
            )
        )
    if name == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        return GPT2LMHeadModel(GPT2Config())
    raise ValueError(f"unknown network {name!r}: it must be one of {', '.join(NETWORKS)}")


def loss_function(name: str, network: nn.Module) -> Callable[[], Tensor]:
    """Return a function of no arguments that makes one forward pass on a fixed random batch and returns the loss."""
    generator = torch.Generator().manual_seed(0)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    if name == "grokking":
        tokens, answers = integers(113, 512, 3), integers(113, 512)
        return lambda: F.cross_entropy(network(tokens), answers)
    if name == "resnet18":
        images, labels = torch.randn(256, 3, 32, 32, generator=generator), integers(10, 256)
        return lambda: F.cross_entropy(network(images), labels)
    tokens = integers(40_479, 8, 256)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()
    return lambda: F.cross_entropy(network(inputs).logits.flatten(0, 1), targets)
