"""Implement the complete ARS2-Neo step in float64, one tensor at a time.

It is slow, plain, and independent of the `ars2` package. It exists to be compared with: nothing is batched, nothing is
done in place that need not be, and every line can be checked against the algorithm's equations.
"""

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradients = list[Tensor | None]

JORDAN = (3.4445, -4.7750, 2.0315)
# The published equations add 1e-7 and 1e-12 to norms, by which results depend on the scale of the gradients.
LEAST_NORM = 1e-30
MODES = ("base", "sync", "aga", "periodic", "random", "late", "momentum")


def reference_newton_schulz(
    matrix: Tensor, steps: int = 5, coefficients: tuple[float, float, float] = JORDAN
) -> Tensor:
    """Move one 2-D matrix towards the nearest orthogonal one, in float64.

    `coefficients` (a, b, c) define the odd quintic a x + b x^3 + c x^5 that each of the `steps` applies to the
    singular values, after division by the Frobenius norm.
    """
    if matrix.ndim != 2:
        raise ValueError(f"One 2-D matrix is expected, got a tensor of shape {tuple(matrix.shape)}; pass its slices.")
    a, b, c = coefficients
    x = matrix.double()
    x = x / x.norm().clamp_min(LEAST_NORM)
    transposed = x.shape[0] > x.shape[1]
    if transposed:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if transposed else x


def polar_factor(matrix: Tensor) -> Tensor:
    """Return U V^T of the singular value decomposition, in float64.

    It is the nearest matrix with orthonormal rows or columns.
    """
    u, _, v_transposed = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ v_transposed


def geometry(update: Tensor, flatten: bool, steps: int) -> Tensor:
    """Apply Newton-Schulz to a parameter of any number of dimensions.

    A 2-D parameter is taken as it is and a 3-D one matrix by matrix (unless `flatten`). All others are read as (rows,
    rest).
    """
    if update.ndim < 2:
        raise ValueError(f"The matrix track takes tensors of 2 dimensions or more, got shape {tuple(update.shape)}.")
    if update.ndim == 3 and not flatten:
        return torch.stack([reference_newton_schulz(matrix, steps) for matrix in update])
    return reference_newton_schulz(update.reshape(update.shape[0], -1), steps).reshape(update.shape)


def number_of_singular_values(update: Tensor, flatten: bool) -> int:
    """Return the square of the norm of the exact orthogonal factor, over all matrices of a stack."""
    if update.ndim == 3 and not flatten:
        return update.shape[0] * min(update.shape[1:])
    return min(update.shape[0], update[0].numel())


