"""Run tuned winners with fewer Newton-Schulz steps, and judge the rows by margins stated beforehand.

    ARS2_CIFAR10_ROOT=<folder> ARS2_WIKITEXT2_ROOT=<folder> python -m studies.newton_schulz_runs run --workers 2
    python -m studies.newton_schulz_runs report

results/newton_schulz_steps/protocol.yaml states the rows, seeds, margins and order. A row is the saved config of a
tuned winner, of which only the Newton-Schulz options and the seeds change. ``run`` continues where it was stopped: a
run without an end is deleted and repeated. Run folders are ``<task>/<row>/<time>-seed<seed>``. ``report`` compares
every row with its five-step row on the same seeds, and ``pack`` packs the runs of each task.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from analysis import runs as run_folders
from analysis.archive import ARCHIVE, pack
from analysis.statistics import Mean, exponential, mean_interval

FOLDER = Path("results") / "newton_schulz_steps"
PROTOCOL = FOLDER / "protocol.yaml"
TITLES = {
    "grok": "Modular addition, gradient evaluations to 99 % (geometric mean)",
    "wikitext2_nano": "WikiText-2 nano, validation perplexity (geometric mean)",
    "cifar_mini": "CIFAR-10 mini, validation accuracy",
}
ENDS = ("summary.json", "error.txt")
# The limits of a two-sided interval at this level are those of one-sided ones at 95 %.
CONFIDENCE = 0.9


@dataclass(frozen=True)
class Task:
    """One task of the protocol.

    Args:
        study: with the tuned winners, a folder of ``results/``.
        winners: the row of that study by mode.
        seeds: of every row.
        metric: of the summary: a milestone's gradient evaluations, or the best value of a validation metric.
        missed: the value of a run that did not get there.
        lower: whether a lower value is better.
        ratio: whether rows are compared by geometric mean ratios; else by mean differences.
        margin: the largest ratio or difference to the worse that is accepted.
    """

    study: str
    winners: dict[str, str]
    seeds: list[int]
    metric: str
    missed: float
    lower: bool
    ratio: bool
    margin: float

    def value(self, summary: Mapping[str, Any]) -> float:
        """Return the value of a run with this summary."""
        if self.metric in summary.get("milestones", {}):
            found = summary["milestones"][self.metric]["gradient_evaluations"]
        else:
            found = summary.get("metrics", {}).get(self.metric, {}).get("best")
        return self.missed if found is None else float(found)

    def compared(self, values: Mapping[int, float], reference: Mapping[int, float]) -> Mean:
        """Return the ratio or difference to ``reference`` over the seeds of both, with one-sided 95 % limits."""
        seeds = sorted(values.keys() & reference.keys())
        row, other = (np.array([side[seed] for seed in seeds]) for side in (values, reference))
        if not self.ratio:
            return mean_interval((row - other).tolist(), CONFIDENCE)
        return exponential(mean_interval(np.log(row / other).tolist(), CONFIDENCE))

    def not_inferior(self, found: Mean) -> bool:
        """Return whether the limit towards the worse is within the margin."""
        limit = found.high if self.lower else found.low
        return limit is not None and (limit <= self.margin if self.lower else limit >= self.margin)


@dataclass(frozen=True)
class Protocol:
    """What is run, in which order, and how it is judged.

    Args:
        tasks: by name.
        settings: the Newton-Schulz options by name; the first is the reference.
        order: task, mode and settings; earlier ones run first.
    """

    tasks: dict[str, Task]
    settings: dict[str, dict[str, Any]]
    order: list[tuple[str, str, list[str]]]

    @classmethod
    def read(cls, file: Path = PROTOCOL) -> "Protocol":
        """Read the committed protocol."""
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        tasks = {name: Task(**options) for name, options in content["tasks"].items()}
        return cls(tasks, content["settings"], [tuple(entry) for entry in content["order"]])

    @property
    def reference(self) -> str:
        """The name of the setting that the others are compared with."""
        return next(iter(self.settings))

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yield task, mode and setting of every row."""
        for task, mode, settings in self.order:
            for setting in settings:
                yield task, mode, setting


def config_of(protocol: Protocol, task: str, mode: str, setting: str, folder: Path) -> dict[str, Any]:
    """Return the complete config of a row."""
    from studies.newton_schulz_steps import winner  # imports torch

    config = winner(protocol.tasks[task].study, protocol.tasks[task].winners[mode])
    config["model"]["init_args"]["optimizer"]["init_args"].update(protocol.settings[setting])
    return {**config, "experiment": f"{mode}_{setting}", "runs": str(folder / task)}


