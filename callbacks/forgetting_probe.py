"""Measure how much a tested network forgets when it is trained on other data."""

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from time import perf_counter
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from callbacks.module_protocol import TrainedModule, trained
from callbacks.probed_loss import ProbedLoss, unchanged
from callbacks.robustness_probe import check_single_device, first_test_batches


class ForgettingProbe(L.Callback):
    """Train a tested network on other data, and measure what it forgets.

    The parameters and BatchNorm's statistics are restored bit for bit afterwards, so that training and the test are not
    affected. The network is trained by AdamW at a fixed learning rate, in training mode, in the precision of the
    parameters. The values are logged beside those of the test. They are mean losses in evaluation mode before and after
    the training:

    - ``forgetting/loss_before``, ``forgetting/loss_after``: on the first test batches. The difference is what the
      network has forgotten;
    - ``forgetting/new_loss_before``, ``forgetting/new_loss_after``: on the first batches of the other data's
      validation. The difference is what it has learned;
    - ``forgetting/probe_seconds``: the duration.

    Args:
        other_data: a data module, whose batches have the form of the run's. Its attribute ``trainer`` is set, so that
            it can read the run's data module, as :class:`datamodules.other_text.OtherText` and
            :class:`datamodules.other_classes.OtherClasses` do. Batches are moved to the device as those of the test.
        steps: number of updates.
        lr, weight_decay: of AdamW.
        batches: number of batches in every evaluation.
        seed: of random numbers in the training, as in dropout.

    Raises:
        ValueError: a number out of range, several devices, or an epoch of the other data without batches.
    """

    changes_training = False

    def __init__(
        self,
        other_data: L.LightningDataModule,
        steps: int = 100,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        batches: int = 40,
        seed: int = 0,
    ) -> None:
        for name, value in (("steps", steps), ("batches", batches)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be above 0, got {lr}")
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
        self.other_data, self.steps, self.batches, self.seed = other_data, steps, batches, seed
        self.lr, self.weight_decay = lr, weight_decay

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Prepare the other data, so that an error comes before training."""
        check_single_device(trainer, "ForgettingProbe")
        if stage not in ("fit", "test"):
            return
        self.other_data.trainer = trainer
        with isolate_rng():
            self.other_data.prepare_data()
            self.other_data.setup("fit")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log_dict(self.probe(trainer, pl_module), batch_size=1)

    # Lightning tests in inference mode, whose tensors have no gradients.
    @torch.inference_mode(False)
    @torch.no_grad()
    def probe(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        """Return the measurements by log key."""
        begin, module = perf_counter(), trained(trainer, pl_module)
        row = {}
        with unchanged(module):
            torch.manual_seed(self.seed)
            new = [trainer.strategy.batch_to_device(b) for b in islice(self.other_data.val_dataloader(), self.batches)]
            losses = {"loss": first_test_batches(trainer, self.batches), "new_loss": new}
            for when in ("before", "after"):
                if when == "after":
                    pl_module.train()
                    try:
                        self._train(trainer, module)
                    finally:
                        pl_module.eval()
                for name, batches in losses.items():
                    row[f"forgetting/{name}_{when}"] = ProbedLoss(trainer, module, batches, self.seed).here()
        return row | {"forgetting/probe_seconds": perf_counter() - begin}

    @torch.enable_grad()
    def _train(self, trainer: L.Trainer, module: TrainedModule) -> None:
        params = [param for param in module.network.parameters() if param.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=self.lr, weight_decay=self.weight_decay)
        for batch in islice(endless(self.other_data.train_dataloader()), self.steps):
            optimizer.zero_grad()
            module.compute_loss(trainer.strategy.batch_to_device(batch), None).backward()
            optimizer.step()


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches of one epoch after another.

    Raises:
        ValueError: an epoch has no batches.
    """
    while True:
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise ValueError("the other data of ForgettingProbe has no batches to train on: give it more")
