"""Splitting a batch into chunks does not change the step."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ars2 import ARS2Neo, batch
from ars2.batch import Batch
from benchmarks.optimizer_step import peak_bytes


def batch_of(*numels: int, device: str = "cpu") -> Batch:
    params = [torch.zeros(numel, device=device) for numel in numels]
    return Batch(params, [p + 1 for p in params], [{"exp_avg": p} for p in params], params)


def test_chunks_are_neighbours_that_fit_or_single_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_CHUNK_NUMEL", 10)
    full = batch_of(4, 6, 1, 20, 3, 3)
    chunks = list(full.chunks())
    assert [[p.numel() for p in chunk.params] for chunk in chunks] == [[4, 6], [1], [20], [3, 3]]
    for field in range(4):
        joined = [item for chunk in chunks for item in chunk[field]]
        assert all(a is b for a, b in zip(joined, full[field], strict=True))


def test_chunks_are_larger_on_other_devices_than_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_CHUNK_NUMEL", 10)
    assert [len(chunk.params) for chunk in batch_of(8, 8, 8, device="meta").chunks()] == [3]
    monkeypatch.setattr(batch, "_CHUNK_NUMEL_ELSEWHERE", 16)
    assert [len(chunk.params) for chunk in batch_of(8, 8, 8, device="meta").chunks()] == [2, 1]
    assert [chunk.params[0].numel() for chunk in batch_of(20, device="meta").flat_chunks()] == [16, 4]


def test_a_large_tensor_is_split_into_consecutive_flat_views(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_FLAT_CHUNK_NUMEL", 10)
    param = torch.arange(24.0).view(4, 6)
    full = Batch([param], [param + 1], [{"exp_avg": param + 2, "shear": param + 3}], [param])
    chunks = list(full.flat_chunks())
    assert [chunk.params[0].numel() for chunk in chunks] == [10, 10, 4]
    for added, views in enumerate(
        zip(*((*p.params, *p.grads, *p.state("exp_avg"), *p.state("shear")) for p in chunks), strict=True)
    ):
        assert torch.equal(torch.cat(views), torch.arange(24.0) + added)
    chunks[1].params[0].zero_()
    assert not param.view(-1)[10:20].any() and param.view(-1)[20:].all()


def test_small_and_several_and_strided_tensors_are_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_FLAT_CHUNK_NUMEL", 10)
    strided = torch.zeros(6, 4).mT
    for full in (
        *(batch_of(10), batch_of(20, 20)),
        Batch([strided], [strided], [{"exp_avg": strided}], [strided]),
    ):
        (chunk,) = full.flat_chunks()
        assert all(a is b for a, b in zip(chunk.params, full.params, strict=True))


def test_a_step_with_a_large_tensor_needs_one_copy_of_it_and_chunks() -> None:
    large, chunk_bytes = 40 * batch._FLAT_CHUNK_NUMEL, 4 * batch._FLAT_CHUNK_NUMEL
    param = nn.Parameter(torch.ones(large))
    optimizer = ARS2Neo([{"params": [param], "track": "vector"}], mode="periodic", k=2)

    def peak_of(call: Callable[[], object]) -> int:
        param.grad = torch.ones(large)
        return peak_bytes(call)

    def second_pass() -> None:
        assert optimizer.wants_second_pass()
        optimizer.perturb()
        param.grad = torch.ones(large)
        optimizer.restore()

    def step_without_a_second_pass() -> None:
        assert not optimizer.wants_second_pass()
        optimizer.step()

    # The backup and the second gradient, which the passes make. Measured beside them: no flat chunk; two; one.
    assert 2 * 4 * large <= peak_of(second_pass) <= 2 * 4 * large + 1.1 * chunk_bytes
    assert peak_bytes(optimizer.step) <= 2.1 * chunk_bytes
    assert peak_of(step_without_a_second_pass) <= 1.1 * chunk_bytes


def test_an_empty_batch_has_no_chunks() -> None:
    assert list(batch_of().chunks()) == []


def test_matrix_chunks_group_matrices_of_one_shape_or_its_transpose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = [torch.zeros(shape) for shape in ((2, 3), (5, 5), (3, 2), (4, 5), (2, 1, 3), (2, 3))]
    full = Batch(params, [p + 1 for p in params], [{"exp_avg": p} for p in params], params)
    (unsorted,) = full.matrix_chunks(flatten=True)
    assert all(a is b for a, b in zip(unsorted.params, params, strict=True))
    monkeypatch.setattr(batch, "_MATRIX_CHUNK_NUMEL", 12)
    chunks = list(full.matrix_chunks(flatten=True))
    assert [[tuple(p.shape) for p in chunk.params] for chunk in chunks] == [
        *([(5, 5)], [(4, 5)], [(2, 3), (3, 2)], [(2, 1, 3), (2, 3)]),
    ]
    for chunk in chunks:
        for param, grad, state, source in zip(*chunk[:4], strict=True):
            index = next(i for i, p in enumerate(params) if p is param)
            assert grad is full.grads[index] and state is full.states[index] and source is full.sources[index]


@pytest.mark.parametrize("mode", ["sync", "aga", "periodic"])
def test_a_chunked_step_equals_an_unchunked_one_to_the_bit(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> list[Tensor]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
        inputs, k = torch.randn(16, 6), {"sync": 0, "aga": 3, "periodic": 2}[mode]
        groups = [{"params": [p for p in network.parameters() if p.ndim == n], "track": t} for n, t in
                  ((2, "matrix"), (1, "vector"))]  # fmt: skip
        optimizer = ARS2Neo(groups, lr=1e-2, mode=mode, k=k)  # type: ignore[arg-type]

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = network(inputs).square().mean()
            loss.backward()
            return loss

        for _ in range(6):
            optimizer.step(closure)
        return [p.detach() for p in network.parameters()] + [s for p in optimizer.state.values() for s in p.values()]

    full = trained()
    monkeypatch.setattr(batch, "_CHUNK_NUMEL", 1)
    monkeypatch.setattr(batch, "_MATRIX_CHUNK_NUMEL", 1)
    assert all(torch.equal(a, b) for a, b in zip(full, trained(), strict=True))
