"""Posterior sampling by guidance: the score of x_t given a linear measurement y = A x_0 + σ_y z.

    ∇ log p(x_t | y) = s(x_t) + g,   g ≈ ∇ log p(y | x_t)

With D = E[x_0 | x_t] and V = (σ²/α) ∂D/∂x, the covariance of x_0 given x_t, every method here is
a rule for w in g = (∂D/∂x)ᵀ Aᵀ w. With r = y − A D,

    dps     w = (ζ N/T g_t²) r/‖r‖           one vjp     Chung et al. 2022, alg. 1
    pigdm   w = (r_t² A Aᵀ + σ_y²)⁻¹ r       one vjp     Song et al. 2023 (ΠGDM)
    tmpd    w = r / (A V Aᵀ 1 + σ_y²)        two vjps    Boys et al. 2023, the diagonal form
    mmps    w = (A V Aᵀ + σ_y²)⁻¹ r          K + 1 vjps  Rozet et al. 2024

`mmps` solves by K steps of conjugate gradients, each a vjp; it is exact for any Gaussian data, as
`pigdm` is where r_t² I = V. All but `dps` are kept from what only an inexact network asks for: with
δ the shift of D, an A δ longer than r, or a δ of several standard deviations of the data.
docs/inverse_problems.md says how far off each is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from controllable_generation_methods import (
    check_measurement,
    check_noise,
    check_problem,
    method_sampler,
    register_inverse_solver,
)
from operators_base import conjugate_gradients
from parametrization import OUTPUTS, Point, as_score_function, convert
from sampling_loop import with_options
from sampling_wrappers import _Wrapper
from sde_lib import expand, sum_except_batch

# --- what a rule is given ---------------------------------------------------------------------


class View:
    """D(x_t) against a measurement: the residual, and products with ∂D/∂x by its graph.

    Args:
      D: attached to the graph of x, (B, *).
      x: the leaf of that graph.
      y: (1 or B, *shape_out).
      s2: σ_y².
      data_std: c, the data's standard deviation.
    """

    def __init__(self, D, x, point: Point, operator, y, s2: float, data_std: float):
        self.x, self.point, self.operator, self.s2 = x, point, operator, s2
        self.data_std = data_std
        self.vjps = 0
        self._attached, self.D = D, D.detach()
        self.residual = y - operator(self.D)

    def pull(self, w) -> torch.Tensor:
        """(∂D/∂x)ᵀ Aᵀ w, without gradients of the network's weights."""
        self.vjps += 1
        v = self.operator.adjoint(w).to(self.D.dtype)
        return torch.autograd.grad(self._attached, self.x, v, retain_graph=True)[0]

    def spread(self, w) -> torch.Tensor:
        """A V Aᵀ w, V = (σ²/α) (∂D/∂x)ᵀ."""
        return self.operator(expand(self.gain, self.x) * self.pull(w))

    @property
    def gain(self):
        """σ²/α, by which g moves D (Tweedie's formula)."""
        return self.point.sigma**2 / self.point.alpha

    def column(self, v) -> torch.Tensor:
        """A coefficient, a number, 0-dim or (B,), as a vector (B,) beside x."""
        ones = torch.ones(len(self.x), dtype=self.x.dtype, device=self.x.device)
        return ones * torch.as_tensor(v).to(ones.dtype)


#: D is moved by no more than so many standard deviations of the data, root mean square.
LARGEST = 5.0


# --- the rules: a View -> (w, log p(y | x_t) up to a function of t) ---------------------------


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"expected {name} > 0, got {value}")


