"""Measure the data path of WikiText-2 against the model's speed.

    ARS2_WIKITEXT2_ROOT=<folder> python -m benchmarks.wikitext2_data [--protocol packed] [--vocabulary 40479]

Each loading time is measured in a separate process, with and without its imports. The pace of the batches of one epoch
is compared with forward and backward passes of the published model on the same batches. Exits with 1 if a cold start
takes 60 s or more, the cache 1 s or more, or if the batches are less than 50 times as fast as the model.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time

import torch

from datamodules.wikitext2 import ROOT, WikiText2Data

LIMITS = {"cold, s": 60.0, "from cache, s": 1.0}
LEAST_PACE = 50.0


def load(options: argparse.Namespace, cache: str) -> tuple[WikiText2Data, float]:
    """Return the prepared data and the seconds that it took."""
    start = time.perf_counter()
    data = WikiText2Data(options.vocabulary, options.context, options.protocol, options.batch_size, cache=cache)
    data.prepare_data()
    data.setup("fit")
    return data, time.perf_counter() - start


def in_a_process(cache: str) -> tuple[float, float]:
    """Return the seconds of loading in a new process, and of that entire process."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.wikitext2_data", *sys.argv[1:], "--only-load", cache]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(process.stdout.splitlines()[-1]), time.perf_counter() - start


def pace_of_batches(data: WikiText2Data) -> float:
    """Return predicted tokens per second of one epoch's int64 batches."""
    start, tokens = time.perf_counter(), 0
    for (rows,) in data.train_dataloader():
        tokens += rows.long()[:, 1:].numel()
    return tokens / (time.perf_counter() - start)


def pace_of_model(data: WikiText2Data, options: argparse.Namespace) -> float:
    """Return predicted tokens per second of training passes after a warm-up pass."""
    from modules.language_model import LanguageModel

    model = LanguageModel(optimizer=torch.optim.AdamW, vocabulary=options.vocabulary, context=options.context)
    tokens = 0
    for number, batch in enumerate(data.train_dataloader()):
        if number == 1:
            start = time.perf_counter()
        model.zero_grad()
        model.compute_loss(batch, None).backward()
        tokens += model.batch_size(batch) if number else 0
        if number == options.steps:
            break
    return tokens / (time.perf_counter() - start)


def main() -> int:
    """Measure and print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=40_479)
    parser.add_argument("--context", type=int, default=255)
    parser.add_argument("--protocol", choices=("packed", "contiguous"), default="packed")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="of the model")
    parser.add_argument("--only-load", metavar="CACHE", help="load once and print the seconds")
    options = parser.parse_args()
    if options.only_load:
        print(load(options, options.only_load)[1])
        return 0
    if not os.environ.get(ROOT):
        print(f"error: {ROOT} must name a folder with the files of WikiText-2", file=sys.stderr)
        return 1
    processor = platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {processor}")
    with tempfile.TemporaryDirectory() as cache:
        found = {}
        for name, limit in LIMITS.items():
            found[name], with_imports = in_a_process(cache)
            print(f"{name:16} {found[name]:8.2f}   (below {limit:g}; {with_imports:.1f} s with imports)")
        data, _ = load(options, cache)
        description = data.description()
        train = description["splits"]["train"]
        print(f"{description['corpus']}, {options.protocol}, vocabulary {options.vocabulary:,}")
        print(f"{train['rows']:,} rows, {len(data.train_dataloader()):,} steps an epoch")
        batches, model = pace_of_batches(data), pace_of_model(data, options)
    print(f"batches          {batches:12,.0f} tokens/s")
    print(f"published model  {model:12,.0f} tokens/s, forward and backward")
    print(f"ratio            {batches / model:12,.0f}   (at least {LEAST_PACE:g})")
    return int(any(found[name] >= limit for name, limit in LIMITS.items()) or batches / model < LEAST_PACE)


if __name__ == "__main__":
    sys.exit(main())
