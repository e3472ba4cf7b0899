"""Post-hoc EMA: an average of any width, after training, from snapshots of a few.

A power-function average at time t weighs the parameters θ(τ) by

    p(τ) = (γ + 1) τ^γ / t^{γ+1} on [0, t],   σ_rel² = (γ + 1)/((γ + 2)²(γ + 3)),

and any other p_r is approached by a combination Σ_i x_i p_i of the snapshots' profiles, whose
averages it then combines (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
Diffusion Models", section 3 and appendix C). All coefficients are float64.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from files import write_atomically
from files_reading import load_torch


def sigma_rel_of(gamma: float) -> float:
    """The standard deviation of p, as a share of t: √((γ+1)/((γ+2)²(γ+3)))."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def gamma_of(sigma_rel: float) -> float:
    """The exponent γ > 0 of a relative width, the inverse of `sigma_rel_of`.

    The largest root of γ³ + 7γ² + (16 − s)γ + 12 − s = 0 with s = σ_rel⁻².

    Raises: ValueError outside 0 < σ_rel < 1/√12, where 1/√12 is the plain mean.
    """
    if not 0 < sigma_rel < math.sqrt(1 / 12):
        raise ValueError(
            f"a power-function average needs 0 < sigma_rel < {math.sqrt(1 / 12):.4f}, got "
            f"{sigma_rel}; use 0.05 or 0.1"
        )
    s = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - s, 12.0 - s])
    return float(roots.real.max())


def step_size(gamma: float, t: int) -> float:
    """1 − β_t = 1 − (1 − 1/t)^{γ+1}, without cancellation."""
    return 1.0 if t <= 1 else -math.expm1((gamma + 1) * math.log1p(-1 / t))


def correlation(t_a, gamma_a, t_b, gamma_b) -> np.ndarray:
    """∫ p_a p_b dτ of profiles, elementwise with broadcasting.

    (γ_a + 1)(γ_b + 1)/(γ_a + γ_b + 1) · (t_a/t_b)^{γ_b} / t_b   for t_a ≤ t_b
    """
    t_a, gamma_a, t_b, gamma_b = np.broadcast_arrays(
        *(np.asarray(v, dtype=np.float64) for v in (t_a, gamma_a, t_b, gamma_b))
    )
    last = np.maximum(t_a, t_b)
    exponent = np.where(t_a <= t_b, gamma_b, gamma_a)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return scale * (np.minimum(t_a, t_b) / last) ** exponent / last


def solve_weights(t, gamma, t_r: float, gamma_r: float) -> np.ndarray:
    """x of the combination Σ x_i p_i nearest to p_r in the mean square, with Σ x_i = 1.

        min_x ‖Σ_i x_i p_i − p_r‖²:   A x + μ1 = B,   1ᵀx = 1

    with A_ij = ⟨p_i, p_j⟩ and B_i = ⟨p_i, p_r⟩. The constraint, which the paper leaves out and
    nearly meets, makes parameters that do not change come back as they are.

    Args:
      t, gamma: the snapshots' times and exponents, arrays of equal length n.
      t_r, gamma_r: the wanted profile.

    Returns: (n,), float64.
    """
    t, gamma = (np.asarray(v, dtype=np.float64) for v in (t, gamma))
    unit = np.sqrt(correlation(t, gamma, t, gamma))  # profiles of norm one are better conditioned
    n = len(t)
    system = np.zeros((n + 1, n + 1))
    system[:n, :n] = correlation(t[:, None], gamma[:, None], t, gamma) / np.outer(unit, unit)
    scale = unit.max()
    system[n, :n] = system[:n, n] = scale / unit
    right = np.append(correlation(t, gamma, t_r, gamma_r) / unit / scale, 1.0)
    x = np.linalg.lstsq(system, right, rcond=1e-13)[0][:n] * scale / unit
    return x / x.sum()


def residual(weights, t, gamma, t_r: float, gamma_r: float) -> float:
    """‖Σ x_i p_i − p_r‖, which times ‖θ‖ over [0, t_r] bounds the error of a reconstruction."""
    x, t, gamma = (np.asarray(v, dtype=np.float64) for v in (weights, t, gamma))
    square = (
        x @ correlation(t[:, None], gamma[:, None], t, gamma) @ x
        - 2 * x @ correlation(t, gamma, t_r, gamma_r)
        + correlation(t_r, gamma_r, t_r, gamma_r)
    )
    return math.sqrt(max(float(square), 0.0))


