"""Decide which steps are two-pass steps, and report on these decisions.

Every function takes the first group of the optimizer, which has the options and counters. Decisions depend only on
these, on the number of the step and on phi, so that a resumed run decides alike, and so do ranks with equal phi.
"""

import math
import random
from typing import Any, Literal, get_args

from ars2 import validation

Mode = Literal["base", "sync", "aga", "periodic", "random", "late", "momentum"]
MODES: tuple[Mode, ...] = get_args(Mode)
# In the first group only. "interval" is the number of steps from one two-pass step to the next.
COUNTERS = {"sync_steps": 0, "last_sync": 0, "phi": 0.0, "phi_variance": 0.0, "injected_alpha": 0.0, "interval": 0}
# With two passes at some steps only, these modes use the shear force at the others.
_MODES_BETWEEN = ("aga", "periodic", "random")


def check_options(group: dict[str, Any]) -> None:
    """Check the options of the schedule.

    Raises:
        ValueError: an option is out of its range, or does not suit the mode.
    """
    mode = group["mode"]
    validation.check_choice(group, "mode", MODES)
    for name in ("alpha", "phi_lambda", "phi_gamma"):
        validation.check_number(group, name, 0.0)
    validation.check_number(group, "phi_beta", 0.0, 1.0)
    validation.check_number(group, "probability", 0.0, 1.0, closed_maximum=True)
    validation.check_integer(group, "seed", 0)
    validation.check_number(group, "late_start", 0.0, 1.0, closed_maximum=True)
    validation.check_integer(group, "total_steps", 0)
    if mode == "late" and group["total_steps"] < 1:
        raise ValueError('mode "late" needs total_steps, the number of optimizer steps of the training')
    validation.check_choice(group, "rho_per_step", (False, True))
    if group["rho_per_step"] and mode not in _MODES_BETWEEN:
        raise ValueError(f"rho_per_step needs one of the modes {', '.join(_MODES_BETWEEN)}, got {mode!r}: leave it out")
    validation.check_integer(group, "k", 1 if mode == "periodic" else 0)
    largest = {"base": 0, "random": 0, "late": 0, "momentum": 0, "sync": 1}.get(mode, group["k"])
    if group["k"] > largest:
        raise ValueError(
            f"k must be at most {largest} in mode {mode!r}, got {group['k']}:"
            ' set a period only in mode "periodic" or "aga"'
        )


def keeps_shear(group: dict[str, Any]) -> bool:
    """Return whether one-pass steps inject shear forces, which need a state tensor."""
    return group["mode"] in ("aga", "random") or (group["mode"] == "periodic" and group["k"] > 1)


def is_sync_step(group: dict[str, Any], t: int, phi: float, variance: float) -> bool:
    """Decide by the mode of ``group`` whether step ``t`` makes a second pass.

    Steps count from 1.
    """
    mode, k = group["mode"], int(group["k"])
    if mode == "late":
        return t > group["late_start"] * group["total_steps"]
    if mode == "periodic":
        return (t - 1) % k == 0
    if mode == "random":
        # Seed and step determine the draw, so that all ranks and a resumed run agree without any state.
        return t == 1 or random.Random(f"{group['seed']}:{t}").random() < float(group["probability"])
    if mode == "aga":
        drifted = phi < -float(group["phi_lambda"]) * math.sqrt(variance)
        return drifted or t == 1 or (k > 1 and t - int(group["last_sync"]) >= k)
    return bool(mode == "sync")


def next_variance(group: dict[str, Any], phi: float, t: int) -> float:
    """Return AGA's running mean of phi^2 at step ``t``.

    The step right after a sync step does not count, because the fresh cache biases its phi.

    Args:
        group: the first group, with the counters of the previous step.
        phi: the global cosine of this step.
        t: number of the step, from 1.
    """
    variance: float = group["phi_variance"]
    beta: float = group["phi_beta"]
    if t == 1:
        return phi**2
    return beta * variance + (1 - beta) * phi**2 if t - group["last_sync"] > 1 else variance


def injected_alpha(group: dict[str, Any], phi: float, synced: bool) -> float:
    """Return the strength of the shear force in this step, 0 if none is injected."""
    if synced or not keeps_shear(group):
        return 0.0
    strength: float = group["alpha"]
    return strength * (1 + max(0.0, phi)) ** group["phi_gamma"] if group["mode"] == "aga" else strength


def rho_scale(group: dict[str, Any]) -> int:
    """Return the factor of rho in a two-pass step.

    Under ``rho_per_step`` it is the number of steps since the last one. A second pass after k steps at k times rho
    follows Composer's SAM.
    """
    return int(group["step"]) + 1 - int(group["last_sync"]) if group["rho_per_step"] else 1


def diagnostics(group: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of :meth:`ars2.ARS2Neo.diagnostics`."""
    steps, sync_steps = int(group["step"]), int(group["sync_steps"])
    report = {
        "steps": float(steps),
        "sync_steps": float(sync_steps),
        "gradient_evaluations": float(steps + sync_steps),
        "effective_k": steps / sync_steps if sync_steps else math.inf,
    }
    if keeps_shear(group):
        report["alpha"] = group["injected_alpha"]
    if group["rho_per_step"]:
        report["rho"] = group["rho"] * int(group["interval"])
    if group["mode"] == "aga":
        deviation = math.sqrt(group["phi_variance"])
        report |= {"phi": group["phi"], "phi_deviation": deviation, "threshold": -group["phi_lambda"] * deviation}
    return report
