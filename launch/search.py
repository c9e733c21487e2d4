"""Run a sweep with Optuna, and resume it from Optuna's journal file."""

import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from analysis.archive import ARCHIVE, unpack_command
from experiment.folders import lock
from launch import trial
from launch.sweep_specification import Dimension, OptimizerSpec, Sweep

optuna.logging.set_verbosity(optuna.logging.WARNING)
Job = Callable[[], None]
Runner = Callable[[Any, Sequence[str], Path], trial.Outcome]
# Suffixes of the studies of an optimizer's best trials on further seeds, and of its winner's runs.
REJUDGED, FINAL = "-rejudged", "-final"


class StatedOptions(optuna.samplers.BaseSampler):
    """Record enqueued values as parameters, so that Optuna's tools show them."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        value = json.loads(trial.user_attrs["options"][param_name])
        return _text(value) if isinstance(param_distribution, CategoricalDistribution) else value


def suggest(asked: optuna.Trial, space: dict[str, Dimension]) -> None:
    """Register the enqueued options of a trial as its parameters."""
    for name, dimension in space.items():
        if dimension.choices is not None:
            asked.suggest_categorical(name, list(dict.fromkeys(map(_text, dimension.choices))))
        elif dimension.low is not None and dimension.high is not None:
            # Rounding can bring a value slightly outside of its range.
            low, high = min(dimension.low, dimension.at(0.0)), max(dimension.high, dimension.at(1.0))
            asked.suggest_float(name, low, high, log=dimension.log)


def _text(value: Any) -> str:
    """Format an option's value for the command line."""
    return value if isinstance(value, str) else json.dumps(value)


