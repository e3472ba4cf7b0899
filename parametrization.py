"""What a network's output means, what its time input is, and one conversion between all of them.

With x_t = α D + σ ε̂, D = E[x_0 | x_t] and ε̂ = E[z | x_t], every output is a vector in the
basis (D, ε̂):

    x = (α, σ)      data = (1, 0)       noise = (0, 1)      score = (0, −1/σ)
    v = (−σ, α)     velocity = (α', σ') drift = (0, −g/σ)   preconditioned F = (D − c_skip x̃)/c_out

so a quantity wanted is a combination of x and the network's own output, found from two
equations; it never passes through a third quantity that is ill-defined at that time.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

import sde_lib
from sde_lib import expand

SIGMA_DATA = 0.5


class Point:
    """The coefficients of a process at times t, each computed on first use, in float64."""

    def __init__(self, sde, t: torch.Tensor, x: torch.Tensor):
        self.sde, self.t, self.x = sde, t, x
        self.alpha, self.sigma = sde_lib.alpha_sigma(sde, t, x)

    @property
    def g(self):
        return sde_lib.drift_diffusion(self.sde, self.t, self.x)[1]

    @property
    def velocity(self):
        """α' and σ', from f = α'/α and g² = 2σσ' − 2fσ²."""
        f, g = sde_lib.drift_diffusion(self.sde, self.t, self.x)
        return f * self.alpha, f * self.sigma + g**2 / (2 * self.sigma)

    @property
    def sigma_tilde(self):
        """σ/α, the noise level of x/α."""
        return self.sigma / self.alpha


def _preconditioned(p: Point):
    # Karras et al. 2022, Table 1, on x/α = D + σ̃ ε̂.
    var, s2 = p.sigma_tilde**2, SIGMA_DATA**2
    c_out = p.sigma_tilde * SIGMA_DATA / torch.sqrt(var + s2)
    c_skip = s2 / (var + s2)
    return (1 - c_skip) / c_out, -c_skip * p.sigma_tilde / c_out


#: Coordinates of each output in the basis (D, ε̂); a plain 0 marks a family.
OUTPUTS: dict[str, Callable] = {
    "data": lambda p: (torch.ones_like(p.alpha), 0),
    "noise": lambda p: (0, torch.ones_like(p.sigma)),
    "score": lambda p: (0, -1 / p.sigma),
    "drift": lambda p: (0, -p.g / p.sigma),
    "v": lambda p: (-p.sigma, p.alpha),
    "velocity": lambda p: p.velocity,
    "preconditioned": _preconditioned,
}

#: Time inputs of networks, as functions of a Point; (B,) in the process's own order of times.
TIME_INPUTS: dict[str, Callable] = {
    "t*999": lambda p: p.t * (999 / p.sde.T),
    "t": lambda p: p.t,
    "sigma": lambda p: p.sigma,
    "lambda": lambda p: torch.log(p.alpha / p.sigma),
    "log_sigma/4": lambda p: 0.25 * torch.log(p.sigma_tilde),
}


@dataclass(frozen=True)
class Parametrization:
    """What a network predicts (`output`, a key of OUTPUTS) and what it is told of the time
    (`time`, a key of TIME_INPUTS or a function of a Point).

    `point` makes the coefficients; discretely trained networks read them off a table.
    """

    output: str
    time: str | Callable = "t*999"
    point: Callable = Point

    def __post_init__(self):
        if self.output not in OUTPUTS:
            raise ValueError(
                f"parametrization {self.output!r} is unknown; known: {sorted(OUTPUTS)}"
            )
        if isinstance(self.time, str) and self.time not in TIME_INPUTS:
            raise ValueError(f"time input {self.time!r} is unknown; known: {sorted(TIME_INPUTS)}")

    def labels(self, point: Point) -> torch.Tensor:
        """The network's time input, (B,), on the data's device."""
        labels = (TIME_INPUTS[self.time] if isinstance(self.time, str) else self.time)(point)
        if labels.is_floating_point():
            labels = labels.to(point.x.dtype)
        return labels.to(point.x.device).expand(point.x.shape[0])

    def network_input(self, point: Point) -> torch.Tensor:
        """x_t; for a preconditioned network scaled by c_in/α (Karras et al. 2022, Table 1)."""
        if self.output != "preconditioned":
            return point.x
        c_in = 1 / torch.sqrt(point.sigma_tilde**2 + SIGMA_DATA**2)
        return expand(c_in / point.alpha, point.x) * point.x


def as_parametrization(value) -> Parametrization:
    """A Parametrization from an object or from the name of an output."""
    if isinstance(value, Parametrization):
        return value
    return Parametrization(value, "log_sigma/4" if value == "preconditioned" else "t*999")


def convert(output: torch.Tensor, source: str, target: str, point: Point) -> torch.Tensor:
    """The quantity `target` from the quantity `source`, at the same x_t."""
    if source == target:
        return output
    (p, r), (P, R) = OUTPUTS[source](point), OUTPUTS[target](point)
    if _is_zero(p) and _is_zero(P):  # both multiples of ε̂
        return expand(R / r, point.x) * output
    det = point.alpha * r - point.sigma * p
    a, b = (P * r - R * p) / det, (point.alpha * R - point.sigma * P) / det
    return expand(a, point.x) * point.x + expand(b, point.x) * output


def _is_zero(value) -> bool:
    return not torch.is_tensor(value) and value == 0


class ScoreFunction:
    """s(x, t), with three more faces computed from the same network output.

    Call it for the score; `.denoise` is D = E[x_0 | x_t], `.noise` is ε̂ = E[z | x_t] and
    `.velocity` is α'D + σ'ε̂, the drift of the probability-flow ODE. x is (B, *) and t is (B,)
    or a 0-dim tensor. Keyword arguments go to the network. `nfe` counts network evaluations.
    """

    def __init__(self, model_fn: Callable, sde, parametrization: Parametrization):
        self.model_fn = model_fn
        self.sde = sde
        self.parametrization = parametrization
        self.device: torch.device | None = None  # the network's, where it is known
        self.nfe = 0

    def __call__(self, x, t, **conditions):
        return self._face("score", x, t, conditions)

    def denoise(self, x, t, **conditions):
        """D(x_t) = E[x_0 | x_t]."""
        return self._face("data", x, t, conditions)

    def noise(self, x, t, **conditions):
        """ε̂(x_t) = E[z | x_t]."""
        return self._face("noise", x, t, conditions)

    def velocity(self, x, t, **conditions):
        """Drift of the probability-flow ODE, α'D + σ'ε̂."""
        return self._face("velocity", x, t, conditions)

    def with_conditions(self, **conditions) -> ScoreFunction:
        """This score with keyword arguments of the network bound, such as class labels y (B,).

        It goes wherever a network goes (samplers, likelihood, losses), counting its own `nfe`.
        """
        bound = copy.copy(self)
        bound.model_fn = functools.partial(self.model_fn, **conditions)
        bound.nfe = 0
        return bound

    def _face(self, target: str, x, t, conditions):
        self.nfe += 1
        par = self.parametrization
        point = par.point(self.sde, t, x)
        output = self.model_fn(par.network_input(point), par.labels(point), **conditions)
        if output.shape != x.shape:
            raise ValueError(
                f"the network returned shape {tuple(output.shape)} for an input of shape "
                f"{tuple(x.shape)}; expected the same"
            )
        return convert(output, par.output, target, point)


def as_score_function(fn: Callable, sde) -> ScoreFunction:
    """Give a plain function s(x, t) the faces of a ScoreFunction, by Tweedie's formula."""
    if isinstance(fn, ScoreFunction):
        return fn
    score = ScoreFunction(lambda x, t: fn(x, t), sde, Parametrization("score", "t"))
    return score


