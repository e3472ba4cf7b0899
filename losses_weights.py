"""What an error of the network costs: every objective as a weight on one squared error.

At a given x_t an error of the network moves D = E[x_0 | x_t] and ε̂ = E[z | x_t] together, since
α D + σ ε̂ = x_t stays: there is one vector Δ with

    (ΔD, Δε̂) = (−σ, α) Δ,   and an output q = p D + r ε̂ is off by   Δq = (α r − σ p) Δ.

An objective is E w(t) ‖Δ‖². The unit-weight error of any output is w = (α r − σ p)²:

    noise α²,   data σ²,   score (α/σ)²,   drift (g α/σ)²,   v (α² + σ²)²,
    velocity (α σ' − σ α')²,   preconditioned F (σ/c_out)²

so a network that predicts one thing can be trained for another: its own squared error times the
quotient of the two. The error itself is taken in the network's own output, where nothing cancels.
"""

from __future__ import annotations

import torch

import arguments
import sde_lib
from parametrization import OUTPUTS, Point, ScoreFunction
from sde_lib import expand

#: Names of objectives: the output whose squared error has unit weight.
WEIGHTS: dict[str, str] = {
    # σ² ‖s + z/σ‖² = ‖ε̂ − z‖² (Song et al. 2021, eq. 7; Ho et al. 2020, eq. 14, "simple")
    "dsm": "noise",
    "simple": "noise",
    # g² ‖s + z/σ‖², a bound on the negative log-likelihood (Song, Durkan, Murray & Ermon 2021)
    "likelihood": "drift",
    # (σ̃² + σ_d²)/(σ̃ σ_d)² ‖D − x_0‖² = ‖F − F*‖², σ̃ = σ/α (Karras et al. 2022, eq. 7 and 8)
    "edm": "preconditioned",
    # ‖ε̂ − z‖², ‖D − x_0‖², ‖s + z/σ‖², ‖u − (α' x_0 + σ' z)‖² (flow matching: Lipman et al. 2023),
    # ‖v − (α z − σ x_0)‖² (Salimans & Ho 2022), …: each output's own
    **{output: output for output in OUTPUTS},
}

#: The weights by name; 'min_snr' is no output's.
NAMES = (*sorted(WEIGHTS), "min_snr")


def check_weighting(weighting: str, min_snr_gamma: float = 5.0) -> None:
    """Refuse a name that is none of NAMES, and a γ of 'min_snr' that would reward errors."""
    if weighting not in NAMES:
        raise ValueError(
            f"weighting {weighting!r} is unknown; known: {', '.join(NAMES)}, and '' for the "
            "published one"
        )
    arguments.real(min_snr_gamma=min_snr_gamma)
    if not min_snr_gamma > 0:
        raise ValueError(f"expected min_snr_gamma > 0, got {min_snr_gamma}; use 5")


def error_scale(output: str, point: Point) -> torch.Tensor:
    """α r − σ p, the error of `output` per unit of Δ; (B,), in float64."""
    p, r = OUTPUTS[output](point)
    return point.alpha * r - point.sigma * p


def relative_weight(weighting: str, output: str, point: Point, min_snr_gamma: float = 5.0):
    """What the squared error of `output` is multiplied by under `weighting`; (B,), in float64.

    Min-SNR (Hang et al. 2023) is min(SNR, γ) ‖D − x_0‖² with SNR = (α/σ)², so w = min(α², γ σ²).
    """
    check_weighting(weighting, min_snr_gamma)
    if WEIGHTS.get(weighting) == output:
        return torch.ones_like(point.alpha)
    if weighting == "min_snr":
        weight = torch.minimum(point.alpha**2, min_snr_gamma * point.sigma**2)
    else:
        weight = error_scale(WEIGHTS[weighting], point) ** 2
    return weight / error_scale(output, point) ** 2


def own_error(score_fn: ScoreFunction, x_0, z, x, t, conditions):
    """The network's error in its own output at x = x_t, (B, *), and the Point of x and t.

    Raises: ValueError where the network's output has another shape than x, or where the network
      was trained on another process.
    """
    if score_fn.trained is not None:
        raise ValueError(
            f"an objective is of the network's own process, {type(score_fn.trained).__name__}, "
            f"got {type(score_fn.sde).__name__}; train on the network's own"
        )
    par = score_fn.parametrization
    point = par.point(score_fn.sde, t, x)
    return score_fn.output(point, **conditions) - _target(par.output, point, x_0, z), point


def _target(output: str, point: Point, x_0, z):
    """What `output` should be: p x_0 + r z, and for the velocity of a shifted origin m' more."""
    p, r = (expand(c, z) for c in OUTPUTS[output](point))
    target = p * x_0 + r * z
    if output != "velocity" or point.shift is None:
        return target
    f = sde_lib.drift_diffusion(point.sde, point.t, point.x)[0]
    return target + expand(f, z) * point.shift + point.drift_at_zero