def ended(folder: Path, seed: int) -> bool:
    """Return whether a row has an ended run of this seed, and delete one that was interrupted."""
    for run in folder.glob(f"*-seed{seed}"):
        if any((run / name).is_file() for name in ENDS):
            return True
        shutil.rmtree(run)
    return False


def run(protocol: Protocol, folder: Path, workers: int) -> None:
    """Run everything that has not ended, in the protocol's order."""
    from launch import trial
    from launch.search import run_jobs

    context = trial.server("modules.image_classifier", "modules.language_model", "datamodules.cifar10")

    def one(task: str, row: str, seed: int, config: Path) -> None:
        arguments = ["fit", "--config", str(config), "--seed_everything", str(seed), "--data.seed", str(seed)]
        outcome = trial.run(context, arguments, folder / task / "logs" / f"{row}-{seed}.log")
        value = protocol.tasks[task].value(outcome.summary)
        print(f"{task} {row} seed {seed}: {value:g}, exit code {outcome.code}", flush=True)

    def jobs() -> Iterator[Any]:
        for task, mode, setting in protocol.rows():
            row = f"{mode}_{setting}"
            config = folder / task / f"{row}.yaml"
            config.parent.mkdir(parents=True, exist_ok=True)
            config.write_text(yaml.safe_dump(config_of(protocol, task, mode, setting, folder), sort_keys=False))
            for seed in protocol.tasks[task].seeds:
                if not ended(folder / task / row, seed):
                    yield partial(one, task, row, seed, config)

    run_jobs(jobs(), workers, lambda: None)


def values(protocol: Protocol, folder: Path) -> dict[tuple[str, str], dict[int, float]]:
    """Return the values by task and row, and by seed."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for name, task in protocol.tasks.items():
        for one in run_folders.read([folder / name])[0] if (folder / name).is_dir() else ():
            row = Path(str(one.shown)).parent.name
            found.setdefault((name, row), {})[int(one.identity.seed)] = task.value(one.summary)
    return found


def report(protocol: Protocol, folder: Path) -> str:
    """Return the tables of verdicts in Markdown, of all rows with a run for every seed."""
    found, parts = values(protocol, folder), []
    for mode in ("base", "sync"):
        for name, task in protocol.tasks.items():
            rows = {one: found.get((name, f"{mode}_{one}"), {}) for one in protocol.settings}
            complete = {one: row for one, row in rows.items() if row.keys() >= set(task.seeds)}
            if len(complete) > 1 and protocol.reference in complete:
                what = "ratio to five steps" if task.ratio else "points to five steps"
                parts += [f"{TITLES[name]}, {mode.capitalize()}:", ""]
                parts += [
                    f"| row | mean of {len(task.seeds)} seeds | {what} | not inferior |",
                    "| --- | --- | --- | --- |",
                ]
                parts += [line(task, one, row, complete[protocol.reference]) for one, row in complete.items()] + [""]
    return "\n".join(parts)


def line(task: Task, setting: str, row: dict[int, float], reference: dict[int, float]) -> str:
    """Return a row of a table."""
    numbers, scale = np.array(list(row.values())), 1.0 if task.ratio else 100.0
    mean = f"{float(np.exp(np.log(numbers).mean())):#.4g}" if task.ratio else f"{scale * numbers.mean():.1f} %"
    if row is reference:
        return f"| {setting} | {mean} | | |"
    compared = task.compared(row, reference)
    assert compared.low is not None and compared.high is not None
    shown = [
        f"{scale * value:{'.3f' if task.ratio else '+.2f'}}" for value in (compared.mean, compared.low, compared.high)
    ]
    verdict = "yes" if task.not_inferior(compared) else "**no**"
    return f"| {setting} | {mean} | {shown[0]} [{shown[1]}, {shown[2]}] | {verdict} |"


def options_of(description: str | None, folder: Path) -> argparse.Namespace:
    """Read the command line of a study with the parts ``run``, ``report`` and ``pack``.

    Runs that it starts have one thread each.

    Args:
        description: of the command.
        folder: default folder of the runs.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("run", "report", "pack"))
    parser.add_argument("--folder", type=Path, default=folder, help=f"of the runs (default: {folder})")
    parser.add_argument("--workers", type=int, default=2, help="concurrent runs, of one thread each (default: 2)")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    return options


def main() -> int:
    """Run, report or pack, and return the exit code."""
    options = options_of(__doc__, FOLDER)
    protocol = Protocol.read()
    if options.part == "run":
        run(protocol, options.folder, options.workers)
    elif options.part == "pack":
        for task in protocol.tasks:
            print(f"{task}: {pack(options.folder / task, options.folder / task / ARCHIVE)} runs")
    else:
        print(report(protocol, options.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
