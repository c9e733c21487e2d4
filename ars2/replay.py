"""Make the second pass of a step repeat the random numbers of the first.

It also leaves buffers unchanged. :meth:`ars2.ARS2Neo.passes` does both in a loop, and :func:`repeatable` in a closure::

    loss = optimizer.step(repeatable(closure, model))
"""

import functools
import random
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ars2.distributed import reshard

Result = TypeVar("Result")


class BufferBackup(NamedTuple):
    """Keep a copy of a buffer and the version counter at the time of the copy."""

    buffer: Tensor
    copy: Tensor
    version: int


class Buffers:
    """Save and restore the buffers of a module.

    A forward pass may change them in place or replace them. A non-persistent buffer, such as a rotary table, is copied
    only when its version has changed. The others are copied each time, because BatchNorm's kernel writes the running
    statistics without a new version.

    Args:
        module: on the device where it is used.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = [m for m in module.modules() if m._buffers]
        self._backups: dict[tuple[nn.Module, str], BufferBackup] = {}

    def save(self) -> None:
        """Save the current contents of the buffers."""
        before, self._backups = self._backups, {}
        stale: list[BufferBackup] = []
        for module in self._modules:
            for name, buffer in module.named_buffers(recurse=False):
                backup = before.get((module, name))
                if backup is None or backup.buffer is not buffer:
                    backup = BufferBackup(buffer, torch.empty_like(buffer), -1)
                if _may_have_changed(module, name, backup):
                    backup = backup._replace(version=_version(buffer))
                    stale.append(backup)
                self._backups[module, name] = backup
        _copy([backup.copy for backup in stale], [backup.buffer for backup in stale])

    def restore(self) -> None:
        """Restore the buffers to their state at :meth:`save`.

        They are the same tensors, written in place.
        """
        stale: list[BufferBackup] = []
        for (module, name), backup in self._backups.items():
            if getattr(module, name) is not backup.buffer:
                setattr(module, name, backup.buffer)
            if _may_have_changed(module, name, backup):
                stale.append(backup)
        _copy([backup.buffer for backup in stale], [backup.copy for backup in stale])
        for slot, backup in self._backups.items():
            self._backups[slot] = backup._replace(version=_version(backup.buffer))

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Restore the buffers at the end of a block, also after an exception."""
        self.save()
        try:
            yield
        finally:
            self.restore()


def _version(buffer: Tensor) -> int:
    return 0 if buffer.is_inference() else buffer._version


def _may_have_changed(module: nn.Module, name: str, backup: BufferBackup) -> bool:
    buffer = backup.buffer
    # Nothing writes to an inference tensor or to an expanded one.
    if buffer.is_inference() or (
        buffer.layout is torch.strided and 0 in buffer.stride() and not buffer.is_contiguous()
    ):
        return False
    return name not in module._non_persistent_buffers_set or _version(buffer) != backup.version


@torch.no_grad()
def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    by_kind: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for target, source in zip(targets, sources, strict=True):
        into, out_of = by_kind[target.device, target.dtype]
        into.append(target)
        out_of.append(source)
    for into, out_of in by_kind.values():
        torch._foreach_copy_(into, out_of)


def frozen_statistics(module: nn.Module) -> AbstractContextManager[None]:
    """Leave running statistics and all other buffers unchanged in a block.

    Normalisation in the block uses batch statistics.
    """
    return Buffers(module).unchanged()


def random_state(*devices: torch.device) -> Callable[[], None]:
    """Save the random state of the host and of ``devices``.

    On the host that is the state of torch, of Python's ``random`` and of NumPy's global generator, because training
    steps draw from all three, such as mixup from NumPy's.

    Returns:
        A function that restores it.

    Warns:
        UserWarning: the random state of a device cannot be read, so it is not saved.
    """
    host, python = torch.get_rng_state(), random.getstate()
    numpy = sys.modules.get("numpy")  # torch works without it
    numpy_state = None if numpy is None else numpy.random.get_state()
    states: list[tuple[Callable[[Tensor, torch.device], None], Tensor, torch.device]] = []
    for device in dict.fromkeys(device for device in devices if device.type not in ("cpu", "meta")):
        try:
            backend = torch.get_device_module(device)
            get_state, set_state = backend.get_rng_state, backend.set_rng_state
        except (RuntimeError, AttributeError):
            warnings.warn(
                f"the random state of devices of type {device.type!r} cannot be read: on them the second pass draws"
                " other random numbers (dropout) than the first",
                stacklevel=2,
            )
        else:
            states.append((set_state, get_state(device), device))

    def restore() -> None:
        torch.set_rng_state(host)
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        for set_state, state, device in states:
            set_state(state, device)

    return restore


def devices_of(model: nn.Module) -> set[torch.device]:
    """Return the devices on which a model draws random numbers."""
    return {param.device for param in model.parameters()}


@contextmanager
def first_pass(optimizer: Any, model: nn.Module) -> Iterator[None]:
    """Make a block the first pass of a step, of all its batches or of some.

    In mode ``"momentum"`` of :class:`ars2.ARS2Neo` it is made at moved parameters of ``model``. At its end they are
    restored, also after an exception.
    """
    moved = getattr(optimizer, "moves_first_pass", False)
    if moved:
        reshard(model)
        optimizer.move_along_momentum()
    try:
        yield
    finally:
        if moved:
            optimizer.restore()


@contextmanager
def second_pass(
    optimizer: Any, statistics: AbstractContextManager[None], devices: Iterable[torch.device]
) -> Iterator[None]:
    """Make a block the second pass of a step, at the adversarial point.

    At its end the parameters are restored, also after an exception. Random draws after it are those without it.

    Args:
        optimizer: whose ``wants_second_pass()`` has returned True.
        statistics: leaves buffers unchanged, such as :func:`frozen_statistics`.
        devices: where the block draws random numbers.
    """
    after = random_state(*devices)
    optimizer.perturb()
    try:
        with statistics:
            yield
    finally:
        optimizer.restore()
        after()


def repeatable(closure: Callable[[], Result], model: nn.Module) -> Callable[[], Result]:
    """Return a closure whose later calls repeat its first call.

    They use the same random numbers and leave buffers unchanged. Wrap the closure again in every step. The random
    numbers are those of :func:`random_state`, on the host and on the devices of the model. Later draws are the same as
    without the repeated calls.

    Args:
        closure: as for ``optimizer.step``, or any function that makes one pass.
        model: only the first call changes its buffers, such as BatchNorm's running statistics.
    """
    devices = devices_of(model)
    replay: Callable[[], None] | None = None

    @functools.wraps(closure)
    def repeated() -> Result:
        nonlocal replay
        now = random_state(*devices)
        if replay is None:
            replay = now
            return closure()
        replay()
        try:
            with frozen_statistics(model):
                return closure()
        finally:
            now()

    return repeated
