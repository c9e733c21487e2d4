"""Measure the singular values that few Newton-Schulz steps reach on real directions.

    python -m studies.newton_schulz_steps record     # three minutes: trains, and records the directions
    python -m studies.newton_schulz_steps design     # makes schedules for exactly two and three steps
    python -m studies.newton_schulz_steps measure    # the table, the CSV file and the picture
    OMP_NUM_THREADS=1 python -m studies.newton_schulz_steps clock    # the time of the optimizer's step

``record`` trains the tuned winners of ARS2-Neo Base and Sync once more on each task, with seed 0, and records Adam's
directions u of all matrices at chosen steps. ``design`` minimises the root mean square of p(s) - 1 over their singular
values s, where p is the composition of two or three odd quintic polynomials. ``measure`` orthogonalizes the directions
in the dtype of the configs, and reports the singular values of the results by candidate. ``clock`` times Base's
``step()`` on matrices of the recorded shapes in the processor's time. The candidates take turns, and times are medians.
"""

import argparse
import csv
import os
import sys
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from scipy import optimize
from torch import Tensor

from analysis.palette import styles
from analysis.style import on_white, svg
from ars2 import ARS2Neo, newton_schulz, orthogonalize
from experiment.folders import RunFolder

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "results" / "newton_schulz_steps"
RECORDED = Path("runs/newton_schulz_directions")
FILE = "directions.pt"
# Task, mode: the study with the tuned winner, its row, and the steps to record.
WINNERS = {
    ("grok", "base"): ("grok_tuned", "base_all", (1, 3, 10, 30, 60, 100)),
    ("cifar_mini", "base"): ("cifar_mini_tuned", "base", (1, 3, 10, 30, 100, 200)),
    ("wikitext2_nano", "base"): ("wikitext2_nano_tuned", "base", (1, 3, 10, 100, 300, 1000)),
    ("grok", "sync"): ("grok_tuned", "sync_all", (1, 3, 10, 30, 60, 120)),
    ("cifar_mini", "sync"): ("cifar_mini_tuned", "sync", (1, 3, 10, 30, 60, 100)),
    ("wikitext2_nano", "sync"): ("wikitext2_nano_tuned", "sync", (1, 3, 10, 100, 300, 500)),
}


class RecordDirections(Callback):
    """Save Adam's directions of all matrices after chosen steps, in the run's folder."""

    changes_training = False

    def __init__(self, steps: list[int]) -> None:
        self.steps, self.directions = set(steps), dict[int, list[Tensor]]()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        (optimizer,) = trainer.optimizers
        step = int(optimizer.diagnostics()["steps"])  # type: ignore[attr-defined]
        if step in self.steps and step not in self.directions:
            self.directions[step] = [
                matrix.clone()
                for group in optimizer.param_groups
                if group["track"] == "matrix"
                for state in [optimizer.state[param] for param in group["params"]]
                for matrix in matrices(direction(state, group["betas"], group["eps"]), group["flatten"])
            ]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = RunFolder.current()
        assert folder is not None
        torch.save(self.directions, Path(str(folder)) / FILE)


def direction(state: dict[str, Tensor], betas: tuple[float, float], eps: float) -> Tensor:
    """Return u = m_hat / (sqrt(v_hat) + eps), from the state after a step."""
    first, second = (1 - beta ** state["step"].item() for beta in betas)
    return (state["exp_avg"] / first) / ((state["exp_avg_sq"] / second).sqrt() + eps)


def matrices(u: Tensor, flatten: bool) -> list[Tensor]:
    """Return the matrices of a direction: those of a stack (3-D, not flattened), else a single one."""
    return list(u) if u.ndim == 3 and not flatten else [u.flatten(1)]


def winner(study: str, row: str) -> dict[str, Any]:
    """Return the complete config of the first run of a study's winner."""
    with zipfile.ZipFile(ROOT / "results" / study / "runs.zip") as archive:
        names = sorted(n for n in archive.namelist() if n.startswith(f"{row}-final/") and n.endswith("/config.yaml"))
        config: dict[str, Any] = yaml.safe_load(archive.read(names[0]))
    return {**config, "sweep": None}


def record() -> None:
    """Train each winner once, and record its directions."""
    from launch import trial

    context = trial.server()
    for (task, mode), (study, row, steps) in WINNERS.items():
        name = f"{task}_{mode}"
        if any((RECORDED / name).glob(f"*/{FILE}")):
            continue
        config = {**winner(study, row), "experiment": name, "runs": str(RECORDED)}
        recorder = {"class_path": f"{__spec__.name}.RecordDirections", "init_args": {"steps": list(steps)}}
        config["trainer"] = {**config["trainer"], "callbacks": [*config["trainer"]["callbacks"], recorder]}
        RECORDED.mkdir(parents=True, exist_ok=True)
        file = RECORDED / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        outcome = trial.run(context, ["fit", "--config", str(file)], RECORDED / f"{name}.log")
        print(f"{name}: exit code {outcome.code}, {outcome.folder}", flush=True)


