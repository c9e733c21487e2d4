"""Estimate a step on up to 64 GPUs from its bytes and operations.

    python -m benchmarks.scaling_on_paper

Prints Markdown. Parameter shapes are those of the published networks, the operations of their passes are counted by
torch. Every GPU keeps its batch, so with perfect scaling a step would take as long on 64 as on one; nothing is taken to
overlap. With n GPUs, P parameters of which M are matrices, B bytes a second of a GPU's link, and a step that makes
``passes`` gradients and averages ``averaged`` of them, a step is the sum of

    passes      passes * operations of a pass / (peak * 0.4)
    iteration   5 * 2 * greatest share of the multiplications of a Newton-Schulz step / (peak * 0.2)
    memory      passes * 28 P / memory bandwidth     moments and parameters; about as much for a second pass
    averaging   averaged * 2 (n - 1) / n * 4 P / B           a ring, float32 gradients
    gathering   (n - 1) / n * 2 M / B                        directions in bfloat16
"""

from typing import NamedTuple

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ars2 import param_groups
from ars2.distributed import assign_to_ranks, newton_schulz_cost
from ars2.orthogonalize import stack_shape
from benchmarks.networks import build, loss_function

PEAK, OF_PASSES, OF_ITERATION = 989e12, 0.4, 0.2  # operations a second, and the shares that are reached
MEMORY = 3.35e12  # bytes a second
WITHIN, ACROSS, NODE = 450e9, 50e9, 8  # bytes a second between the GPUs of one machine, between machines; GPUs of one
GPUS = (1, 8, 64)
BATCH = {"resnet18": "256 images", "qwen3": "8 x 255 tokens"}


class Mode(NamedTuple):
    """The average work of a mode in a step."""

    passes: float
    averaged: float
    orthogonalizes: bool = True


MODES = {
    "AdamW": Mode(1, 1, orthogonalizes=False),
    "Base": Mode(1, 1),
    "Sync": Mode(2, 2),
    "Sync, first pass local": Mode(2, 1),
    "AGA, every 10th step": Mode(1.1, 1.1),
}


class Network(NamedTuple):
    """The sizes of a network and its batch that decide the cost of a step."""

    parameters: int
    matrices: int
    iteration: list[int]  # multiplications of a Newton-Schulz step, by parameter
    operations: int  # of a forward and a backward pass


def network(name: str) -> Network:
    """Count the cost of a network of benchmarks/networks.py without running it."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model = build(name)
        loss_function(name, model)().backward()
        shapes = [
            stack_shape(param.shape, group.get("flatten", False))
            for group in param_groups(model, "all")
            if group["track"] == "matrix"
            for _, param in group["params"]
        ]
    return Network(
        sum(param.numel() for param in model.parameters()),
        sum(shape.numel() for shape in shapes),
        [newton_schulz_cost(*shape) for shape in shapes],
        counter.get_total_flops(),
    )


def sent(net: Network, mode: Mode, gpus: int) -> float:
    """Return the bytes that a GPU sends in a step."""
    others = (gpus - 1) / gpus
    return mode.averaged * 2 * others * 4 * net.parameters + mode.orthogonalizes * others * 2 * net.matrices


def seconds(net: Network, mode: Mode, gpus: int) -> float:
    """Return the time of a step."""
    owned = assign_to_ranks(net.iteration, gpus)
    greatest = max(sum(net.iteration[index] for index in indices) for indices in owned)
    return (
        mode.passes * net.operations / (PEAK * OF_PASSES)
        + mode.orthogonalizes * 5 * 2 * greatest / (PEAK * OF_ITERATION)
        + 28 * net.parameters * mode.passes / MEMORY
        + sent(net, mode, gpus) / (WITHIN if gpus <= NODE else ACROSS)
    )


def table() -> list[str]:
    """Return the lines of the table."""
    columns = ["network, batch of a GPU", "mode", "MB sent at 64", *(f"ms at {n}" for n in GPUS), "t(1) / t(64)"]
    lines = [f"| {' | '.join(columns)} |", "| " + "--- | " * len(columns)]
    for name, batch in BATCH.items():
        net = network(name)
        for label, mode in MODES.items():
            times = [seconds(net, mode, gpus) for gpus in GPUS]
            cells = [f"{name}, {batch}", label, f"{sent(net, mode, GPUS[-1]) / 1e6:,.0f}"]
            lines.append(
                f"| {' | '.join([*cells, *(f'{1e3 * t:.2f}' for t in times), f'{times[0] / times[-1]:.2f}'])} |"
            )
    return [line.rstrip() for line in lines]


if __name__ == "__main__":
    print(*table(), sep="\n")
