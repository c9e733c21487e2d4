"""Metrics of a stage (training, validation, test), and how their state is saved and restored."""

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric

from experiment.library_internals import set_updates

# A stage's torchmetrics by log name: an nn.ModuleDict, whose values type checkers take for tensors.
Metrics: TypeAlias = Any


class MeanLoss(Metric):
    """Mean over examples that lets NaN through and reads nothing back from the device; torchmetrics' own does both."""

    total: Tensor
    examples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("examples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, examples: int) -> None:
        """Take in the mean ``loss`` of a number of ``examples``."""
        self.total += loss * examples
        self.examples += examples

    def compute(self) -> Tensor:
        """Return the mean over all examples so far, NaN where there are none."""
        return self.total / self.examples


class Perplexity(MeanLoss):
    """``exp`` of the mean loss over tokens, as torchmetrics' own, which wants the logits of all of them."""

    def compute(self) -> Tensor:
        """Return the perplexity per token so far."""
        return super().compute().exp()


class _PerText(MeanLoss):
    """A loss summed over a whole text, per unit of that text; NaN unless all its tokens were seen.

    Args:
        tokens: that the text has.
        units: that the text has, words or bytes.
    """

    def __init__(self, tokens: int, units: int) -> None:
        super().__init__()
        self.tokens, self.units = tokens, units

    def nats(self) -> Tensor:
        """Return the summed loss per unit."""
        return torch.where(self.examples == self.tokens, self.total / self.units, torch.nan)


class WordPerplexity(_PerText):
    """Perplexity per word of the text, which does not depend on how it was cut into tokens."""

    def compute(self) -> Tensor:
        """Return ``exp(total nats / words)``."""
        return self.nats().exp()


class BitsPerByte(_PerText):
    """Bits per byte of the text in UTF-8."""

    def compute(self) -> Tensor:
        """Return ``total nats / ln 2 / bytes``."""
        return self.nats() / math.log(2)


def snapshot(metrics: Iterable[Metric]) -> Callable[[], None]:
    """Keep what ``metrics`` have gathered; calling the result, once, makes them forget what came after."""
    kept = [
        (metric, metric.update_count, {name: _copy(value) for name, value in metric.metric_state.items()})
        for metric in metrics
    ]

    def restore() -> None:
        for metric, updates, state in kept:
            for name, value in state.items():
                setattr(metric, name, value)
            set_updates(metric, updates)

    return restore


def _copy(state: list[Tensor] | Tensor) -> list[Tensor] | Tensor:
    # The tensors of a list are added to it, and never changed.
    return list(state) if isinstance(state, list) else state.clone()


def metric_state(metric: Metric, shared: bool) -> dict[str, Any]:
    """Return copies, on the host, of what ``metric`` has gathered, over all processes if ``shared`` by several."""
    with metric.sync_context(should_sync=shared):
        values = {
            name: [v.detach().cpu().clone() for v in value] if isinstance(value, list) else value.detach().cpu().clone()
            for name, value in metric.metric_state.items()
        }
    return {"values": values, "updates": metric.update_count}


def load_metric_state(metric: Metric, state: dict[str, Any]) -> None:
    """Give ``metric`` what :func:`metric_state` returned of it."""
    for name, value in state["values"].items():
        moved = [v.to(metric.device) for v in value] if isinstance(value, list) else value.to(metric.device)
        setattr(metric, name, moved)
    set_updates(metric, state["updates"])
