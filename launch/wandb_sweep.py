"""Write a sweep as W&B sweep files, for agents on several machines."""

from pathlib import Path
from typing import Any

import yaml

from launch.search import merged
from launch.sweep_specification import Dimension, Sweep


def _parameter(dimension: Dimension) -> dict[str, Any]:
    if dimension.choices is not None:
        return {"values": list(dimension.choices)}
    kind = "log_uniform_values" if dimension.log else "uniform"
    return {"distribution": kind, "min": dimension.low, "max": dimension.high}


def write(sweep: Sweep, folder: Path) -> None:
    """Write a file for ``wandb sweep`` and the base config of each optimizer.

    W&B draws random points instead of the quasi-random ones. The number of trials (``run_cap``) is the same.

    Raises:
        ValueError: a file of this name exists with other contents.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, spec in sweep.optimizers.items():
        base = folder / f"{name}-base.yaml"
        _write(base, merged(spec.options, sweep.common))
        objective = sweep.objective
        # W&B's summary keeps the last logged value.
        metric = f"milestone/{objective.milestone}" if objective.milestone else objective.metric
        configs = [part for config in (*spec.configs, base) for part in ("--config", str(config))]
        seeds = [part for option in sweep.seeded for part in (f"--{option}", str(sweep.trial_seed))]
        content = {
            "program": "train.py",
            "name": f"{sweep.name}-{name}",
            "method": "random",
            "run_cap": sweep.trials,
            "metric": {"name": metric, "goal": objective.direction},
            "parameters": {key: _parameter(dimension) for key, dimension in spec.space.items()},
            "command": ["${interpreter}", "${program}", "fit", *configs, *seeds, "--wandb", "true", "${args}"],
        }
        _write(folder / f"{name}.yaml", content)


def _write(file: Path, content: dict[str, Any]) -> None:
    text = yaml.safe_dump(content, sort_keys=False)
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise ValueError(f"{file} exists with other contents: delete it, or name another folder")
    file.write_text(text, encoding="utf-8")
