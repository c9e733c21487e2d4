"""Batches have a fixed order, cover the data, and can be resumed."""

import itertools
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch

from datamodules.batches import DatasetBatches, TensorBatches, device_of


def epoch(loader: TensorBatches) -> list[list[int]]:
    return [batch[0].tolist() for batch in loader]


def loader(seed: int | None = 3, examples: int = 10, batch_size: int = 4) -> TensorBatches:
    numbers = torch.arange(examples)
    return TensorBatches((numbers, 2 * numbers), batch_size, seed)


def test_every_epoch_has_every_example_once_and_the_last_short_batch() -> None:
    batches = loader()
    for _ in range(3):
        seen = epoch(batches)
        assert [len(batch) for batch in seen] == [4, 4, 2] and len(batches) == 3
        assert sorted(itertools.chain.from_iterable(seen)) == list(range(10))


def test_tensors_stay_together() -> None:
    assert all(torch.equal(2 * first, second) for first, second in loader())


def test_order_depends_on_seed_and_epoch_and_not_on_the_global_generator() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = loader(), loader(), loader(seed=4)
    epochs = [epoch(first) for _ in range(3)]
    assert epochs == [epoch(again) for _ in range(3)]
    assert len({str(e) for e in [*epochs, epoch(other)]}) == 4
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_seed_the_order_is_the_given_one_in_every_epoch() -> None:
    batches = loader(seed=None)
    assert epoch(batches) == epoch(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("done", range(7))
def test_resuming_after_any_batch_gives_the_rest_of_the_uninterrupted_order(done: int) -> None:
    uninterrupted = loader()
    expected = [batch for _ in range(3) for batch in epoch(uninterrupted)]
    stopped = loader()
    seen = []
    while len(seen) < done:
        for batch in stopped:
            seen.append(batch[0].tolist())
            if len(seen) == done:
                break
    resumed = loader()
    if done:
        resumed.load_state_dict(stopped.state_dict())
    while len(seen) < len(expected):
        seen += epoch(resumed)
    assert seen == expected


def test_an_epoch_that_was_cut_short_is_followed_by_the_next_one() -> None:
    uninterrupted, cut = loader(), loader()
    second = (epoch(uninterrupted), epoch(uninterrupted))[1]
    next(iter(cut))
    assert epoch(cut) == second


def test_an_announced_epoch_begins_and_only_a_resumed_one_starts_in_the_middle() -> None:
    uninterrupted, resumed = loader(), loader()
    epochs = [epoch(uninterrupted) for _ in range(4)]
    resumed.batch_sampler.sampler.set_epoch(2)
    assert epoch(resumed) == epochs[2]
    for announced, rest in ((1, epochs[1][2:]), (3, epochs[3])):
        resumed.load_state_dict({"epoch": 1, "done": 2})
        resumed.set_epoch(announced)
        assert epoch(resumed) == rest


def test_an_iterator_that_was_made_and_never_used_costs_no_epoch() -> None:
    uninterrupted, peeked = loader(), loader()
    iter(peeked)
    assert epoch(peeked) == epoch(uninterrupted)


@pytest.mark.parametrize(("examples", "batch_size", "named"), [(10, 0, "batch_size"), (0, 4, "no examples")])
def test_sizes_that_cannot_be_batched_are_refused(examples: int, batch_size: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        loader(examples=examples, batch_size=batch_size)


def test_a_last_short_batch_can_be_left_out_of_every_epoch() -> None:
    batches = TensorBatches((torch.arange(10),), 4, seed=3, drop_last=True)
    epochs = [epoch(batches) for _ in range(20)]
    assert all([len(batch) for batch in seen] == [4, 4] for seen in epochs) and len(batches) == 2
    assert {number for seen in epochs for batch in seen for number in batch} == set(range(10))


def test_leaving_out_the_only_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="3 examples, too few for one batch of 4"):
        TensorBatches((torch.arange(3),), 4, seed=None, drop_last=True)


@pytest.mark.parametrize(("examples", "ranks"), [(22, 2), (22, 3), (22, 4), (21, 4), (4, 4)])
def test_processes_share_every_batch_and_leave_no_example_out(
    examples: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = (torch.arange(examples),)
    alone = [batch.tolist() for (batch,) in TensorBatches(data, 5, seed=3)]
    shares, weights = [], []
    for rank in range(ranks):
        monkeypatch.setattr("datamodules.batches.world", lambda rank=rank: (rank, ranks))
        loader = TensorBatches(data, 5, seed=3)
        shares.append([batch.tolist() for (batch,) in loader])
        weights.append([loader.share_weight for _ in loader])
        assert len(shares[-1]) == len(loader)
    together = [[*itertools.chain(*parts)] for parts in zip(*shares, strict=True)]
    if len(alone[-1]) < ranks:
        alone[-2:] = [alone[-2] + alone[-1]]
    assert together == alone
    for parts in zip(*shares, strict=True):
        lengths = [len(part) for part in parts]
        assert min(lengths) >= 1 and max(lengths) - min(lengths) <= 1
    for part, weight in zip(itertools.chain(*shares), itertools.chain(*weights), strict=True):
        (full_batch,) = (batch for batch in together if set(part) <= set(batch))
        assert weight == pytest.approx(len(part) * ranks / len(full_batch))


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.batches.world", lambda: (0, 4))
    with pytest.raises(ValueError, match="a batch of 3 cannot be shared among 4 processes"):
        len(TensorBatches((torch.arange(10),), 3, seed=0))


@pytest.mark.parametrize(("examples", "batch_size"), [(10, 3), (9, 4), (2, 5)])
def test_in_the_given_order_a_share_may_be_empty_and_every_example_comes_once(
    examples: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = (torch.arange(examples),)
    shares = []
    for rank in range(4):
        monkeypatch.setattr("datamodules.batches.world", lambda rank=rank: (rank, 4))
        shares.append([batch.tolist() for (batch,) in TensorBatches(data, batch_size, seed=None)])
    together = [[*itertools.chain(*parts)] for parts in zip(*shares, strict=True)]
    assert together == [batch.tolist() for batch in data[0].split(batch_size)]
    assert [] in shares[3]


def test_a_loader_that_is_not_shared_gives_every_process_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.batches.world", lambda: (3, 4))
    loader = TensorBatches((torch.arange(5),), 3, seed=None, shared=False)
    assert [batch.tolist() for (batch,) in loader] == [[0, 1, 2], [3, 4]]


def test_tensors_of_a_device_are_indexed_there_in_the_order_of_the_host() -> None:
    """On the meta device an index from the host would be an error.

    The same holds for tensors of a GPU under torch.compile.
    """
    there = TensorBatches((torch.arange(10, device="meta"),), 4, seed=0)
    assert [batch.device.type for (batch,) in there] == ["meta"] * 3


@pytest.mark.parametrize(("on_device", "expected"), [(True, "meta"), (False, "cpu")])
def test_data_is_on_the_training_device_only_if_requested(on_device: bool, expected: str) -> None:
    data = L.LightningDataModule()
    assert device_of(data, on_device).type == "cpu"  # without a trainer
    strategy = SimpleNamespace(root_device=torch.device("meta"))
    data.trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
    assert device_of(data, on_device).type == expected


@pytest.mark.parametrize(("seed", "done"), [(3, 0), (3, 2), (None, 1)])
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_a_dataset_are_those_of_its_tensors(seed: int | None, done: int, workers: int) -> None:
    numbers = torch.arange(10)
    loaders = TensorBatches((numbers,), 4, seed), DatasetBatches(numbers, 4, seed, num_workers=workers)
    generator = torch.get_rng_state()
    for loader in loaders:
        loader.load_state_dict({"epoch": 1, "done": done})
    expected, found = iter(loaders[0]), iter(loaders[1])
    for (batch,) in expected:
        assert torch.equal(batch, next(found))
        assert loaders[1].state_dict() == loaders[0].state_dict()  # however far the worker has read ahead
    assert next(found, None) is None
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("seed", [3, None])
def test_processes_share_the_batches_of_a_dataset_and_none_is_empty(
    seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares, weights = [], []
    for rank in range(4):
        monkeypatch.setattr("datamodules.batches.world", lambda rank=rank: (rank, 4))
        loader = DatasetBatches(torch.arange(22), 5, seed)
        shares.append([batch.tolist() for batch in loader])
        weights.append([loader.share_weight for _ in loader])
    assert sorted(number for part in shares for batch in part for number in batch) == list(range(22))
    assert min(len(batch) for part in shares for batch in part) == 1
    assert [sum(parts) for parts in zip(*weights, strict=True)] == pytest.approx([4.0] * 4)