@dataclass(frozen=True)
class DPS:
    """g = −ζ (N/T g_t²) ∇‖y − A D‖ (Chung et al. 2022, alg. 1, as published in code).

    Algorithm 1 ends each of its N steps by x ← x − ζ ∇‖y − A D‖. A step of length T/N adds
    g_t² T/N times the score, so as a score the same subtraction is this g: with `euler_maruyama`
    on a uniform grid of N + 1 times it is algorithm 1, and any other sampler gets as much of it
    per unit of time. (The paper prints ζ_i ∇‖·‖² with ζ_i = ζ'/‖·‖, which is ζ = 2ζ'.)

    Args:
      zeta: ζ; 0.1 to 1 are published, by task. No value makes it exact.
      steps: N, the number of steps of the sampler; 0 is `sde.N`.
    """

    zeta: float = 1.0
    steps: int = 0
    bounded = False

    def __post_init__(self):
        _positive("zeta", self.zeta)
        if self.steps < 0:
            raise ValueError(f"expected steps ≥ 0, got {self.steps}; 0 is sde.N")

    def __call__(self, view: View):
        sde, r = view.point.sde, view.residual
        rate = view.column(self.zeta * (self.steps or sde.N) / sde.T / view.point.g**2)
        norm = sum_except_batch(r * r).sqrt()
        tiny = torch.finfo(norm.dtype).tiny
        return expand(rate / norm.clamp(min=tiny), r) * r, -rate * norm


@dataclass(frozen=True)
class PiGDM:
    """g = (∂D/∂x)ᵀ Aᵀ (r_t² A Aᵀ + σ_y²)⁻¹ (y − A D) (Song et al. 2023, ΠGDM).

        r_t² = c²σ²/(α²c² + σ²),   the variance of x_0 given x_t for data N(m, c² I)

    Exact for such data. c is 1 as published (σ²/(1 + σ²) for VE); near 0 it is DPS before its
    division by the norm, g = −∇‖y − A D‖²/2σ_y², and infinity is r_t = σ/α.
    """

    bounded = True

    def __call__(self, view: View):
        precision = (view.point.alpha / view.point.sigma) ** 2 + view.data_std**-2
        w = view.operator.solve_gram(view.residual, view.column(1 / precision), view.s2)
        return w, -0.5 * sum_except_batch(view.residual * w)


@dataclass(frozen=True)
class TMPD:
    """A V Aᵀ by its row sums, on the diagonal (Boys et al. 2023): one vjp of a vector of ones.

    Exact where A V Aᵀ is diagonal.

    Args:
      floor: least row sum, as a share of the mean of their sizes; row sums of a covariance
        may be negative.
    """

    floor: float = 0.01
    bounded = True

    def __post_init__(self):
        _positive("floor", self.floor)

    def __call__(self, view: View):
        r = view.residual
        rows = view.spread(torch.ones_like(r))
        least = self.floor * rows.abs().reshape(len(r), -1).mean(1)
        variance = torch.maximum(rows, expand(least, r)) + view.s2
        # All rows round to 0 where α does, at the start of rectified flow.
        w = torch.where(variance > 0, r / torch.where(variance > 0, variance, 1.0), 0.0)
        return w, -0.5 * sum_except_batch(r * w)


@dataclass(frozen=True)
class MMPS:
    """The whole A V Aᵀ, by conjugate gradients (Rozet et al. 2024): exact for any Gaussian data.

    TMPD with its full matrix (Boys et al. 2023) is the same g.

    Args:
      iterations: K, of conjugate gradients, a vjp each; the number of measurements is exact, a
        few do for well-conditioned tasks.
      tol: the relative residual at which a sample stops.
    """

    iterations: int = 3
    tol: float = 1e-4
    bounded = True

    def __post_init__(self):
        if self.iterations < 1 or not self.tol >= 0:
            raise ValueError(
                f"mmps needs iterations ≥ 1 and tol ≥ 0, got {self.iterations} and {self.tol}"
            )

    def __call__(self, view: View):
        r = view.residual
        w, _ = conjugate_gradients(
            lambda p: view.spread(p) + view.s2 * p, r, self.iterations, self.tol
        )
        return w, -0.5 * sum_except_batch(r * w)


