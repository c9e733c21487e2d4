"""Train many runs within a time limit, in order of priority."""

import csv
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment.quantities import duration
from launch.trial import Trial

# Seconds for the runs to save and exit, and seconds left to the caller; together at most a third of the time.
SAVING, REST = 25.0, 5.0
POLLING = 0.5
SECONDS_BETWEEN_LINES = 10.0
# Exit codes of a stopped run: just finished, saved, or not training yet.
STOPPED = (0, 128 + signal.SIGTERM, -1)


@dataclass(frozen=True)
class Part:
    """Describe a run and its epochs to complete before the next part starts.

    Args:
        row: name of the experiment; a run folder is ``<runs>/<row>/<time>-seed<seed>``.
        seed: of the run.
        epochs: number of completed epochs at which the part is done.
        total_epochs: number of epochs at which the run ends by itself.
        arguments: of ``python train.py``; the same for every part of one run.
        metric: the validation metric to show.
        lower: whether a lower value is better.
        cost: of an epoch relative to other rows of the same ``task``, to estimate the remaining time.
        task: rows of one task share the estimate.
    """

    row: str
    seed: int
    epochs: int
    total_epochs: int
    arguments: tuple[str, ...]
    metric: str
    lower: bool
    cost: float
    task: str

    @property
    def run(self) -> tuple[str, int]:
        """Return the row and seed that identify the run."""
        return self.row, self.seed

    def __str__(self) -> str:
        return f"{self.row} seed {self.seed}"


@dataclass
class _Running:
    """Track the process of a part.

    ``epochs`` were completed at the time ``mark``; ``printed`` is the time of the last printed line.
    """

    trial: Trial
    slot: Mapping[str, str]
    epochs: int
    mark: float
    printed: float = 0.0
    asked_to_stop: bool = False

    def stop(self) -> None:
        """Ask the run to save and exit, once, because a second request only exits."""
        if not self.asked_to_stop:
            self.asked_to_stop = True
            self.trial.stop()