def recorded() -> dict[tuple[str, str], dict[int, list[Tensor]]]:
    """Return the matrices of the recorded directions by task and mode, and step."""
    files = {key: sorted((RECORDED / "_".join(key)).glob(f"*/{FILE}")) for key in WINNERS}
    return {key: torch.load(found[-1], weights_only=True) for key, found in files.items() if found}


def relative_values(u: Tensor) -> np.ndarray:
    """Return the singular values of a direction over its Frobenius norm, where Newton-Schulz starts."""
    values = torch.linalg.svdvals(u.double())
    return (values / values.norm()).numpy()


def compose(schedule: Iterable[Any], values: np.ndarray) -> np.ndarray:
    """Apply the polynomials ``a s + b s^3 + c s^5`` of a schedule one after another."""
    for a, b, c in schedule:
        values = a * values + b * values**3 + c * values**5
    return values


def pooled() -> tuple[np.ndarray, np.ndarray]:
    """Return the singular values of all directions of Base, and their weights.

    Tasks have equal weights, and so have the matrices and steps of a task, and the values of a matrix.
    """
    values, weights = [], []
    for (_, mode), steps in recorded().items():
        found = [relative_values(u) for directions in steps.values() for u in directions]
        if mode == "base":
            values += found
            weights += [np.full(len(one), 1 / len(one) / len(found)) for one in found]
    joined = np.concatenate(weights)
    return np.concatenate(values), joined / joined.sum()


