"""Splitting a batch into chunks does not change the step."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ars2 import ARS2Neo, chunks
from ars2.chunks import Chunk, sums_of, with_sums
from ars2.distributed import Local
from benchmarks.optimizer_step import peak_bytes


def chunk_of(*tensors: Tensor) -> Chunk:
    params = list(tensors)
    state = {"exp_avg": [p + 2 for p in params], "remainder": [None for _ in params]}
    return Chunk({}, params, [p + 1 for p in params], state, [0.0 for _ in params], params)  # type: ignore[arg-type]


def vectors(*numels: int, device: str = "cpu") -> Chunk:
    return chunk_of(*(torch.zeros(numel, device=device) for numel in numels))


def sizes(chunk: Chunk) -> list[list[list[int]]]:
    return [[[p.numel() for p in part.params] for part in parts] for parts in chunk.split()]


def test_chunks_are_neighbours_that_fit_or_parts_of_large_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_CHUNK_NUMEL", 10)
    full = vectors(4, 6, 1, 24, 3, 3)
    assert sizes(full) == [[[4, 6]], [[1]], [[10], [10], [4]], [[3, 3]]]
    assert [[part.first for part in parts] for parts in full.split()] == [[0], [2], [3, 3, 3], [4]]
    small = [part for parts in full.split() for part in parts if len(parts) == 1]
    for index in range(6):
        if index != 3:
            (found,) = [part for part in small if part.first <= index < part.first + len(part.params)]
            assert found.grads[index - found.first] is full.grads[index]
            assert found.state["exp_avg"][index - found.first] is full.state["exp_avg"][index]


def test_chunks_are_larger_on_other_devices_than_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_CHUNK_NUMEL", 10)
    assert sizes(vectors(8, 8, 8, device="meta")) == [[[8, 8, 8]]]
    monkeypatch.setattr(chunks, "_CHUNK_NUMEL_ELSEWHERE", 16)
    assert sizes(vectors(8, 8, 8, device="meta")) == [[[8, 8]], [[8]]]
    assert sizes(vectors(20, device="meta")) == [[[16], [4]]]


def test_a_large_tensor_is_split_into_consecutive_flat_views(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_CHUNK_NUMEL", 10)
    param = torch.arange(24.0).view(4, 6)
    (parts,) = chunk_of(param).split()
    assert [part.params[0].numel() for part in parts] == [10, 10, 4]
    for added, views in enumerate(
        zip(*((part.params[0], part.grads[0], part.state["exp_avg"][0]) for part in parts), strict=True)
    ):
        assert torch.equal(torch.cat(views), torch.arange(24.0) + added)
    assert [part.state["remainder"] for part in parts] == [[None]] * 3
    parts[1].params[0].zero_()
    assert not param.view(-1)[10:20].any() and param.view(-1)[20:].all()


def test_small_and_strided_tensors_are_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_CHUNK_NUMEL", 10)
    for tensor in (torch.zeros(10), torch.zeros(6, 4).mT):
        ((part,),) = chunk_of(tensor).split()
        assert part.params[0] is tensor


def test_a_step_with_a_large_tensor_needs_one_copy_of_it_and_chunks() -> None:
    large, chunk_bytes = 40 * chunks._CHUNK_NUMEL, 4 * chunks._CHUNK_NUMEL
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


def test_a_chunk_without_parameters_has_no_parts() -> None:
    assert sizes(vectors()) == []


def test_matrix_chunks_group_matrices_of_one_shape_or_its_transpose(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [torch.zeros(shape) for shape in ((2, 3), (5, 5), (3, 2), (4, 5), (2, 1, 3), (2, 3))]
    full = chunk_of(*params)
    assert list(full.split_matrices(flatten=True)) == [full]
    monkeypatch.setattr(chunks, "_MATRIX_CHUNK_NUMEL", 12)
    parts = list(full.split_matrices(flatten=True))
    assert [[tuple(p.shape) for p in part.params] for part in parts] == [
        *([(5, 5)], [(4, 5)], [(2, 3), (3, 2)], [(2, 1, 3), (2, 3)]),
    ]
    assert [part.first for part in parts] == [0, 1, 2, 4]
    for part in parts:
        for param, grad, exp_avg, source in zip(
            part.params, part.grads, part.state["exp_avg"], part.sources, strict=True
        ):
            index = next(i for i, p in enumerate(params) if p is param)
            assert grad is full.grads[index] and exp_avg is full.state["exp_avg"][index] and source is param


def test_sums_of_chunks_and_of_parts_of_a_tensor_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_CHUNK_NUMEL", 10)
    full = chunk_of(*(torch.arange(float(numel)) for numel in (4, 24, 3)))

    def kernel(chunk: Chunk) -> Tensor:
        return torch.stack([torch.stack([p.sum(), g.sum()]) for p, g in zip(chunk.params, chunk.grads, strict=True)]).T

    expected = kernel(full)
    parts = [part for parts in full.split() for part in parts]
    assert torch.equal(sums_of(parts, kernel, Local()), expected)
    for rounds in (full.split(), [parts]):
        found = list(with_sums(rounds, kernel, Local()))
        assert [chunk.first for chunk, _ in found] == [0, 1, 1, 1, 2]
        assert all(torch.equal(sums, expected[:, chunk.first : chunk.first + 1]) for chunk, sums in found)


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
    monkeypatch.setattr(chunks, "_CHUNK_NUMEL", 48)  # of the largest tensor
    monkeypatch.setattr(chunks, "_MATRIX_CHUNK_NUMEL", 1)
    assert all(torch.equal(a, b) for a, b in zip(full, trained(), strict=True))