def validated(runs: Path, part: Part) -> list[float]:
    """Return the logged metric of each epoch of the newest run of a part."""
    folders = sorted((runs / part.row).glob(f"*-seed{part.seed}"))
    values: dict[int, float] = {}
    with suppress(OSError, IndexError, csv.Error, ValueError), open(folders[-1] / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row.get(part.metric):
                values[int(row["epoch"])] = float(row[part.metric])
    return list(values.values())


class Schedule:
    """Run parts, several at once, until all are done or the time is up.

    Args:
        parts: in the order in which they start; a later part of a run continues an earlier one.
        runs: folder that the run folders are in.
        logs: folder for the output of the runs.
        context: of the runs' processes, see :func:`launch.trial.server`.
        slots: for each concurrent run, the environment variables that are set for it, such as its GPU.
        seconds: the time limit for everything.
        ended: called whenever a run has ended.
        start_trial: starts a run; takes the arguments of :class:`launch.trial.Trial`.

    Attributes:
        failed: rows of which a run ended with an error; they are not started again.
        over: runs that ended by themselves before their last epoch.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        runs: Path,
        logs: Path,
        context: Any,
        slots: Sequence[Mapping[str, str]],
        seconds: float,
        ended: Callable[[], object] = lambda: None,
        start_trial: Callable[[Any, Sequence[str], Path, Mapping[str, str]], Trial] = Trial,
    ) -> None:
        self.parts, self.runs, self.logs, self.context = parts, runs, logs, context
        self.free, self.places, self.seconds, self.ended = list(slots), len(slots), seconds, ended
        self.start_trial = start_trial
        self.start = time.monotonic()
        self.running: dict[Part, _Running] = {}
        self.failed: dict[str, Path] = {}  # with the log
        self.over: set[tuple[str, int]] = set()
        self.values = {part.run: validated(runs, part) for part in parts}
        self.seconds_an_epoch: dict[str, float] = {}  # by row

    @property
    def elapsed(self) -> float:
        """Return the seconds since the schedule was created."""
        return time.monotonic() - self.start

    def is_done(self, part: Part) -> bool:
        """Return whether the part's epochs are completed."""
        return len(self.values[part.run]) >= part.epochs

    def run(self) -> None:
        """Run parts until none is left or it is time to save, then stop the running ones."""
        try:
            while self.elapsed < self.seconds - min(SAVING + REST, self.seconds / 3):
                self._poll()
                while self.free and (part := self._next()) is not None:
                    self._begin(part, self.free.pop(0))
                if not self.running:
                    return
                time.sleep(POLLING)
        finally:
            self._leave()

    def _next(self) -> Part | None:
        """Return the first part that is not done and may start."""
        busy = {part.run for part in self.running} | self.over
        waiting = (p for p in self.parts if not self.is_done(p) and p.run not in busy and p.row not in self.failed)
        return next(waiting, None)

    def _begin(self, part: Part, slot: Mapping[str, str]) -> None:
        number = len(list(self.logs.glob(f"{part.row}-seed{part.seed}-*.log")))
        log = self.logs / f"{part.row}-seed{part.seed}-{number}.log"
        trial = self.start_trial(self.context, part.arguments, log, slot)
        epochs = len(self.values[part.run])
        self.running[part] = _Running(trial, slot, epochs, time.monotonic())
        place = "".join(f", {name}={value}" for name, value in slot.items())
        self._print(f"{part}: begins after epoch {epochs} of {part.total_epochs}{place}")

    def _poll(self) -> None:
        """Update the progress of each run, stop finished parts, remove ended runs."""
        for part, run in list(self.running.items()):
            ended = not run.trial.running
            values = self.values[part.run] = validated(self.runs, part)
            if len(values) > run.epochs:
                now = time.monotonic()
                self.seconds_an_epoch[part.row] = (now - run.mark) / (len(values) - run.epochs)
                run.epochs, run.mark = len(values), now
                if self.is_done(part) or now - run.printed > SECONDS_BETWEEN_LINES:
                    run.printed = now
                    self._print(self._progress(part))
            if self.is_done(part) and part.epochs < part.total_epochs:
                run.stop()
            if ended:
                del self.running[part]
                self.free.append(run.slot)
                self._judge(part, run)
                self.ended()

    def _judge(self, part: Part, run: _Running) -> None:
        """Record and print an unexpected end of a run."""
        code, log = run.trial.outcome().code, run.trial.log
        if code not in (STOPPED if run.asked_to_stop else (0,)):
            self.failed[part.row] = log
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            self._print(f"{part}: FAILED: {lines[-1] if lines else 'it was killed'} (see {log})")
        elif code == 0 and not self.is_done(part):
            self.over.add(part.run)  # it would end the same way again
            self._print(f"{part}: ended by itself after epoch {run.epochs} of {part.total_epochs} (see {log})")

    def _leave(self) -> None:
        for run in self.running.values():
            run.stop()
        while self.running and self.elapsed < self.seconds - REST:
            self._poll()
            time.sleep(POLLING / 5)
        for part, run in self.running.items():
            run.trial.kill()
            self._print(f"{part}: killed because it did not save in time; it resumes from its last checkpoint")
        while self.running:
            self._poll()
            time.sleep(POLLING / 5)

    def _print(self, text: str) -> None:
        print(f"{duration(self.elapsed)} of {duration(self.seconds)}  {text}", flush=True)

    def _progress(self, part: Part) -> str:
        values, done = self.values[part.run], sum(map(self.is_done, self.parts))
        best = min(values) if part.lower else max(values)
        rest = self.remaining_seconds()
        return (
            f"{part}: epoch {len(values)} of {part.total_epochs}, {duration(self.seconds_an_epoch[part.row])} an epoch,"
            f" {part.metric} {values[-1]:.4g} (best {best:.4g}); all: {done} of {len(self.parts)} parts done"
            f"{'' if rest is None else f', the rest in about {duration(rest)}'}"
        )

    def remaining_seconds(self) -> float | None:
        """Return the remaining seconds; ``None`` until each task has been timed."""
        epochs: dict[tuple[str, int], tuple[Part, int]] = {}
        for part in self.parts:
            left = part.epochs - len(self.values[part.run])
            if left > 0 and part.row not in self.failed and part.run not in self.over:
                epochs[part.run] = part, left  # the last part of a run has the most
        paces: dict[str, list[float]] = {}
        for part in self.parts:
            if part.row in self.seconds_an_epoch:
                paces.setdefault(part.task, []).append(self.seconds_an_epoch[part.row] / part.cost)
        total = 0.0
        for part, left in epochs.values():
            if part.row in self.seconds_an_epoch:
                total += left * self.seconds_an_epoch[part.row]
            elif part.task in paces:
                total += left * part.cost * sum(paces[part.task]) / len(paces[part.task])
            else:
                return None
        return total / self.places
