"""Measure the speed-up of a second process, and the bytes exchanged.

    python -m benchmarks.scaling [--tasks grokking cifar] [--seconds 4] [--json]

One process takes the full batch, or two processes take half each. They communicate over gloo on this machine, and each
has one thread. Steps of one and of two processes alternate, so that both see the same load. The numbers are medians.
"speed-up" is the time of one process over that of two; 2 would be perfect. "sent" is the number of bytes that a process
passes to collectives in a step, before the algorithm of the collective multiplies it. They are the gradients of every
pass, and its share of the orthogonal directions in bfloat16, the dtype of their iteration. AGA makes a second pass at
every tenth step here, and its numbers are means over ten steps.
"""

import argparse
import json
import multiprocessing
import platform
import socket
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from ars2 import ARS2Neo, param_groups

PERIOD, WARM_UP = 10, 2
# Mode, and whether the first pass stays on its process.
MODES: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "AdamW": (None, False),
    "base": ({"mode": "base"}, False),
    "sync": ({"mode": "sync"}, False),
    "sync, first pass local": ({"mode": "sync"}, True),
    "aga": ({"mode": "aga", "k": PERIOD, "phi_lambda": 1e9}, False),
}


def task(name: str) -> tuple[nn.Module, Callable[[nn.Module, slice], Tensor], int]:
    """Return a network, the loss of a part of its batch, and the batch's size."""
    torch.manual_seed(0)
    if name == "grokking":
        from modules.grokking_transformer import GrokkingTransformer

        tokens, answers = torch.randint(113, (512, 3)), torch.randint(113, (512,))
        return GrokkingTransformer(114), lambda net, part: F.cross_entropy(net(tokens[part]), answers[part]), 512
    from modules.cifar_resnet import CIFARResNet18

    images, labels = torch.randn(256, 3, 32, 32), torch.randint(10, (256,))
    images = images.to(memory_format=torch.channels_last)
    network = CIFARResNet18(10, 8).to(memory_format=torch.channels_last)
    return network, lambda net, part: F.cross_entropy(net(images[part]), labels[part]), 256


class Sent:
    """Count the bytes that this process sends to collectives."""

    def __init__(self) -> None:
        self.bytes = 0
        self._gather = dist.all_gather
        dist.all_gather = self.all_gather

    def all_gather(self, tensors: list[Tensor], tensor: Tensor, **options: Any) -> Any:
        self.bytes += tensor.nbytes
        return self._gather(tensors, tensor, **options)

    def all_reduce(self, group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.bytes += bucket.buffer().nbytes
        return allreduce_hook(group, bucket)


class Steps:
    """Train one network, alone or with the other process, and time its steps."""

    def __init__(self, name: str, mode: str, rank: int | None, sent: Sent) -> None:
        network, self.loss, size = task(name)
        options, self.local = MODES[mode]
        self.part = slice(0, size) if rank is None else slice(rank * size // 2, (rank + 1) * size // 2)
        self.network: nn.Module = network
        self.shared: DistributedDataParallel | None = None
        if rank is not None:
            self.network = self.shared = DistributedDataParallel(network)
            self.shared.register_comm_hook(None, sent.all_reduce)
        self.optimizer: Any = (
            torch.optim.AdamW(network.parameters(), fused=True)
            if options is None
            else ARS2Neo(param_groups(network, "all"), **options)
        )
        self.two_pass = options is not None and options["mode"] != "base"
        if rank is not None and options is not None:
            self.optimizer.distribute(dist.group.WORLD)
        self.seconds: list[float] = []

    def step(self) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        with self.shared.no_sync() if self.local and self.shared is not None else nullcontext():
            self.loss(self.network, self.part).backward()
        if self.two_pass:
            self.optimizer.param_groups[0]["phi_variance"] = 1.0  # AGA: the period alone decides
            if self.optimizer.wants_second_pass():
                self.optimizer.perturb()
                self.loss(self.network, self.part).backward()
                self.optimizer.restore()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)


def measure(name: str, mode: str, rank: int, seconds: float, sent: Sent) -> dict[str, Any]:
    """Alternate between steps alone and steps with the other process."""
    alone, together = Steps(name, mode, None, sent), Steps(name, mode, rank, sent)
    over = torch.tensor(0)
    begin, steps = time.perf_counter(), 0
    while not over.item():
        if rank == 0:
            alone.step()
        dist.barrier()
        together.step()
        dist.barrier()
        steps += 1
        if steps == WARM_UP:
            alone.seconds, together.seconds, sent.bytes, begin = [], [], 0, time.perf_counter()
        elif steps % PERIOD == WARM_UP:
            if rank == 0 and time.perf_counter() - begin > seconds:
                over.fill_(1)
            dist.broadcast(over, 0)

    def typical(found: list[float]) -> float:
        # Of means over a period: in AGA one step of it has two passes.
        return statistics.median(statistics.fmean(found[i : i + PERIOD]) for i in range(0, len(found), PERIOD))

    one, two = typical(alone.seconds or [1.0]), typical(together.seconds)
    return {
        "task": name,
        "mode": mode,
        "one_ms": 1e3 * one,
        "two_ms": 1e3 * two,
        "speed_up": one / two,
        "sent_bytes": sent.bytes / len(together.seconds),
        "gradient_bytes": sum(4 * p.numel() for p in alone.network.parameters()),
    }


def work(rank: int, port: int, tasks: list[str], seconds: float, results: Any) -> None:
    """Run one of the two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    sent = Sent()
    rows = [measure(name, mode, rank, seconds, sent) for name in tasks for mode in MODES]
    if rank == 0:
        results.put(rows)
    dist.barrier()
    dist.destroy_process_group()


def run(tasks: list[str], seconds: float) -> list[dict[str, Any]]:
    """Measure all modes of the tasks with two new processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=work, args=(rank, port, tasks, seconds, results)) for rank in range(2)]
    for process in processes:
        process.start()
    rows: list[dict[str, Any]] = results.get(timeout=600)
    for process in processes:
        process.join(60)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=("grokking", "cifar"), default=["grokking", "cifar"])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each mode of each task")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = run(arguments.tasks, arguments.seconds)
    if arguments.json:
        json.dump(rows, sys.stdout, indent=2)
        return
    print(f"torch {torch.__version__}, two processes of 1 thread over gloo, {platform.machine()}")
    print(f"{'task':10}{'mode':24}{'one ms':>9}{'two ms':>9}{'speed-up':>10}{'sent KB':>10}{'in gradients':>14}")
    for row in rows:
        print(
            f"{row['task']:10}{row['mode']:24}{row['one_ms']:9.1f}{row['two_ms']:9.1f}{row['speed_up']:10.2f}"
            f"{row['sent_bytes'] / 1e3:10,.0f}{row['sent_bytes'] / row['gradient_bytes']:14.2f}"
        )


if __name__ == "__main__":
    main()
