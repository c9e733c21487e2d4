"""A loader is refused, resumed exactly, or resumed with a warning."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from callbacks.last_checkpoint import LastCheckpoint
from callbacks.loader_checks import LoaderChecks
from callbacks.training_state import RandomStates
from datamodules.batches import DatasetBatches
from modules.two_pass import TwoPassModule
from tests.callbacks.fits import adamw, fit
from tests.helpers.launching import become, launch

EXAMPLES = torch.randn(24, 3, generator=torch.Generator().manual_seed(0)), torch.arange(24)
DATASET = TensorDataset(*EXAMPLES)
BATCHES = [DATASET[start : start + 4] for start in range(0, 24, 4)]


class Seen(TwoPassModule):
    """Record the numbers of the examples that it is trained on."""

    def __init__(self) -> None:
        super().__init__(optimizer=adamw)
        torch.manual_seed(0)
        self.network = nn.Linear(3, 1)
        self.set_metrics({})
        self.batches: list[list[int]] = []

    def compute_loss(self, batch: Any, metrics: Any) -> Tensor:
        if metrics is self.train_metrics:
            self.batches.append(batch[1].tolist())
        return self.network(batch[0]).square().mean()


class Data(L.LightningDataModule):
    def __init__(self, loader: Any, val: Any = None) -> None:
        super().__init__()
        self.loader, self.val = loader, val or DataLoader(DATASET, 8)

    def train_dataloader(self) -> Any:
        return self.loader

    def val_dataloader(self) -> Any:
        return self.val


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(DATASET)


class Once:
    """Give batches in the first epoch only."""

    def __init__(self) -> None:
        self.batches = iter(BATCHES)

    def __iter__(self) -> Iterator[Any]:
        return self.batches


class Stateful:
    """Give batches in another order in each epoch, and resume."""

    def __init__(self) -> None:
        self.epoch, self.done, self.resumes = -1, 6, False

    def __iter__(self) -> Iterator[Any]:
        if not self.resumes:
            self.epoch, self.done = self.epoch + 1, 0
        self.resumes = False
        order = torch.randperm(6, generator=torch.Generator().manual_seed(self.epoch))
        while self.done < 6:
            self.done += 1
            yield BATCHES[order[self.done - 1]]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.done, self.resumes = state["epoch"], state["done"], True


class Sized(Stateful):
    def __len__(self) -> int:
        return 6


REFUSED = {
    "generator": (lambda: (batch for batch in BATCHES), "returned a generator, which ends after one epoch"),
    "dataset": (lambda: DATASET, r"returned a dataset.* DataLoader\(TensorDataset"),
    "list of batches": (lambda: BATCHES, "returned a list of tensors.* batch_size=None"),
    "dictionary": (lambda: {"x": EXAMPLES[0]}, "returned a dict of tensors"),
}


@pytest.mark.parametrize("loader", REFUSED)
def test_what_is_no_loader_is_refused(loader: str) -> None:
    make, message = REFUSED[loader]
    with pytest.raises(ValueError, match=rf"^Data.train_dataloader\(\) {message}"):
        fit(Seen(), Data(make()), [LoaderChecks()], None, 2)


def test_a_generator_is_refused_for_validation_too() -> None:
    with pytest.raises(ValueError, match=r"^Data.val_dataloader\(\) returned a generator"):
        fit(Seen(), Data(DataLoader(DATASET, 4), (batch for batch in BATCHES)), [LoaderChecks()], None, 2)


def test_a_list_of_batches_in_a_loader_is_accepted() -> None:
    model = Seen()
    fit(model, Data(DataLoader(BATCHES, batch_size=None)), [LoaderChecks()], None, 1)
    assert model.batches == [batch[1].tolist() for batch in BATCHES]


@pytest.mark.parametrize(
    ("loader", "message"),
    [(Once(), "epoch 2 had no batches"), (DataLoader(TensorDataset(EXAMPLES[0][:0])), "has no batches")],
)
def test_an_epoch_without_batches_is_an_error(loader: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(Seen(), Data(loader), [LoaderChecks()], None, 3)


def resume(loaders: list[Any], folder: Path, steps: int = 9) -> tuple[list[list[int]], list[list[int]]]:
    """Return the batches of epoch 2 of a complete and of a resumed run."""

    def run(loader: Any, **options: Any) -> Seen:
        model = Seen()
        torch.manual_seed(1)
        callbacks = [LoaderChecks(), RandomStates(), LastCheckpoint(dirpath=str(folder))]
        fit(model, Data(loader), callbacks, None, 2, enable_checkpointing=True, **options)
        return model

    complete, stopped = run(loaders[0]), run(loaders[1], max_steps=steps)
    resumed = run(loaders[2], ckpt_path=str(folder / "last.ckpt"))
    return complete.batches[6:], [*stopped.batches[6:], *resumed.batches]


@pytest.mark.parametrize("make", [Sized, lambda: DatasetBatches(DATASET, 4, seed=0)], ids=["own", "DatasetBatches"])
def test_a_loader_with_its_state_is_resumed_exactly(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    complete, resumed = resume([make(), make(), make()], tmp_path)
    assert resumed == complete and len(complete) == 6
    assert "resumed" not in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_loader_is_resumed_exactly_between_epochs(workers: int, tmp_path: Path) -> None:
    loaders = [DataLoader(DATASET, 4, shuffle=True, num_workers=workers) for _ in range(3)]
    complete, resumed = resume(loaders, tmp_path, steps=6)
    assert resumed == complete and len(complete) == 6


@pytest.mark.parametrize(
    ("make", "batches", "change"),
    [
        (lambda: DataLoader(DATASET, 4, shuffle=True), 6, "some examples come twice and others not at all; use Tensor"),
        (lambda: DataLoader(Stream(), 4), 9, "it starts anew, so that the batches before the stop come twice; use"),
        (Stateful, 5, "one batch is left out"),
    ],
    ids=["DataLoader", "IterableDataset", "no length"],
)
def test_a_loader_that_cannot_resume_exactly_says_so(
    make: Any, batches: int, change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    complete, resumed = resume([make(), make(), make()], tmp_path)
    assert resumed != complete and len(resumed) == batches
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "resumed" in line]
    assert line.startswith("epoch 2 is not resumed exactly: ") and change in line


@pytest.mark.parametrize(("processes", "refused"), [(2, True), (4, False)])
def test_only_processes_that_share_the_data_need_other_batches(
    processes: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two replicas of two processes each, under tensor parallelism, get two batches.
    monkeypatch.setattr("callbacks.loader_checks.gather_per_rank", lambda trainer, value: [value] * trainer.world_size)
    trainer: Any = SimpleNamespace(
        world_size=processes,
        distributed_sampler_kwargs={"num_replicas": 2, "rank": 0},
        datamodule=Data(None),
    )
    with pytest.raises(ValueError, match="all 2 processes got the same") if refused else nullcontext():
        LoaderChecks().on_train_batch_start(trainer, Seen(), BATCHES[0], 0)


def shared(rank: int, ranks: int, port: int, folder: Path) -> None:
    """Train on a share of a DataLoader, and then fail on a stream without shares."""
    become(rank, ranks, port)
    model, options = Seen(), {"devices": ranks, "strategy": "ddp", "num_sanity_val_steps": 0}
    fit(model, Data(DataLoader(DATASET, 4, shuffle=True)), [LoaderChecks()], None, 1, **options)
    with pytest.raises(ValueError, match=r"all 2 processes got the same first batch from Data.train_dataloader\(\)"):
        fit(Seen(), Data(DataLoader(Stream(), 4)), [LoaderChecks()], None, 1, **options)
    torch.save(model.batches, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_share_a_data_loader_and_refuse_to_repeat_each_others_batches(tmp_path: Path) -> None:
    parts = launch(shared, 2, tmp_path / "two")
    assert [len(batch) for part in parts for batch in part] == [4] * 6
    assert sorted(number for part in parts for batch in part for number in batch) == list(range(24))
