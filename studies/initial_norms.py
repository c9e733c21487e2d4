"""Compare the published rho with the norms of the matrices before training.

    python -m studies.initial_norms    # prints the table of docs/choosing_settings.md

``rho`` is an absolute length. The networks of the three tasks come in several sizes with the same published ``rho``,
which is a different part of their weights. The network of each config is made with the config's seed.
"""

import functools
import importlib
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

CONFIGS = ("grok_sync", "cifar_sync", "cifar_mini_sync", "wikitext2_sync", "wikitext2_mini_sync", "wikitext2_nano_sync")


def rho_and_norm(name: str) -> tuple[float, float]:
    """Return ``rho`` of a config, and the median norm of the matrices of its network."""
    config: dict[str, Any] = yaml.safe_load(Path("configs", f"{name}.yaml").read_text(encoding="utf-8"))
    options = dict(config["model"]["init_args"])
    rho = float(options.pop("optimizer")["init_args"]["rho"])
    options.pop("scheduler", None)
    package, _, kind = config["model"]["class_path"].rpartition(".")
    torch.manual_seed(config["seed_everything"])
    module = getattr(importlib.import_module(package), kind)(
        optimizer=functools.partial(torch.optim.SGD, lr=0.1), **options
    )
    module.configure_model()
    return rho, median(p.norm().item() for p in module.network.parameters() if p.ndim > 1)


def main() -> None:
    """Print the table in Markdown."""
    print("| config | rho | median norm of a matrix | rho over it |\n| --- | --- | --- | --- |")
    for name in CONFIGS:
        rho, norm = rho_and_norm(name)
        print(f"| `{name}` | {rho:g} | {norm:.3g} | {rho / norm:.2g} |", flush=True)


if __name__ == "__main__":
    main()