def designed(count: int, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return a schedule (count, 3) that minimises the weighted mean square of p(s) - 1.

    A penalty keeps p(s) at most 1.25 on all of [0, 1], and at least 0.5 above s = 0.2, where there are few values. The
    search starts at the first polynomials of Polar Express.
    """
    # Bins of the values are as good and a hundred times as fast.
    edges = np.geomspace(1e-4, 1, 241)
    bins = np.digitize(values, edges)
    mass, total = np.bincount(bins, weights), np.bincount(bins, weights * values)
    centres, mass = total[mass > 0] / mass[mass > 0], mass[mass > 0]
    grid = np.linspace(0, 1, 401)

    def residuals(flat: np.ndarray) -> np.ndarray:
        schedule = flat.reshape(-1, 3)
        reached = compose(schedule, grid)
        low = np.maximum(0.5 - reached, 0)[grid > 0.2]
        deviation = np.sqrt(mass) * (compose(schedule, centres) - 1)
        return np.concatenate([deviation, 0.15 * np.maximum(reached - 1.25, 0), 0.15 * low])

    start = np.ravel(newton_schulz.schedule("polar_express", count))
    return np.asarray(optimize.least_squares(residuals, start, max_nfev=1000).x).reshape(-1, 3)


def design() -> None:
    """Print the schedules for exactly two and three steps as YAML."""
    values, weights = pooled()
    for count in (3, 2):
        rounded = designed(count, values, weights).round(4)
        error = np.sqrt((weights * (compose(rounded.tolist(), values) - 1) ** 2).sum())
        print(f"made_{count}: {{ns_steps: {count}, ns_coefficients: {rounded.tolist()}}}  # deviation {error:.4f}")


def candidates() -> dict[str, tuple[int, Any]]:
    """Return steps and coefficients by name: those of the protocol, and two more of Polar Express."""
    settings = yaml.safe_load((FOLDER / "protocol.yaml").read_text(encoding="utf-8"))["settings"]
    found = {name: (options["ns_steps"], options["ns_coefficients"]) for name, options in settings.items()}
    return {**found, "polar_express_5": (5, "polar_express"), "polar_express_2": (2, "polar_express")}


def reached(u: Tensor, steps: int, coefficients: Any) -> tuple[np.ndarray, float]:
    """Return the singular values of the orthogonalized direction, and its deviation from the polar factor.

    The deviation is ``|O - U V^T| / sqrt(rank)`` for u = U S V^T, with all singular vectors.
    """
    result = orthogonalize(u, steps, coefficients).double()
    left, _, right = torch.linalg.svd(u.double(), full_matrices=False)
    deviation = (result - left @ right).norm() / min(u.shape) ** 0.5
    return torch.linalg.svdvals(result).numpy(), deviation.item()


def measure() -> None:
    """Orthogonalize the recorded directions by each candidate; write the CSV file, the table and the picture."""
    rows: list[dict[str, Any]] = []
    for (task, mode), steps in recorded().items():
        for step, directions in steps.items():
            for candidate, (count, coefficients) in candidates().items():
                pairs = [reached(u, count, coefficients) for u in directions]
                rows.append({"task": task, "mode": mode, "step": step, "candidate": candidate, **statistics(pairs)})
    with open(FOLDER / "singular_values.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    text = table(rows)
    (FOLDER / "singular_values.md").write_text(text, encoding="utf-8")
    print(text)
    (FOLDER / "singular_values.svg").write_text(on_white(svg(draw())), encoding="utf-8")


def statistics(pairs: list[tuple[np.ndarray, float]]) -> dict[str, float]:
    """Return statistics to four digits of the results at one step, in which every matrix has the same weight."""
    values = np.concatenate([found for found, _ in pairs])
    weights = np.concatenate([np.full(len(found), 1 / len(found) / len(pairs)) for found, _ in pairs])
    quantiles = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95), weights=weights, method="inverted_cdf")
    found = {
        "smallest": float(values.min()),
        **dict(zip(("q05", "q25", "median", "q75", "q95"), map(float, quantiles), strict=True)),
        "largest": float(values.max()),
        "share": float(weights[(values >= 0.7) & (values <= 1.3)].sum()),
        "rms": float(np.sqrt((weights * values**2).sum())),
        "deviation": float(np.sqrt(np.mean([deviation**2 for _, deviation in pairs]))),
    }
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Return a table for each task and mode, in Markdown: means over the recorded steps."""
    parts = [
        "Singular values after Newton-Schulz on recorded directions: means over the recorded steps, every matrix with"
        " the same weight. *Share* is the part of the values in [0.7, 1.3], *rms* their root mean square, which scales"
        " the update, and *deviation* the distance to the polar factor over the square root of the rank.\n"
    ]
    columns = ("q05", "median", "q95", "largest", "share", "rms", "deviation")
    for task, mode in dict.fromkeys((row["task"], row["mode"]) for row in rows):
        parts.append(f"## {task}, {mode}\n\n| candidate | {' | '.join(columns)} |\n{'| --- ' * (len(columns) + 1)}|")
        for candidate in candidates():
            chosen = [r for r in rows if (r["task"], r["mode"], r["candidate"]) == (task, mode, candidate)]
            cells = [f"{np.mean([row[column] for row in chosen]):.2f}" for column in columns]
            parts.append(f"| {candidate} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def draw() -> Figure:
    """Draw the candidates' polynomials, above the distribution of the values that they start from."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    grid = np.geomspace(1e-3, 1, 800)
    above.axhspan(0.7, 1.3, color="#8a8f98", alpha=0.15, linewidth=0)
    shown = [name for name in candidates() if name not in ("polar_express_5", "polar_express_2")]
    for name, style in zip(shown, styles(shown), strict=True):
        count, coefficients = candidates()[name]
        margin = newton_schulz.POLAR_EXPRESS_MARGIN if coefficients == "polar_express" else 1.0
        schedule = newton_schulz.schedule(coefficients, count)
        above.plot(grid, compose(schedule, grid / margin), label=name, linewidth=1.3, **style.line)
    above.set_ylabel("singular value after")
    above.legend(frameon=False, fontsize=7, ncols=2)
    for ((task, mode), steps), style in zip(recorded().items(), styles([f"{one}" for one in recorded()]), strict=True):
        values = [relative_values(u) for directions in steps.values() for u in directions]
        weights = np.concatenate([np.full(len(one), 1 / len(one) / len(values)) for one in values])
        if mode == "base":
            bins = np.geomspace(1e-3, 1, 60)
            below.hist(np.concatenate(values), bins, weights=weights, histtype="step", label=task, **style.line)
    below.set(xscale="log", xlabel="singular value before, over the Frobenius norm", ylabel="share")
    below.legend(frameon=False, fontsize=7, loc="upper left")
    return figure


def clock(seconds: float = 1.0) -> None:
    """Print the milliseconds of ``step()`` by task and candidate, and write them to ``step_time.txt``."""
    shown = [name for name in candidates() if not name.startswith("polar")]
    lines = [
        f"torch {torch.__version__}, {torch.get_num_threads()} thread, milliseconds of the processor's time a step"
    ]
    lines.append(f"{'task':<16}" + "".join(f"{name:>10}" for name in shown))
    for (task, mode), steps in recorded().items():
        if mode == "base":
            times = step_times(next(iter(steps.values())), shown, seconds)
            lines.append(f"{task:<16}" + "".join(f"{1e3 * float(np.median(times[name])):>10.3f}" for name in shown))
    text = "\n".join(lines) + "\n"
    (FOLDER / "step_time.txt").write_text(text, encoding="utf-8")
    print(text)


def step_times(gradients: list[Tensor], names: list[str], seconds: float) -> dict[str, list[float]]:
    """Return the seconds of Base's steps by candidate, which alternate for ``seconds`` each."""
    optimizers = {}
    for name in names:
        params = [torch.nn.Parameter(torch.zeros_like(one)) for one in gradients]
        for param, one in zip(params, gradients, strict=True):
            param.grad = one.clone()
        count, coefficients = candidates()[name]
        groups = [{"params": params, "track": "matrix"}]
        optimizers[name] = ARS2Neo(groups, mode="base", ns_steps=count, ns_coefficients=coefficients)
    times: dict[str, list[float]] = {name: [] for name in names}
    while sum(times[names[-1]]) < seconds:
        for name, optimizer in optimizers.items():
            for _ in range(5):  # the first has cold caches
                start = time.process_time()
                optimizer.step()
                times[name].append(time.process_time() - start)
    return times


def main() -> int:
    """Run one of the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("record", "design", "measure", "clock"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    {"record": record, "design": design, "measure": measure, "clock": clock}[options.part]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
