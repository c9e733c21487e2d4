"""Define a small task with everything that two passes can get wrong.

It has a convolution, BatchNorm and dropout. The module also fits it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ars2 import ARS2Neo, Muon
from datamodules.batches import TensorBatches
from modules.metrics import Metrics
from modules.two_pass import TwoPassModule

# Every optimizer of the suite, as configs name them: (class, options).
OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}),
    "muon": (Muon, {"lr": 1e-2}),
    "base": (ARS2Neo, {"lr": 1e-2, "mode": "base"}),
    "sync": (ARS2Neo, {"lr": 1e-2, "mode": "sync"}),
    "aga": (ARS2Neo, {"lr": 1e-2, "mode": "aga", "k": 4, "phi_lambda": 1.0}),
    "periodic": (ARS2Neo, {"lr": 1e-2, "mode": "periodic", "k": 3}),
    "random": (ARS2Neo, {"lr": 1e-2, "mode": "random", "probability": 0.4}),
    "late": (ARS2Neo, {"lr": 1e-2, "mode": "late", "late_start": 0.5, "total_steps": 12}),
    "momentum": (ARS2Neo, {"lr": 1e-2, "mode": "momentum", "rho": -0.2}),
}
TWO_PASS = ("sync", "aga", "periodic", "random", "late")
# One of every kind, where only the kind matters: torch's, one pass, always two, and two at some steps.
CORE = ("adamw", "muon", "sync", "aga")
EXAMPLES, BATCH = 22, 4


def make_optimizer(name: str, **options: Any) -> Callable[[Any], Optimizer]:
    cls, defaults = OPTIMIZERS[name]
    return lambda params: cls(params, **{**defaults, **options})


class SmallNetwork(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.dropout(F.relu(self.norm(self.convolution(images))))
        logits: Tensor = self.head(hidden.flatten(1))
        return logits


class SmallTask(TwoPassModule):
    def __init__(self, dropout: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        torch.manual_seed(0)
        self.network = SmallNetwork(dropout)
        self.set_metrics({})
        self.losses: list[float] = []

    def compute_loss(self, batch: tuple[Tensor, Tensor], metrics: Metrics | None) -> Tensor:
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss


def data() -> tuple[Tensor, Tensor]:
    """Return images (22, 2, 4, 4) and classes (22,)."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(EXAMPLES, 2, 4, 4, generator=generator)
    return images, torch.randint(0, 3, (EXAMPLES,), generator=generator)


def batches() -> TensorBatches:
    """Return six batches an epoch, the last of two images."""
    return TensorBatches(data(), BATCH, seed=5)


def fit(module: TwoPassModule, epochs: int = 2, folder: Path | None = None, **options: Any) -> L.Trainer:
    ckpt_path = options.pop("ckpt_path", None)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=options.pop("enable_checkpointing", False),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    torch.manual_seed(7)  # of dropout
    trainer.fit(module, batches(), ckpt_path=ckpt_path)
    return trainer


def state_of(module: TwoPassModule) -> dict[str, Tensor]:
    """Return parameters, BatchNorm statistics and optimizer state, by name."""
    tensors = {name: value.detach().clone() for name, value in module.network.state_dict().items()}
    optimizer = module.optimizers().optimizer  # type: ignore[union-attr]
    for name, param in module.network.named_parameters():
        for key, value in optimizer.state[param].items():
            tensors[f"{name}.{key}"] = value.clone() if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def assert_equal_states(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name
