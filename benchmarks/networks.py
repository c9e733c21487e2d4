"""Build the networks of the benchmarks, with a batch and a loss for each.

grokking    the transformer of configs/grok_*.yaml, batch 512
resnet18    torchvision's ResNet-18 with the CIFAR stem (3x3, stride 1, no max-pool), 10 classes, batch 256
qwen3       transformers' Qwen3, 3 layers of width 512, vocabulary 40,479, tied embeddings, batch 8 of 255 tokens
gpt2        GPT-2 small, for its shapes alone

``small`` makes narrow networks and batches of a few examples of the first three, to rehearse a measurement.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.chunked_cross_entropy import CHUNK_ELEMENTS, chunked_cross_entropy

TASKS = ("grokking", "resnet18", "qwen3")
NETWORKS = (*TASKS, "gpt2")


def build(name: str, small: bool = False) -> nn.Module:
    """Return the network ``name``, newly initialised on the default device.

    Raises:
        ValueError: an unknown name.
    """
    if name == "grokking":
        from modules.grokking_transformer import GrokkingTransformer

        return GrokkingTransformer(114, width=16, mlp_width=32) if small else GrokkingTransformer(114)
    if name == "resnet18" and small:
        from modules.cifar_resnet import CIFARResNet18

        return CIFARResNet18(width=4)
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
                vocab_size=99 if small else 40_479,
                hidden_size=32 if small else 512,
                intermediate_size=64 if small else 2048,
                num_hidden_layers=1 if small else 3,
                num_attention_heads=4,
                num_key_value_heads=4,
                head_dim=8 if small else 128,
                tie_word_embeddings=True,
            )
        )
    if name == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        return GPT2LMHeadModel(GPT2Config())
    raise ValueError(f"unknown network {name!r}: it must be one of {', '.join(NETWORKS)}")


def loss_function(
    name: str, network: nn.Module, small: bool = False, half: bool = False, chunk: int | None = None
) -> Callable[[], Tensor]:
    """Return a function that computes the loss of a fixed random batch.

    Args:
        name, small: of the network, as for :func:`build`.
        network: on the device that the batch goes to.
        half: whether the pass is under bfloat16 autocast.
        chunk: for a language model, the logits that the chunked cross-entropy makes at a time (0 for its default);
            ``None`` takes torch's cross-entropy of all logits.
    """
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(0)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator).to(device)

    def of_images() -> Tensor:
        return F.cross_entropy(network(images), labels)

    def of_answers() -> Tensor:
        return F.cross_entropy(network(tokens), answers)

    def of_text() -> Tensor:
        return F.cross_entropy(network(inputs).logits.flatten(0, 1), targets)

    def of_text_by_chunks() -> Tensor:
        language: Any = network
        mask = {"full_attention": None}  # as in modules/language_model.py
        hidden = language.model(input_ids=inputs, attention_mask=mask, use_cache=False).last_hidden_state
        return chunked_cross_entropy(hidden.flatten(0, 1), language.lm_head.weight, targets, chunk or CHUNK_ELEMENTS)

    if name == "grokking":
        batch = 16 if small else 512
        tokens, answers, loss = integers(113, batch, 3), integers(113, batch), of_answers
    elif name == "resnet18":
        batch = 4 if small else 256
        images = torch.randn(batch, 3, 32, 32, generator=generator).to(device)
        if device.type == "cuda":
            images = images.contiguous(memory_format=torch.channels_last)
        labels, loss = integers(10, batch), of_images
    else:
        rows = integers(99, 2, 17) if small else integers(40_479, 8, 256)
        inputs, targets = rows[:, :-1], rows[:, 1:].flatten()
        loss = of_text if chunk is None else of_text_by_chunks

    def under_autocast() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return loss()

    return under_autocast if half else loss