class Search:
    """The state of a sweep in its folder.

    The folder gets ``trials.journal`` (Optuna's storage, with studies of each optimizer's trials, of its best trials on
    further seeds, and of its final runs), ``<optimizer>.yaml`` (the common options of its runs),
    ``<optimizer>-winner.yaml`` (model and optimizer of the best trial, as an overlay), ``logs/``, the run folders
    ``<optimizer>/<time>-seed<seed>``, and the winners' runs in ``<optimizer>-final/``.

    Args:
        sweep: the specification.
        folder: of the sweep.
        context: of the runs' processes, see :func:`launch.trial.server`.
        report: called with a line whenever a run has ended.
        runner: runs a command line in a process of ``context``, its output going to a file.

    Raises:
        ValueError: the folder has its runs in an archive, a sweep with other points, or one that is running.
    """

    def __init__(
        self, sweep: Sweep, folder: Path, context: Any, report: Callable[[str], None], runner: Runner = trial.run
    ) -> None:
        self.sweep, self.folder, self.context, self.report, self.runner = sweep, folder, context, report, runner
        folder.mkdir(parents=True, exist_ok=True)
        archive = folder / ARCHIVE
        if archive.is_file() and not any(folder.glob("*/*/config.yaml")):
            raise ValueError(
                f"the runs of {folder} are packed: unpack them with {unpack_command(archive)}, or name another folder"
            )
        if not lock(folder):
            raise ValueError(f"a sweep is running in {folder}: wait for its end, stop it, or name another folder")
        for leftover in folder.glob("*.tmp"):
            leftover.unlink(missing_ok=True)
        journal = str(folder / "trials.journal")
        self.storage = JournalStorage(JournalFileBackend(journal, lock_obj=JournalFileOpenLock(journal)))
        self.lock = threading.Lock()  # several threads share the studies
        self.studies: dict[str, optuna.Study] = {}
        for name in sweep.optimizers:
            self._enqueue(name, sweep.points(name))
        for name, spec in sweep.optimizers.items():
            self._write(f"{name}.yaml", merged(spec.options, sweep.common))

    def _enqueue(self, name: str, points: list[dict[str, Any]]) -> None:
        """Open or create a study, and enqueue the points that have no trial yet."""
        study = self.studies[name] = optuna.create_study(
            storage=self.storage,
            study_name=name,
            direction=self.sweep.objective.direction,
            load_if_exists=True,
            sampler=StatedOptions(),
        )
        for old in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.tell(old.number, state=TrialState.FAIL)  # the sweep was killed while it ran
        known = [
            old.user_attrs
            for old in study.get_trials(deepcopy=False)
            if old.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.WAITING)
        ]
        for index, point in enumerate(points):
            options = {key: json.dumps(value) for key, value in point.items()}
            here = [attributes["options"] for attributes in known if attributes["index"] == index]
            if here and here[0] != options:
                raise ValueError(
                    f"{self.folder} contains a sweep with other points for {name}: name another folder, or restore the"
                    " search space, trials and sequence_seed"
                )
            if not here:
                study.enqueue_trial({}, user_attrs={"index": index, "options": options})

    def _waiting(self, name: str, study: str) -> Iterator[Job]:
        """Yield a job for each waiting run of a study of the optimizer ``name``."""
        for _ in self.studies[study].get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            yield lambda: self._run_one(name, study)

    def trials(self) -> Iterator[Job]:
        """Yield a job for each waiting trial, the optimizers taking turns."""
        yield from _in_turns([self._waiting(name, name) for name in self.sweep.optimizers])

    def rejudged(self) -> Iterator[Job]:
        """Yield a job for each waiting run of the best trials on further seeds.

        All trials must have ended.
        """

        def waiting(name: str) -> Iterator[Job]:
            best = self._ranked(name)[: self.sweep.rejudged]
            seeds = self.sweep.rejudge_seeds
            self._enqueue(
                f"{name}{REJUDGED}",
                [{"seed": seed, "trial": one.user_attrs["index"], **_options(one)} for seed in seeds for one in best],
            )
            yield from self._waiting(name, f"{name}{REJUDGED}")

        if self.sweep.rejudged:
            yield from _in_turns([waiting(name) for name in self.sweep.optimizers])

    def finals(self) -> Iterator[Job]:
        """Yield a job for each waiting run of a winner."""

        def waiting(name: str) -> Iterator[Job]:
            best = self.best(name)
            if best is None or not self.sweep.final_seeds:
                return
            # The complete model and not only the searched options, because an overlay replaces a track's options where
            # the command line adds to them.
            saved = yaml.safe_load((Path(best.user_attrs["folder"]) / "config.yaml").read_text(encoding="utf-8"))
            self._write(f"{name}-winner.yaml", {"model": saved["model"]})
            self._enqueue(f"{name}{FINAL}", [{"seed": seed, **_options(best)} for seed in self.sweep.final_seeds])
            yield from self._waiting(name, f"{name}{FINAL}")

        yield from _in_turns([waiting(name) for name in self.winners()])

    def winners(self) -> list[str]:
        """Return the best optimizer of each family, in the order of the sweep's file."""
        families: dict[str, list[tuple[tuple[float, float], str]]] = {}
        for name, spec in self.sweep.optimizers.items():
            best = self.best(name)
            judged = (math.inf, math.inf) if best is None else self._judged(name, best)
            families.setdefault(spec.family or name, []).append((judged, name))
        best_names = {min(members, key=lambda member: member[0])[1] for members in families.values()}
        return [name for name in self.sweep.optimizers if name in best_names]

    def best(self, name: str) -> FrozenTrial | None:
        """Return the winning trial: by the objective or else the fallback metric.

        If the best trials ran on further seeds, the mean over all seeds decides.
        """
        return min(
            self._ranked(name)[: max(1, self.sweep.rejudged)], key=lambda one: self._judged(name, one), default=None
        )

    def _ranked(self, name: str) -> list[FrozenTrial]:
        """Return the trials that have a value, the best ones first."""
        done = self.studies[name].get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        reached = sorted(done, key=lambda one: self._sign * (one.value or 0.0))
        missed = self.studies[name].get_trials(deepcopy=False, states=(TrialState.PRUNED,))
        values = [(self.sweep.objective.fallback_value(trial.summary(one.user_attrs["folder"])), one) for one in missed]
        judged = [(value, one) for value, one in values if value is not None]
        return reached + [one for _, one in sorted(judged, key=lambda pair: -pair[0])]

    def _judged(self, name: str, candidate: FrozenTrial) -> tuple[float, float]:
        """Return on how many seeds a trial missed the objective, and its mean on the others.

        The smallest of these pairs is the best.
        """
        values = self.values(name, candidate)
        reached = [self._sign * value for value in values if value is not None]
        return len(values) - len(reached), math.fsum(reached) / len(reached) if reached else 0.0

    def values(self, name: str, candidate: FrozenTrial) -> list[float | None]:
        """Return a trial's objective on each of its seeds, ``None`` where it was missed."""
        values = [candidate.value]
        if f"{name}{REJUDGED}" in self.studies:
            values += [
                other.value
                for other in self.studies[f"{name}{REJUDGED}"].get_trials(deepcopy=False)
                if other.state in (TrialState.COMPLETE, TrialState.PRUNED)
                and json.loads(other.user_attrs["options"]["trial"]) == candidate.user_attrs["index"]
            ]
        return values

    @property
    def _sign(self) -> int:
        return 1 if self.sweep.objective.direction == "minimize" else -1

    def _budget(self, name: str) -> int | None:
        """Return the gradient evaluations at which a trial is stopped, if any."""
        if self.sweep.early_stop_factor is None:
            return None
        best = next(iter(self._ranked(name)), None)
        return None if best is None or best.value is None else math.ceil(self.sweep.early_stop_factor * best.value)

    def _run_one(self, name: str, study_name: str) -> None:
        study, spec = self.studies[study_name], self.sweep.optimizers[name]
        with self.lock:
            asked = study.ask()
            suggest(asked, spec.space)
            budget = self._budget(name) if study_name == name else None
        index, options = asked.user_attrs["index"], _options(asked)
        seed = options.pop("seed", self.sweep.trial_seed)
        is_final = study_name == f"{name}{FINAL}"
        number = None if is_final else options.pop("trial", index)
        log = self.folder / "logs" / f"{study_name}-{index:03d}.log"
        arguments = self._arguments(name, spec, number, seed, options)
        if budget is not None:
            arguments += ["--trainer.callbacks+", "callbacks.evaluation_budget.EvaluationBudget"]
            arguments += ["--trainer.callbacks.gradient_evaluations", str(budget)]
        outcome = self.runner(self.context, arguments, log)
        if outcome.code != 0 and not (outcome.folder and Path(outcome.folder).is_dir()):
            # No run folder, so the run did not diverge: its options are invalid.
            lines = log.read_text(encoding="utf-8").strip().splitlines() or ["it was killed"]
            raise ValueError(f"{study_name} {index} could not start: {lines[-1].removeprefix('error: ')}")
        value = None
        if outcome.code == 0:
            value = self.sweep.objective.value(outcome.summary)
        with self.lock:
            asked.set_user_attr("folder", outcome.folder)
            if outcome.code == 0 and value is not None:
                study.tell(asked.number, value)
            else:
                # A diverged run counts as a trial that did not reach the target.
                study.tell(asked.number, state=TrialState.PRUNED)
        reached = "did not reach it" if value is None else f"{value:.6g}"
        self.report(
            f"{study_name} {index}: {reached}" if outcome.code == 0 else f"{study_name} {index}: ended, see {log}"
        )

    def _arguments(
        self, name: str, spec: OptimizerSpec, trial_number: int | None, seed: int, options: dict[str, Any]
    ) -> list[str]:
        """Return the command line of a trial, or without its number of a winner's run."""
        arguments = ["fit"]
        for config in (*spec.configs, str(self.folder / f"{name}.yaml")):
            arguments += ["--config", config]
        experiment = f"{name}{FINAL}" if trial_number is None else name
        arguments += ["--runs", str(self.folder), "--experiment", experiment, "--wandb", "false"]
        arguments += ["--sweep.name", self.sweep.name, "--sweep.optimizer", name]
        if trial_number is not None:
            arguments += ["--sweep.trial", str(trial_number)]
        for option in self.sweep.seeded:
            arguments += [f"--{option}", str(seed)]
        for option, value in options.items():
            arguments += [f"--{option}", _text(value)]
        if trial_number is None and self.sweep.final:
            self._write("final.yaml", self.sweep.final)
            # Last, because trainer.callbacks.<option> above is of the last callback so far.
            arguments += ["--config", str(self.folder / "final.yaml")]
        return arguments

    def _write(self, name: str, content: dict[str, Any]) -> None:
        temporary = self.folder / f"{name}.{threading.get_ident()}.tmp"
        temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        os.replace(temporary, self.folder / name)


def _options(of: optuna.Trial | FrozenTrial) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in of.user_attrs["options"].items()}


def _in_turns(sources: list[Iterator[Job]]) -> Iterator[Job]:
    return (job for job in chain.from_iterable(zip_longest(*sources)) if job is not None)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``over`` merged into it recursively."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def run_jobs(jobs: Iterator[Job], workers: int, advanced: Callable[[], None]) -> None:
    """Run jobs concurrently; the first error cancels waiting ones and is raised."""
    with ThreadPoolExecutor(workers) as pool:
        running: set[Future[None]] = set()
        try:
            for job in jobs:
                running.add(pool.submit(job))
                while len(running) >= workers:
                    running = _next(running, advanced)
            while running:
                running = _next(running, advanced)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _next(running: set[Future[None]], advanced: Callable[[], None]) -> set[Future[None]]:
    done, rest = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
        advanced()
    return rest
