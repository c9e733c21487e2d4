"""Start several processes of a test, as torchrun starts them."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers.processes import server


def launch(target: Callable[..., None], ranks: int, folder: Path, *arguments: Any) -> list[Any]:
    """Run a function in ``ranks`` processes; return what each wrote.

    The call is ``target(rank, ranks, port, folder, *arguments)``. Each begins with :func:`become` and leaves
    ``<rank>.pt`` in ``folder``.
    """
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = server()
    processes = [context.Process(target=target, args=(r, ranks, port, folder, *arguments)) for r in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * ranks
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def become(rank: int, ranks: int, port: int) -> None:
    """Become one of ``ranks`` processes, of one thread."""
    torch.set_num_threads(1)
    os.environ |= {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"},
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "GROUP_RANK": "0"},
    }


@contextmanager
def alone() -> Iterator[None]:
    """Make this process a group of one.

    Distributed code then runs in the test's process.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