# --- snapshots on disk ----------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """One power-function average after t updates: its exponent and its tensors."""

    t: int
    gamma: float
    tensors: Sequence[torch.Tensor]


def write(folder: Path, step: int, snapshots: Sequence[Snapshot], dtype: torch.dtype) -> Path:
    """Write the snapshots of one step, atomically, and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "step": int(step),
        "t": [s.t for s in snapshots],
        "gamma": [s.gamma for s in snapshots],
        "tensors": [[v.to(dtype, copy=False) for v in s.tensors] for s in snapshots],
    }
    path = folder / f"ema_{step:09d}.pt"
    write_atomically(path, lambda file: torch.save(content, file))
    return path


def _read(path: Path) -> dict:
    """A file of `write`, read once to check it; its tensors are mapped from it."""
    head = load_torch(path, "cpu", mmap=True, what="snapshot")
    if not _is_snapshot(head):
        raise ValueError(
            f"{path}: expected a snapshot of power-function averages (step, t ≥ 1, gamma, "
            "tensors), got something else, or numbers that are not finite; remove it, or fetch it "
            "again"
        )
    return head


def _is_snapshot(head) -> bool:
    try:
        step, t, gamma, tensors = (head[key] for key in ("step", "t", "gamma", "tensors"))
        return (
            isinstance(step, int)
            and len(t) == len(gamma) == len(tensors) > 0
            and all(isinstance(n, int) and n > 0 for n in t)
            and all(isinstance(g, float) and 0 < g < math.inf for g in gamma)
            and all(
                v.is_floating_point() and bool(v.isfinite().all()) for part in tensors for v in part
            )
        )
    except (LookupError, TypeError, AttributeError, RuntimeError):
        return False


def posthoc_ema(
    folder: str | os.PathLike, sigma_rel: float, step: int | None = None
) -> list[torch.Tensor]:
    """The power-function average of width σ_rel at `step`, from the snapshots in `folder`.

    Args:
      folder: where `Averages.save_snapshot` wrote.
      sigma_rel: any width in (0, 1/√12). With 32 snapshots of 0.05 and 0.1 the profile comes out
        to 0.3 % from 0.04 to 0.15, to 1 % at 0.03 and 0.2, to 4 % at 0.02 and 0.25.
      step: a step with a snapshot; the last one by default. Later snapshots are not used.

    Returns: float32 tensors in the order of the averaged parameters, for
      `Averages.copy_to(parameters, which=…)`.

    Raises: ValueError where there are no snapshots, none at `step`, or those of several trainings.
    """
    files = _files(Path(folder), step)
    heads = [_read(path) for path in files]
    _check_one_training(folder, heads)
    t, gamma = (np.concatenate([head[key] for head in heads]) for key in ("t", "gamma"))
    weights = solve_weights(t, gamma, float(t.max()), gamma_of(sigma_rel))
    rows = iter(weights.tolist())
    total: list[torch.Tensor] = []
    for head in heads:
        for tensors in head["tensors"]:
            x = next(rows)
            if not total:
                total = [torch.zeros_like(v, dtype=torch.float64) for v in tensors]
            for sum_, v in zip(total, tensors, strict=True):
                sum_.add_(v, alpha=x)
    return [v.float() for v in total]


def _files(folder: Path, step: int | None) -> list[Path]:
    found = {path.stem.removeprefix("ema_"): path for path in folder.glob("ema_*.pt")}
    by_step = {int(number): path for number, path in found.items() if number.isdecimal()}
    last = max(by_step, default=None) if step is None else step
    if last not in by_step:
        raise ValueError(
            f"{folder}: expected a snapshot of {'any step' if step is None else f'step {step}'}, "
            f"got those of steps {sorted(by_step)}; train with model.ema_profiles and "
            "training.posthoc_freq"
        )
    return [by_step[k] for k in sorted(by_step) if k <= last]


def _check_one_training(folder, heads: list[dict]) -> None:
    """The averages must be of one training, never begun again: time goes on with the steps."""
    shapes = {tuple(v.shape for v in tensors) for head in heads for tensors in head["tensors"]}
    times = [head["t"] for head in heads]
    goes_on = all(max(a) < min(b) for a, b in itertools.pairwise(times))
    if len(shapes) > 1 or not goes_on or any(len(set(t)) > 1 for t in times):
        raise ValueError(
            f"{folder}: expected snapshots of one training, got averages of {len(shapes)} networks "
            f"after {times} updates at steps {[head['step'] for head in heads]}; remove those of "
            "another training"
        )
