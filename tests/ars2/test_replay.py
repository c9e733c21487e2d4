"""A second pass repeats random numbers and leaves buffers unchanged."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ars2.replay import Buffers, frozen_statistics, random_state, repeatable


class Running(nn.Module):
    """Update running statistics in one of three ways.

    They are written in place, replaced, or written by a kernel that does not raise the version counter.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.detach().mean((0, 2, 3))
        if self.how == "in place":
            self.mean.lerp_(mean, 0.1)
        elif self.how == "data":
            self.mean.data.lerp_(mean, 0.1)
        elif self.how == "replaced":
            self.mean = self.mean.lerp(mean, 0.1)
        return functional.batch_norm(x, self.mean, self.variance, training=True)


class Cache(nn.Module):
    """Change a buffer that no checkpoint contains."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.BatchNorm2d(4),
    "BatchNorm, cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(4),
    "InstanceNorm": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)),
    "in place": lambda: Running("in place"),
    "data": lambda: Running("data"),
    "replaced": lambda: Running("replaced"),
    "kernel": lambda: Running("kernel"),
    "cache": Cache,
}


def images() -> Tensor:
    return torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pass_with_frozen_statistics_changes_no_buffer(name: str) -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 1), NETWORKS[name]())
    network(images())
    before = [(buffer, buffer.clone()) for buffer in network.buffers()]
    state = {key: value.clone() for key, value in network.state_dict().items()}
    with frozen_statistics(network):
        network(images()).sum().backward()
    assert all(buffer is now for (buffer, _), now in zip(before, network.buffers(), strict=True))
    assert all(torch.equal(buffer, copy) for buffer, copy in before)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    network(images())  # spectral norm's power iteration has converged by now
    assert name == "spectral norm" or any(
        not torch.equal(now, copy) for now, (_, copy) in zip(network.buffers(), before, strict=True)
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_buffers_are_restored_in_every_frozen_pass(name: str) -> None:
    network = NETWORKS[name]()
    buffers = Buffers(network)
    for _ in range(3):
        buffers.save()
        before = [buffer.clone() for buffer in network.buffers()]
        for _ in range(2):
            network(images())
        buffers.restore()
        assert all(torch.equal(a, b) for a, b in zip(network.buffers(), before, strict=True))
        network(images())  # the next step updates the statistics


def test_a_frozen_pass_normalises_with_batch_statistics() -> None:
    for network in (nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True)):
        expected = network(images())
        with frozen_statistics(network):
            assert torch.equal(network(images()), expected)
        assert not torch.allclose(network.eval()(images()), expected)


class Copies(TorchDispatchMode):
    """Count the numbers that are copied from one tensor to another."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._foreach_copy_.default:
            self.numbers += sum(tensor.numel() for tensor in args[0])
        return func(*args, **(kwargs or {}))


def test_tables_that_do_not_change_are_copied_once() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    network[0].register_buffer("rotary", torch.randn(1000), persistent=False)
    buffers = Buffers(network)
    with Copies() as copies:
        buffers.save()
    assert copies.numbers == 1000 + 4 + 4 + 1
    with Copies() as copies:
        for _ in range(5):
            network(torch.randn(3, 4))
            buffers.save()
            network(torch.randn(3, 4))
            buffers.restore()
    assert copies.numbers == 5 * 2 * (4 + 4 + 1)


def test_buffers_that_cannot_be_written_are_skipped() -> None:
    network = nn.Module()
    network.register_buffer("shared", torch.ones(1, 3).expand(4, 3))
    network.register_buffer("sparse", torch.eye(3).to_sparse())
    with torch.inference_mode():
        network.register_buffer("made_in_validation", torch.ones(3))
    before = list(network.buffers())
    with frozen_statistics(network):
        pass
    assert all(a is b for a, b in zip(before, network.buffers(), strict=True))
    assert torch.equal(network.shared, torch.ones(4, 3)) and torch.equal(network.made_in_validation, torch.ones(3))
    assert torch.equal(network.sparse.to_dense(), torch.eye(3))


def test_buffers_come_back_after_an_error() -> None:
    network = nn.BatchNorm2d(4)
    with pytest.raises(ZeroDivisionError), frozen_statistics(network):
        network(images())
        raise ZeroDivisionError
    assert network.num_batches_tracked == 0 and torch.equal(network.running_mean, torch.zeros(4))


# --- random numbers ---


class Generators:
    """Stand for a device's module with one generator a device.

    torch.cuda, torch.mps and torch.xpu have them like this.
    """

    def __init__(self) -> None:
        self.of: dict[torch.device, torch.Generator] = {}

    def get_rng_state(self, device: torch.device) -> Tensor:
        return self.of.setdefault(device, torch.Generator().manual_seed(0)).get_state()

    def set_rng_state(self, state: Tensor, device: torch.device) -> None:
        self.of[device].set_state(state)


@pytest.mark.parametrize("kind", ["mps", "xpu", "cuda"])
def test_the_random_state_of_every_device_comes_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generators, devices = Generators(), [torch.device(kind, 0), torch.device(kind, 1)]
    monkeypatch.setattr(torch, "get_device_module", lambda device: generators)

    def draw() -> list[Tensor]:
        return [torch.rand(3), *(torch.rand(3, generator=generators.of[device]) for device in devices)]

    restore = random_state(torch.device("cpu"), *devices)
    first, other = draw(), draw()
    restore()
    assert all(torch.equal(a, b) for a, b in zip(draw(), first, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("backend", [None, object()])
def test_a_device_whose_random_state_cannot_be_read_is_named(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend is not None:
        monkeypatch.setattr(torch, "get_device_module", lambda device: backend)
    with pytest.warns(UserWarning, match="random state of devices"):
        restore = random_state(torch.device("privateuseone", 0))
    first = torch.rand(3)
    restore()
    assert torch.equal(torch.rand(3), first)  # the host's is replayed all the same


def test_no_warning_where_nothing_is_drawn(recwarn: pytest.WarningsRecorder) -> None:
    random_state(torch.device("cpu"), torch.device("meta"))()
    assert not recwarn


# --- complete passes ---


def test_a_repeatable_closure_repeats_its_first_call() -> None:
    network = nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.5))
    torch.manual_seed(0)
    expected = network(images()), torch.rand(3)
    once = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network[0].reset_running_stats()
    torch.manual_seed(0)
    closure = repeatable(lambda: network(images()), network)
    first, second, third, after = closure(), closure(), closure(), torch.rand(3)
    assert all(torch.equal(output, expected[0]) for output in (first, second, third))
    assert torch.equal(after, expected[1])  # as after a single call
    assert all(torch.equal(buffer, once[name]) for name, buffer in network.named_buffers())


def test_random_numbers_after_a_second_pass_that_fails_are_those_without_it() -> None:
    def closure() -> None:
        torch.rand(100 if fails else 1)
        if fails:
            raise ZeroDivisionError

    fails = False
    torch.manual_seed(0)
    repeated = repeatable(closure, nn.Linear(1, 1))
    repeated()
    state, fails = torch.get_rng_state(), True
    with pytest.raises(ZeroDivisionError):
        repeated()
    assert torch.equal(torch.get_rng_state(), state)