#: By name: classes whose instances map a View to w and log p(y | x_t).
RULES: dict[str, type] = {"dps": DPS, "pigdm": PiGDM, "tmpd": TMPD, "mmps": MMPS}


# --- the posterior's score --------------------------------------------------------------------


@dataclass(frozen=True)
class Guide:
    """D (B, *), the shift of it that y asks for, (σ²/α) g, and log p(y | x_t) (B,) up to a
    function of t; `residual` is y − A D."""

    D: torch.Tensor
    shift: torch.Tensor
    log_likelihood: torch.Tensor
    residual: torch.Tensor


class PosteriorScore(_Wrapper):
    """The score of x_t given y; made by `posterior_score`. `vjps` counts its backward passes."""

    def __init__(
        self, score_fn, operator, y, noise: float, rule: Any, data_std: float, until: float = 0.0
    ):
        super().__init__(score_fn)
        self.data_std, self.until = data_std, until
        self.operator, self.y, self.sigma_y, self.rule = operator, y, float(noise), rule
        self.vjps = 0

    def guide(self, x, t, y=None, conditions: dict | None = None) -> Guide:
        """What y says of D at (x, t): one evaluation of the network.

        Args:
          y: in place of the measurement given to `posterior_score`.
          conditions: keyword arguments of the network.
        """
        return self._look(x, t, self.y if y is None else y, conditions or {})[0]

    def _face(self, target, x, t, conditions):
        guide, output, kind, point = self._look(x, t, self.y, conditions)
        # Moving D by δ moves a face with coordinates (P, R) in (D, ε̂) by (P − Rα/σ) δ.
        P, R = OUTPUTS[target](point)
        slope = torch.as_tensor(P - R * point.alpha / point.sigma)
        return convert(output, kind, target, point) + expand(slope, x) * guide.shift

    def _look(self, x, t, y, conditions):
        self.nfe += self.evaluations
        (base,), kind = self.inner, self.parametrization.output
        check_measurement(self.operator, y, len(x))
        y = y.to(x.device, x.dtype)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x.detach().clone().requires_grad_(True)
            output = base._face(kind, leaf, t, conditions)
            if not output.requires_grad:
                raise ValueError(
                    "posterior guidance differentiates the network by x, and its output carries no "
                    "gradient; remove torch.no_grad() or detach() from its forward pass"
                )
            point = self._point(leaf, t)
            D = convert(output, kind, "data", point)
            with torch.no_grad():
                view = View(D, leaf, point, self.operator, y, self.sigma_y**2, self.data_std)
                w, log_likelihood = self.rule(view)
                shift = expand(view.gain, x) * view.pull(w)
                if self.rule.bounded:
                    shift = expand(_share(view, shift), x) * shift
                if self.until:
                    heard = torch.as_tensor(t, device=x.device) > 1.0001 * self.until
                    shift = expand(heard.to(shift.dtype), x) * shift
        self.vjps += view.vjps
        guide = Guide(view.D, shift, log_likelihood, view.residual)
        return guide, output.detach(), kind, self._point(x, t)


def _share(view: View, shift) -> torch.Tensor:
    """How much of a shift δ of D is taken, (B,): min(1, ‖r‖/‖A δ‖, 5c √d/‖δ‖).

    With V positive and D's own, A δ = A V Aᵀ (A V Aᵀ + σ_y²)⁻¹ r is no longer than r, and D_y is an
    image. At large noise a network's ∂D/∂x, multiplied by σ²/α, is neither: without this ΠGDM, and
    MMPS of several iterations, diverge on it.
    """

    def norm(v):
        return sum_except_batch(v.square()).sqrt()

    r, tiny = norm(view.residual), torch.finfo(shift.dtype).tiny
    moved, size = norm(view.operator(shift)), norm(shift)
    most = LARGEST * view.data_std * math.sqrt(shift[0].numel())
    return torch.minimum(r / moved.clamp(min=tiny), most / size.clamp(min=tiny)).clamp(max=1)