class ReferenceARS2:
    """Follow the published equations of ARS2-Neo.

    `groups`: dicts with "params" (float64 tensors, changed in place), "track" ("matrix" or "vector"), "lr", "betas",
    "eps", "weight_decay", "rho" and, optionally, "flatten" (False), "cautious" (False), "relative_rho" (False) and
    "adjust_lr_fn" ("original").
    `draw` decides in mode "random": step number (from 1) -> whether to make a second pass. Without it a private
    generator draws with `probability`. Every list below has one entry a parameter, in flat order over the groups.
    `energy` (True, False, "whitening" or "scalar") and `geometry` are the switches of the matrix track.
    `history` gets one record a step; its "threshold" is the value that phi must fall below, so it is never positive.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        mode: str,
        k: int = 0,
        alpha: float = 0.1,
        phi_beta: float = 0.99,
        phi_lambda: float = 2.0,
        phi_gamma: float = 2.0,
        ns_steps: int = 5,
        probability: float = 0.1,
        draw: Callable[[int], bool] | None = None,
        energy: bool | str = True,
        geometry: bool = True,
        late_start: float = 0.5,
        total_steps: int = 0,
        rho_per_step: bool = False,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}.")
        if mode == "periodic" and k < 1:
            raise ValueError(f"k is {k}; mode 'periodic' needs 1 or more.")
        self.mode, self.k, self.ns_steps = mode, k, ns_steps
        self.energy, self.geometry, self.rho_per_step = energy, geometry, rho_per_step
        self.scales_entries = energy in (True, "whitening")
        self.steps_with_one_pass = late_start * total_steps
        self.alpha, self.phi_beta, self.phi_lambda, self.phi_gamma = alpha, phi_beta, phi_lambda, phi_gamma
        generator = random.Random(0)
        self.draw = draw or (lambda t: generator.random() < probability)
        self.keeps_shear = mode in ("aga", "random") or (mode == "periodic" and k > 1)

        self.params: list[Tensor] = [p for group in groups for p in group["params"]]
        self.options: list[dict[str, Any]] = [group for group in groups for _ in group["params"]]
        if any(p.dtype != torch.float64 for p in self.params):
            raise TypeError("The reference works in float64; convert every parameter with .double().")
        self.exp_avg = [torch.zeros_like(p, requires_grad=False) for p in self.params]
        self.exp_avg_sq = [torch.zeros_like(p, requires_grad=False) for p in self.params]
        self.shear = [torch.zeros_like(p, requires_grad=False) for p in self.params]
        self.counts = [0] * len(self.params)  # gradients in each parameter's moments
        self.t = self.last_sync = 0
        self.variance = 0.0
        self.history: list[dict[str, Any]] = []

    @torch.no_grad()
    def step(self, gradient_function: Callable[[], Gradients]) -> None:
        """Make one update.

        `gradient_function` returns the gradients at the parameters as they are when it is called.
        """
        self.t += 1
        if self.mode == "momentum":
            # The bias correction of the momentum is a factor, which the normalised move does not depend on.
            first = self.evaluate_at_adversarial_point(list(self.exp_avg), gradient_function)
        else:
            first = self.evaluate(gradient_function)

        phi = self.cosine_with_shear(first)
        alpha_t = self.alpha
        if self.mode == "aga":
            if self.t == 1:
                self.variance = phi**2
            elif self.t - self.last_sync > 1:
                self.variance = self.phi_beta * self.variance + (1 - self.phi_beta) * phi**2
            alpha_t = self.alpha * (1 + max(0.0, phi)) ** self.phi_gamma
        threshold = -self.phi_lambda * math.sqrt(self.variance)
        synced = self.wants_second_pass(phi, threshold)

        if synced:
            second = self.evaluate_at_adversarial_point(first, gradient_function)
            if self.keeps_shear:
                self.cache_shear(first, second)
            self.last_sync = self.t
            self.update(second)
        else:
            self.update(self.inject_shear(first, alpha_t))

        self.history.append(
            dict(t=self.t, synced=synced, phi=phi, variance=self.variance, threshold=threshold, alpha=alpha_t)
        )

    def evaluate(self, gradient_function: Callable[[], Gradients]) -> Gradients:
        with torch.enable_grad():
            gradients = gradient_function()
        # Cloned, because the caller may hand out the same buffers again for the second pass.
        return [None if g is None else g.detach().clone() for g in gradients]

    def cosine_with_shear(self, gradients: Gradients) -> float:
        """Return one cosine over all tensors with both a shear force and a gradient.

        It is 0 if there is no such tensor.
        """
        inner = gradient_square = shear_square = 0.0
        for g, s in zip(gradients, self.shear, strict=True):
            if g is not None and s.any():
                inner += (g * s).sum().item()
                gradient_square += (g * g).sum().item()
                shear_square += (s * s).sum().item()
        return inner / max(math.sqrt(gradient_square) * math.sqrt(shear_square), LEAST_NORM**2)

    def wants_second_pass(self, phi: float, threshold: float) -> bool:
        if self.mode in ("base", "momentum"):
            return False
        if self.mode == "late":
            return self.t > self.steps_with_one_pass
        if self.mode == "sync" or self.t == 1:
            return True
        if self.mode == "periodic":
            return self.t % self.k == 1 % self.k
        if self.mode == "random":
            return bool(self.draw(self.t))
        return phi < threshold or (self.k > 1 and self.t - self.last_sync >= self.k)

    def evaluate_at_adversarial_point(self, first: Gradients, gradient_function: Callable[[], Gradients]) -> Gradients:
        originals = [p.clone() for p in self.params]
        for p, g, v, count, options in zip(self.params, first, self.exp_avg_sq, self.counts, self.options, strict=True):
            if g is None:
                continue
            beta2 = options["betas"][1]
            v_hat_previous = v / (1 - beta2**count) if count > 0 else torch.zeros_like(v)
            metric = (
                v_hat_previous.sqrt() + options["eps"] if self.scales_entries or options["track"] == "vector" else 1.0
            )
            n = g / metric * p.abs()
            rho = options["rho"] * (self.t - self.last_sync if self.rho_per_step else 1)
            rho = rho * p.norm() if options.get("relative_rho") else rho
            p.copy_(p + rho * n / n.norm().clamp_min(LEAST_NORM))
        try:
            return self.evaluate(gradient_function)
        finally:
            for p, original in zip(self.params, originals, strict=True):
                p.copy_(original)

    def cache_shear(self, first: Gradients, second: Gradients) -> None:
        for i, (g, g_adversarial) in enumerate(zip(first, second, strict=True)):
            if g is not None and g_adversarial is not None:
                parallel = (g_adversarial * g).sum() / g.norm().clamp_min(LEAST_NORM) ** 2
                self.shear[i] = g_adversarial - parallel * g

    def inject_shear(self, gradients: Gradients, alpha_t: float) -> Gradients:
        injected: Gradients = []
        for g, s in zip(gradients, self.shear, strict=True):
            if g is not None and s.any():
                g = g + alpha_t * g.norm() / s.norm().clamp_min(LEAST_NORM) * s
            injected.append(g)
        return injected

    def update(self, gradients: Gradients) -> None:
        for i, (p, g, options) in enumerate(zip(self.params, gradients, self.options, strict=True)):
            if g is None:
                continue
            lr, (beta1, beta2) = options["lr"], options["betas"]
            self.exp_avg[i] = beta1 * self.exp_avg[i] + (1 - beta1) * g
            self.exp_avg_sq[i] = beta2 * self.exp_avg_sq[i] + (1 - beta2) * g * g
            self.counts[i] += 1
            m_hat = self.exp_avg[i] / (1 - beta1 ** self.counts[i])
            v_hat = self.exp_avg_sq[i] / (1 - beta2 ** self.counts[i])
            u = m_hat / (v_hat.sqrt() + options["eps"])
            if options["track"] == "matrix" and self.energy is not True:
                direction = u if self.scales_entries else self.exp_avg[i]
                length = u.norm() if self.energy == "scalar" else math.sqrt(u.numel())
                u = length * direction / direction.norm().clamp_min(LEAST_NORM)
            if options["track"] == "matrix" and self.geometry:
                length = u.norm()
                if options.get("adjust_lr_fn") == "match_rms_adamw":
                    length = length / math.sqrt(number_of_singular_values(u, options.get("flatten", False)))
                u = length * geometry(u, options.get("flatten", False), self.ns_steps)
            decayed = (u * p >= 0).double() if options.get("cautious") else 1.0
            p.copy_((1 - lr * options["weight_decay"] * decayed) * p - lr * u)
