"""Define the metrics of a stage, and save and restore their state."""

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric

from experiment.library_internals import set_updates

# An nn.ModuleDict of a stage's torchmetrics by log name. Type checkers take its values for tensors.
Metrics: TypeAlias = Any


class MeanLoss(Metric):
    """Compute the example-weighted mean loss.

    Unlike torchmetrics.MeanMetric it propagates NaN and never synchronises with the host.
    """

    total: Tensor
    examples: Tensor
    higher_is_better = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("examples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, examples: int) -> None:
        """Add the mean ``loss`` of a number of ``examples``."""
        self.total += loss * examples
        self.examples += examples

    def compute(self) -> Tensor:
        """Return the mean over all examples so far, or NaN without any."""
        return self.total / self.examples


class Perplexity(MeanLoss):
    """Compute ``exp`` of the mean loss over tokens.

    Unlike torchmetrics.text.Perplexity it needs no logits.
    """

    def compute(self) -> Tensor:
        """Return the perplexity per token so far."""
        return super().compute().exp()


class _PerText(MeanLoss):
    """Compute a loss summed over a complete text, for each unit of that text.

    The result is NaN unless all tokens were seen.

    Args:
        tokens: number of tokens in the text.
        units: number of units in the text, words or bytes.
    """

    def __init__(self, tokens: int, units: int) -> None:
        super().__init__()
        self.tokens, self.units = tokens, units

    def nats(self) -> Tensor:
        """Return the summed loss per unit."""
        return torch.where(self.examples == self.tokens, self.total / self.units, torch.nan)


class WordPerplexity(_PerText):
    """Compute the perplexity per word of the text.

    It does not depend on the tokenizer.
    """

    def compute(self) -> Tensor:
        """Return ``exp(total nats / words)``."""
        return self.nats().exp()


class BitsPerByte(_PerText):
    """Compute the bits per byte of the text in UTF-8."""

    def compute(self) -> Tensor:
        """Return ``total nats / ln 2 / bytes``."""
        return self.nats() / math.log(2)


def snapshot(metrics: Iterable[Metric]) -> Callable[[], None]:
    """Save the state of ``metrics``.

    Returns:
        A function that restores it, to be called once.
    """
    saved = [
        (metric, metric.update_count, {name: _copy(value) for name, value in metric.metric_state.items()})
        for metric in metrics
    ]

    def restore() -> None:
        for metric, updates, state in saved:
            for name, value in state.items():
                setattr(metric, name, value)
            set_updates(metric, updates)

    return restore


def _copy(state: list[Tensor] | Tensor) -> list[Tensor] | Tensor:
    # Metrics append tensors to a list and never change them.
    return list(state) if isinstance(state, list) else state.clone()


def metric_state(metric: Metric, shared: bool) -> dict[str, Any]:
    """Return copies, on the host, of the state of ``metric``.

    If ``shared``, the state is reduced over all processes.
    """
    with metric.sync_context(should_sync=shared):
        values = {
            name: [v.detach().cpu().clone() for v in value] if isinstance(value, list) else value.detach().cpu().clone()
            for name, value in metric.metric_state.items()
        }
    return {"values": values, "updates": metric.update_count}


def load_metric_state(metric: Metric, state: dict[str, Any]) -> None:
    """Restore a state returned by :func:`metric_state`."""
    for name, value in state["values"].items():
        moved = [v.to(metric.device) for v in value] if isinstance(value, list) else value.to(metric.device)
        setattr(metric, name, moved)
    set_updates(metric, state["updates"])
