"""Train many runs within a given time, the most valuable first, and save what is under way when it is up."""

import csv
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from callbacks.progress_bar import clock
from search.trial import Trial

# Seconds before the end at which runs are asked to save and leave, at most a third of the time; and those that are
# kept for what is done with the runs when all have ended.
SAVING, REST = 30.0, 5.0
POLLING = 0.5
SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Part:
    """A run, and how many epochs of it are wanted before the next part has its turn.

    Args:
        row: name of the experiment; a run folder is ``<runs>/<row>/<time>-seed<seed>``.
        seed: of the run.
        epochs: completed epochs at which the part is done.
        whole: epochs at which the run ends by itself.
        arguments: of ``python train.py``; the same for every part of one run.
        metric: the validation metric to show.
        lower: whether less of it is better.
        cost: of an epoch, relative to other rows of the same ``kind``; for the time left.
        kind: of the task.
    """

    row: str
    seed: int
    epochs: int
    whole: int
    arguments: tuple[str, ...]
    metric: str
    lower: bool
    cost: float
    kind: str

    @property
    def run(self) -> tuple[str, int]:
        """What tells its run from others."""
        return self.row, self.seed

    def __str__(self) -> str:
        return f"{self.row} seed {self.seed}"


def validated(runs: Path, part: Part) -> list[float]:
    """Return the metric after each completed epoch of the newest run of a part, as logged so far."""
    folders = sorted((runs / part.row).glob(f"*-seed{part.seed}"))
    values: dict[int, float] = {}
    with suppress(OSError, IndexError, csv.Error, ValueError), open(folders[-1] / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row.get(part.metric):
                values[int(row["epoch"])] = float(row[part.metric])
    return list(values.values())


class Schedule:
    """Runs parts, several at once, until all are done or the time is up.

    Args:
        parts: in the order in which they begin; of one run a later part goes on from an earlier one.
        runs: folder that the run folders are in.
        logs: folder for what the runs print.
        context: of the runs' processes, see :func:`search.trial.server`.
        slots: for each run at a time, the environment variables that are set for it, such as its GPU.
        seconds: that all of it may take.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        runs: Path,
        logs: Path,
        context: Any,
        slots: Sequence[Mapping[str, str]],
        seconds: float,
    ) -> None:
        self.parts, self.runs, self.logs, self.context = parts, runs, logs, context
        self.free, self.places, self.seconds = list(slots), len(slots), seconds
        self.start = time.monotonic()
        self.running: dict[Part, _UnderWay] = {}
        self.failed: set[str] = set()  # rows
        self.values = {part.run: validated(runs, part) for part in parts}
        self.seconds_an_epoch: dict[str, float] = {}  # by row

    @property
    def elapsed(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self.start

    def is_done(self, part: Part) -> bool:
        """Return whether as many epochs as the part wants are completed."""
        return len(self.values[part.run]) >= part.epochs

    def run(self) -> None:
        """Run parts until none is left or the time to save has come, then let what is under way save and leave."""
        try:
            while self.elapsed < self.seconds - min(SAVING + REST, self.seconds / 3):
                self._look()
                while self.free and (part := self._next()) is not None:
                    self.running[part] = self._begin(part, self.free.pop())
                if not self.running:
                    return
                time.sleep(POLLING)
        finally:
            self._leave()

    def _next(self) -> Part | None:
        """Return the first part that is not done, of a run that is not under way and a row that has not failed."""
        busy = {part.run for part in self.running}
        waiting = (p for p in self.parts if not self.is_done(p) and p.run not in busy and p.row not in self.failed)
        return next(waiting, None)

    def _begin(self, part: Part, slot: Mapping[str, str]) -> "_UnderWay":
        number = len(list(self.logs.glob(f"{part.row}-seed{part.seed}-*.log")))
        log = self.logs / f"{part.row}-seed{part.seed}-{number}.log"
        trial = Trial(self.context, part.arguments, log, slot)
        return _UnderWay(trial, slot, len(self.values[part.run]), time.monotonic())

    def _look(self) -> None:
        """See how far each run has got, stop those whose part is done, and take away those that have ended."""
        for part, run in list(self.running.items()):
            ended = not run.trial.running
            values = self.values[part.run] = validated(self.runs, part)
            if len(values) > run.epochs:
                now = time.monotonic()
                self.seconds_an_epoch[part.row] = (now - run.mark) / (len(values) - run.epochs)
                run.epochs, run.mark = len(values), now
                if self.is_done(part) or now - run.line > SECONDS_BETWEEN_LINES:
                    run.line = now
                    print(self._line(part), flush=True)
            if self.is_done(part) and part.epochs < part.whole:
                self._stop(run)
            if ended:
                outcome = run.trial.outcome()
                if outcome.code != 0 and not run.asked_to_stop:
                    self.failed.add(part.row)
                    said = run.trial.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                    print(f"{part} FAILED: {said[-1] if said else 'it was killed'} (all of it: {run.trial.log})")
                self.free.append(run.slot)
                del self.running[part]

    @staticmethod
    def _stop(run: "_UnderWay") -> None:
        if not run.asked_to_stop:  # a second time it would leave without saving
            run.asked_to_stop = True
            run.trial.stop()

    def _leave(self) -> None:
        for run in self.running.values():
            self._stop(run)
        while self.running and self.elapsed < self.seconds - REST:
            self._look()
            time.sleep(POLLING / 5)
        for part, run in self.running.items():
            run.trial.kill()
            print(f"{part} was killed, for it did not save in time; it goes on from its last checkpoint")
        while self.running:
            self._look()
            time.sleep(POLLING / 5)

    def _line(self, part: Part) -> str:
        values, done = self.values[part.run], sum(map(self.is_done, self.parts))
        best = min(values) if part.lower else max(values)
        left = self.seconds_left()
        return (
            f"{clock(self.elapsed)} of {clock(self.seconds)}  {part}: epoch {len(values)} of {part.whole},"
            f" {self.seconds_an_epoch[part.row]:.1f} s an epoch, {part.metric} {values[-1]:.4g} (best {best:.4g}); all:"
            f" {done} of {len(self.parts)} parts done{'' if left is None else f', the rest in about {clock(left)}'}"
        )

    def seconds_left(self) -> float | None:
        """Return how long all parts that are left take at the pace so far; ``None`` until each kind has a pace."""
        epochs: dict[tuple[str, int], tuple[Part, int]] = {}
        for part in self.parts:
            left = part.epochs - len(self.values[part.run])
            if left > 0 and part.row not in self.failed:
                epochs[part.run] = part, left  # the last part of a run has the most
        paces: dict[str, list[float]] = {}
        for part in self.parts:
            if part.row in self.seconds_an_epoch:
                paces.setdefault(part.kind, []).append(self.seconds_an_epoch[part.row] / part.cost)
        total = 0.0
        for part, left in epochs.values():
            if part.row in self.seconds_an_epoch:
                total += left * self.seconds_an_epoch[part.row]
            elif part.kind in paces:
                total += left * part.cost * sum(paces[part.kind]) / len(paces[part.kind])
            else:
                return None
        return total / self.places


@dataclass
class _UnderWay:
    """A part's process; ``mark`` is when it had completed ``epochs``, ``line`` when it was last told of."""

    trial: Trial
    slot: Mapping[str, str]
    epochs: int
    mark: float
    line: float = 0.0
    asked_to_stop: bool = False
