"""Repeat the published tables on this machine's GPUs within a time limit.

    python -m studies.published_tables --minutes 9 --output tables
    python -m studies.published_tables --minutes 5 --output rehearsal --accelerator cpu --rehearse

Every row is a run of ``python train.py fit`` under its published config and the GPU overlay of its task. The most
valuable comes first: WikiText-2 to one epoch past the published best, CIFAR-10 to its end, both again under a second
and a third seed, and last the rest of WikiText-2. Running ones save and exit before the time is over. The same command
resumes them. The output folder gets

    runs/      the run folders, with checkpoints
    logs/      the output of the runs
    runs.zip   the runs without weights, packed whenever one has ended:
               python compare.py <output>/runs.zip --unfinished
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from experiment.folders import lock
from launch.trial import server
from launch.within_time import Part, Schedule

# In the order in which they start. WikiText-2 runs overfit, so they have the epochs to one past the published best.
WIKITEXT2 = {"wikitext2_base": 3, "wikitext2_sync": 4, "wikitext2_aga": 4, "wikitext2_adamw": 7, "wikitext2_muon": 5}
CIFAR = ("cifar_sync", "cifar_adamw", "cifar_aga", "cifar_base", "cifar_muon")
SEEDS = (42, 43, 44)
# Passes a step, from which the pace of a row that has not begun is estimated. AGA's second passes depend on the run.
PASSES = {"sync": 2.0, "aga": 1.3}
# A rehearsal is two epochs of one step, on tiny networks.
REHEARSAL_EPOCHS = 2
SHORT = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]
SMALL = {
    "wikitext2": [
        "--data.vocabulary=300",
        "--data.context=32",
        "--model.vocabulary=300",
        "--model.context=32",
        "--model.layers=1",
        "--model.width=32",
        "--model.heads=2",
        "--model.key_value_heads=2",
        "--model.head_dim=16",
        "--model.mlp_width=32",
        "--model.sample_tokens=2",
    ],
    "cifar": ["--model.width=4", "--data.batch_size=16", "--data.val_batch_size=64"],
}
# What a run imports beside the command line.
MODULES = ("modules.image_classifier", "modules.language_model", "datamodules.cifar10", "datamodules.wikitext2")


def all_parts(options: argparse.Namespace) -> list[Part]:
    """Return the parts of all rows and seeds in ``options``, in order of priority."""

    def in_order() -> Iterator[Part]:
        for seed in options.seeds:
            yield from (part(row, seed, epochs, options) for row, epochs in WIKITEXT2.items())
            yield from (part(row, seed, None, options) for row in CIFAR)
        for seed in options.seeds:
            yield from (part(row, seed, None, options) for row in WIKITEXT2)

    return [part for part in in_order() if part.row in options.rows]


def part(row: str, seed: int, epochs: int | None, options: argparse.Namespace) -> Part:
    """Return the part of a row's run up to a number of epochs (``None`` is all)."""
    config: dict[str, Any] = yaml.safe_load(Path(f"configs/{row}.yaml").read_text(encoding="utf-8"))
    task, _, optimizer = row.partition("_")
    total: int = config["trainer"]["max_epochs"]
    if options.rehearse:
        total, epochs = REHEARSAL_EPOCHS, epochs and 1
    return Part(
        row=row,
        seed=seed,
        epochs=epochs or total,
        total_epochs=total,
        arguments=tuple(arguments(row, seed, options)),
        metric=config["checkpoint"]["monitor"],
        lower=config["checkpoint"]["mode"] == "min",
        cost=PASSES.get(optimizer, 1.0),
        task=task,
    )


def arguments(row: str, seed: int, options: argparse.Namespace) -> list[str]:
    """Return the command line of a row's run, which resumes an unfinished one."""
    task = row.partition("_")[0]
    line = ["fit", "--config", f"configs/{row}.yaml", "--config", f"configs/overlays/{task}_gpu.yaml"]
    line += ["--runs", str(options.output / "runs"), "--wandb=false", "--ckpt_path=last"]
    line += [f"--seed_everything={seed}", f"--data.seed={seed}", f"--trainer.accelerator={options.accelerator}"]
    if options.compile:
        line.append("--model.compile=true")
    if options.rehearse:
        line += [*SHORT, *SMALL[task]]
    return line