def get_rule(method: str, options: dict | None = None) -> Callable:
    """The rule named `method`, a key of RULES, with its options.

    Raises: ValueError for an unknown name, option or value.
    """
    if method not in RULES:
        raise ValueError(f"posterior method {method!r} is unknown; known: {', '.join(RULES)}")
    return with_options(RULES[method], options or {}, f"posterior method {method!r}")()


def posterior_score(
    score_fn,
    sde,
    operator,
    y,
    noise: float = 0.0,
    method: str = "mmps",
    *,
    data_std: float = 1.0,
    until: float = 0.0,
    **options,
) -> PosteriorScore:
    """The score of x_t given y = A x_0 + σ_y z, for every sampler; `.denoise` is E[x_0 | x_t, y].

        D_y = D + (σ²/α) g,   g ≈ ∇ log p(y | x_t)

    It goes wherever a network goes: `get_pc_sampler(...)(posterior_score(...))`. One evaluation
    of the network a call, and the method's vjps; a network with `requires_grad_(False)` weights
    keeps half the memory free.

    Args:
      score_fn: a ScoreFunction, as of `get_score_fn`, or a plain function s(x, t).
      sde: the forward process.
      operator: A, of `operators.py`.
      y: the measurement, (1, *shape_out) or one for each sample, (B, *shape_out).
      noise: σ_y ≥ 0, the standard deviation of its noise.
      method: 'dps', 'pigdm', 'tmpd' or 'mmps'.
      data_std: c, the data's standard deviation as the network sees them: r_t of pigdm goes by it,
        and no method but dps moves D by more than 5 c, root mean square.
      until: the time up to which y is heard, going down; from there on the score is `score_fn`'s.
      options: of the method: `zeta` and `steps` (dps), `floor` (tmpd), `iterations` and `tol`
        (mmps).

    Raises: ValueError for an unknown method or option, and for noise that is not ≥ 0; TypeError
      for a bare network, whose output is no score.
    """
    if isinstance(score_fn, torch.nn.Module):
        raise TypeError(
            f"posterior_score needs a score, got the network {type(score_fn).__name__}; use "
            "models.utils.get_score_fn(sde, network, continuous=...)"
        )
    noise = check_noise(noise)
    _positive("data_std", data_std)
    rule = get_rule(method, options)
    inner = as_score_function(score_fn, sde)
    return PosteriorScore(inner, operator, y, noise, rule, data_std, until)


# --- the same by name -------------------------------------------------------------------------


def _solver(method: str) -> Callable:
    names = {field.name for field in fields(RULES[method])}

    def solver(
        sde, shape, operator, y, *, noise: float = 0.0, data_std: float = 1.0, **options: Any
    ) -> Callable:
        check_problem(shape, operator, y, noise)
        own = {name: options.pop(name) for name in names - {"steps"} if name in options}
        if "steps" in names:  # Algorithm 1's are the sampler's
            own["steps"] = options.get("steps") or 0
        get_rule(method, own)
        _positive("data_std", data_std)
        given = {"data_std": data_std, **own}
        if "steps" in names:
            # The last call takes all noise away, and with it N σ²/(T g²) ζ of r/‖r‖ in one step:
            # with VE that is N/13 ζ, and ruins the image.
            eps = options.get("eps")
            given["until"] = sde.sampling_eps if eps is None else eps

        def wrap(score_fn):
            return posterior_score(score_fn, sde, operator, y, noise, method, **given)

        return method_sampler(method, wrap, sde, shape, {}, options)

    solver.__name__ = method
    solver.__doc__ = f"""Sampling with `posterior_score(..., method={method!r})`.

    Args: those of `get_wrapped_sampler`, data_std, and of the method {sorted(names) or "none"}.
    """
    return solver


for _name in RULES:
    register_inverse_solver(_solver(_name), name=_name)