# --- the rules of score_sde for networks that declare nothing -------------------------------


class _TablePoint(Point):
    """A discretely trained VP network's coefficients: α_t, σ_t are DDPM's tables at floor(t)."""

    def __init__(self, sde, t, x):
        self.sde, self.t, self.x = sde, t, x
        self.index = sde_lib.row(sde, t)
        self.alpha = sde_lib.lookup(sde.sqrt_alphas_cumprod, self.index)
        self.sigma = sde_lib.lookup(sde.sqrt_1m_alphas_cumprod, self.index)


def legacy_parametrization(sde, continuous: bool) -> Parametrization:
    """score_sde's conventions: noise of 999·t for VP and sub-VP, score of σ for VE.

    Discretely trained networks get integer labels: floor(t(N−1)/T) for VP, and for VE
    round((T−t)(N−1)/T), since their σ descend. Any other process: noise of t·999/T.
    `sde` is a process whose `N` is the network's number of scales.
    """
    if isinstance(sde, sde_lib.VESDE):
        if continuous:
            return Parametrization("score", "sigma")
        return Parametrization("score", lambda p: _descending_label(sde, p.t))
    if isinstance(sde, sde_lib.VPSDE) and not continuous:
        return Parametrization("noise", lambda p: p.index, lambda _, t, x: _TablePoint(sde, t, x))
    return Parametrization("noise", "t*999")


def _descending_label(sde, t):
    return torch.round((sde.T - t) * ((sde.N - 1) / sde.T)).long()
