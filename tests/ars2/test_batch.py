"""A batch is worked on in parts, which change nothing but where a step finds its numbers."""

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


def test_parts_are_runs_that_fit_or_single_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_CHUNK_NUMEL", 10)
    whole = batch_of(4, 6, 1, 20, 3, 3)
    parts = list(whole.chunks())
    assert [[p.numel() for p in part.params] for part in parts] == [[4, 6], [1], [20], [3, 3]]
    for field in range(4):
        joined = [item for part in parts for item in part[field]]
        assert all(a is b for a, b in zip(joined, whole[field], strict=True))


def test_parts_are_larger_on_a_device_that_is_not_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_CHUNK_NUMEL", 10)
    assert [len(part.params) for part in batch_of(8, 8, 8, device="meta").chunks()] == [3]
    monkeypatch.setattr(batch, "_CHUNK_NUMEL_ELSEWHERE", 16)
    assert [len(part.params) for part in batch_of(8, 8, 8, device="meta").chunks()] == [2, 1]
    assert [piece.params[0].numel() for piece in batch_of(20, device="meta").flat_chunks()] == [16, 4]


def test_a_large_tensor_is_cut_into_flat_views_that_follow_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_FLAT_CHUNK_NUMEL", 10)
    param = torch.arange(24.0).view(4, 6)
    whole = Batch([param], [param + 1], [{"exp_avg": param + 2, "shear": param + 3}], [param])
    pieces = list(whole.flat_chunks())
    assert [piece.params[0].numel() for piece in pieces] == [10, 10, 4]
    for added, views in enumerate(
        zip(*((*p.params, *p.grads, *p.state("exp_avg"), *p.state("shear")) for p in pieces), strict=True)
    ):
        assert torch.equal(torch.cat(views), torch.arange(24.0) + added)
    pieces[1].params[0].zero_()
    assert not param.view(-1)[10:20].any() and param.view(-1)[20:].all()


def test_small_and_several_and_strided_tensors_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_FLAT_CHUNK_NUMEL", 10)
    strided = torch.zeros(6, 4).mT
    for whole in (
        *(batch_of(10), batch_of(20, 20)),
        Batch([strided], [strided], [{"exp_avg": strided}], [strided]),
    ):
        (piece,) = whole.flat_chunks()
        assert all(a is b for a, b in zip(piece.params, whole.params, strict=True))


def test_a_step_with_a_large_tensor_holds_one_copy_of_it_and_pieces() -> None:
    large, piece_bytes = 40 * batch._FLAT_CHUNK_NUMEL, 4 * batch._FLAT_CHUNK_NUMEL
    param = nn.Parameter(torch.ones(large))
    optimizer = ARS2Neo([{"params": [param], "track": "vector"}], mode="periodic", k=2)

    def peak_of(call: Callable[[], object]) -> int:
        param.grad = torch.ones(large)
        return peak_bytes(call)

    def look() -> None:
        assert optimizer.wants_second_pass()
        optimizer.perturb()
        param.grad = torch.ones(large)
        optimizer.restore()

    def step_without_a_look() -> None:
        assert not optimizer.wants_second_pass()
        optimizer.step()

    # The saved parameters, and the second gradient, which the passes make. Measured beside them: no piece; two; one.
    assert 2 * 4 * large <= peak_of(look) <= 2 * 4 * large + 1.1 * piece_bytes
    assert peak_bytes(optimizer.step) <= 2.1 * piece_bytes
    assert peak_of(step_without_a_look) <= 1.1 * piece_bytes


def test_an_empty_batch_has_no_parts() -> None:
    assert list(batch_of().chunks()) == []


def test_matrices_of_one_shape_or_its_transpose_are_neighbours_and_fit_or_are_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = [torch.zeros(shape) for shape in ((2, 3), (5, 5), (3, 2), (4, 5), (2, 1, 3), (2, 3))]
    whole = Batch(params, [p + 1 for p in params], [{"exp_avg": p} for p in params], params)
    (unsorted,) = whole.matrix_chunks(flatten=True)
    assert all(a is b for a, b in zip(unsorted.params, params, strict=True))
    monkeypatch.setattr(batch, "_MATRIX_CHUNK_NUMEL", 12)
    parts = list(whole.matrix_chunks(flatten=True))
    assert [[tuple(p.shape) for p in part.params] for part in parts] == [
        *([(5, 5)], [(4, 5)], [(2, 3), (3, 2)], [(2, 1, 3), (2, 3)]),
    ]
    for part in parts:
        for param, grad, state, source in zip(*part[:4], strict=True):
            index = next(i for i, p in enumerate(params) if p is param)
            assert grad is whole.grads[index] and state is whole.states[index] and source is whole.sources[index]


@pytest.mark.parametrize("mode", ["sync", "aga", "periodic"])
def test_a_step_in_parts_is_the_step_as_a_whole_to_the_bit(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
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

    whole = trained()
    monkeypatch.setattr(batch, "_CHUNK_NUMEL", 1)
    monkeypatch.setattr(batch, "_MATRIX_CHUNK_NUMEL", 1)
    assert all(torch.equal(a, b) for a, b in zip(whole, trained(), strict=True))