def slots(accelerator: str, processes: int) -> list[Mapping[str, str]]:
    """Return the environment of each concurrent run, ``processes`` of them on a GPU.

    Raises:
        ValueError: there is no GPU, but one is needed.
    """
    if accelerator == "cpu":
        return [{} for _ in range(processes)]
    import torch

    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if devices == [""]:
        devices = [str(index) for index in range(torch.cuda.device_count())]
    if not devices or not torch.cuda.is_available():
        raise ValueError("there is no GPU on this machine: add --accelerator cpu --rehearse to try everything on a CPU")
    return [{"CUDA_VISIBLE_DEVICES": device} for _ in range(processes) for device in devices]


def read_options() -> argparse.Namespace:
    """Read the command line."""
    rows = [*WIKITEXT2, *CIFAR]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="time limit, start and end included")
    parser.add_argument("--output", type=Path, default=Path("tables"), help="folder to write to (default: tables)")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time on one GPU (default: 2)")
    parser.add_argument("--archive", type=Path, help="file for the packed runs (default: <output>/runs.zip)")
    parser.add_argument("--compile", action="store_true", help="compile the networks; decide before the first call")
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows, metavar="ROW", help="leave out other rows")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="default: 42 43 44")
    parser.add_argument("--accelerator", choices=("gpu", "cpu"), default="gpu", help="default: gpu")
    parser.add_argument("--rehearse", action="store_true", help="two steps of every row, on tiny networks")
    options = parser.parse_args()
    if options.minutes <= 0 or options.processes < 1:
        parser.error("--minutes must be above 0 and --processes at least 1")
    return options


def _stop(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt(number)


def print_end_of(log: Path, lines: int = 15) -> None:
    """Print the last lines of a log, because a rented machine may not return the file."""
    print(f"\nthe end of {log}:")
    print("\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]))


def main() -> int:
    """Train within the time limit, pack the runs, and return the exit code."""
    start, options, code = time.monotonic(), read_options(), 0
    try:
        places = slots(options.accelerator, options.processes)
        options.output.mkdir(parents=True, exist_ok=True)
        if not lock(options.output):
            raise ValueError(f"{options.output} is in use by another call: wait for its end, or name another folder")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, _stop)
    # Before torch is imported in the runs' processes: all of them share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(places))))
    context = server(*MODULES)
    from analysis.archive import pack  # takes seconds, in which the runs' server imports too

    runs, archive = options.output / "runs", options.archive or options.output / "runs.zip"

    def keep() -> int | None:
        """Pack the runs and return their number; ``None`` if that fails."""
        try:
            return pack(runs, archive)
        except OSError as error:
            print(f"error: the runs cannot be packed into {archive}: {error.strerror}", file=sys.stderr)
            return None

    if keep() is None:
        return 1
    schedule = Schedule(
        all_parts(options),
        runs,
        options.output / "logs",
        context,
        places,
        60 * options.minutes - (time.monotonic() - start),
        ended=keep,
    )
    try:
        schedule.run()
    except KeyboardInterrupt as stop:
        code = 128 + (stop.args[0] if stop.args else signal.SIGINT)
    packed, done = keep(), sum(map(schedule.is_done, schedule.parts))
    for log in schedule.failed.values():
        print_end_of(log)
    print(f"{done} of {len(schedule.parts)} parts are done")
    if packed is not None:
        print(f"{packed} runs are in {archive} ({archive.stat().st_size / 2**20:.1f} MiB)")
        print(f"compare them with: python compare.py {archive} --unfinished")
    if schedule.failed:
        print(f"error: these rows failed: {', '.join(sorted(schedule.failed))}", file=sys.stderr)
    elif done < len(schedule.parts):
        print(f"continue with: python -m studies.published_tables {' '.join(sys.argv[1:])}")
    return code or int(packed is None or bool(schedule.failed))


if __name__ == "__main__":
    sys.exit(main())
