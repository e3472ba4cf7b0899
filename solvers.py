"""Modern predictors for `get_pc_sampler`: `step(x, t, s)` on any process, on any grid.

One evaluation of the network a step, no memory: `ddim`, `tau_euler`, `tau_exponential`.
Two or three, no memory: `heun`, `edm`, `dpm_solver_2`, `dpm_solver_3`, `dpmpp_2s`.
One and earlier values (`solvers_multistep.py`): `dpmpp_2m`, `dpmpp_3m`, `dpmpp_2m_sde`, `exp_ab`,
`unipc`, `sa_solver`.

Each declares `order` (weak, where `stochastic`), `nfe_per_step` and `stochastic`, and the tests
hold it to them; options that change them change them on the instance. The last call, `finish`,
returns the state at eps with x_mean = D there. Formulas in the notation of `solvers_base.py`.
"""

from __future__ import annotations

import math

import torch

import arguments
import solvers_adaptive  # noqa: F401  registers its samplers
from sampling_steps import Predictor, batch_time, register_predictor
from sde_lib import expand, half_log_snr
from solvers_base import Node, Solver, choose_tau, phi
from solvers_multistep import (
    DPMpp2MPredictor,
    DPMpp2MSDEPredictor,
    DPMpp3MPredictor,
    ExponentialAdamsBashforthPredictor,
    SASolverPredictor,
    UniPCPredictor,
)

__all__ = [
    "DDIMPredictor",
    "DPMSolver2Predictor",
    "DPMSolver3Predictor",
    "DPMpp2MPredictor",
    "DPMpp2MSDEPredictor",
    "DPMpp2SPredictor",
    "DPMpp3MPredictor",
    "EDMPredictor",
    "ExponentialAdamsBashforthPredictor",
    "HeunPredictor",
    "Node",
    "SASolverPredictor",
    "Solver",
    "TauEulerPredictor",
    "TauExponentialPredictor",
    "UniPCPredictor",
    "catalogue",
]


# --- one evaluation a step ------------------------------------------------------------------


@register_predictor(name="ddim")
class DDIMPredictor(Solver):
    """DDIM (Song et al. 2021a, eq. 12 and 16) on any affine process. Order 1.

        x_s = α_s D + √(σ_s² − σ̃²) ε̂ + σ̃ z,   σ̃² = η² σ_s² (1 − e^{−2h})

    η = 0 is deterministic, DPM-Solver-1; η = 1 is ancestral sampling. Exact for a point mass.

    Args:
      eta: η in [0, 1].
    """

    def __init__(self, sde, score_fn, probability_flow=False, *, eta: float = 0.0):
        super().__init__(sde, score_fn, probability_flow)
        arguments.number(eta=eta)
        if not 0 <= eta <= 1:
            raise ValueError(f"ddim needs 0 ≤ eta ≤ 1, got {eta}; 0 is the ODE, 1 ancestral")
        self.eta = choose_tau(eta, probability_flow, 0.0, "eta")
        self.stochastic = self.eta > 0

    def advance(self, x, t, s):
        # In x and D: √(σ_s² − σ̃²)/σ_t = (σ_s/σ_t) e^w and what is left of α_s is −expm1(w − h).
        h = s.lam - t.lam
        removed = -(self.eta**2) * torch.expm1(-2 * h)
        w = 0.5 * torch.log1p(-removed)
        x_mean = s.sigma / t.sigma * torch.exp(w) * x
        x_mean = x_mean - s.alpha * torch.expm1(w - h) * self.data(x, t)
        if not self.stochastic:
            return x_mean, x_mean
        return x_mean + s.sigma * torch.sqrt(removed) * self.randn_like(x), x_mean


@register_predictor(name="tau_exponential")
class TauExponentialPredictor(Solver):
    """Exponential integrator of the reverse family. Weak order 1, D constant over a step.

        x_s = (σ_s/σ_t) e^{−τ²h} x + α_s (1 − e^{−(1+τ²)h}) D + σ_s √(1 − e^{−2τ²h}) z

    τ = 0 is DDIM, τ = 1 ancestral sampling. Exact for a point mass, noise included.

    Args:
      tau: τ ≥ 0; 1, the reverse SDE, by default, and 0 for the probability flow.
    """

    stochastic = True

    def __init__(self, sde, score_fn, probability_flow=False, *, tau: float | None = None):
        super().__init__(sde, score_fn, probability_flow)
        self.tau2 = choose_tau(tau, probability_flow, 1.0) ** 2
        self.stochastic = self.tau2 > 0

    def advance(self, x, t, s):
        h = s.lam - t.lam
        x_mean = s.sigma / t.sigma * torch.exp(-self.tau2 * h) * x
        x_mean = x_mean - s.alpha * torch.expm1(-(1 + self.tau2) * h) * self.data(x, t)
        if not self.stochastic:
            return x_mean, x_mean
        std = s.sigma * torch.sqrt(-torch.expm1(-2 * self.tau2 * h))
        return x_mean + std * self.randn_like(x), x_mean


@register_predictor(name="tau_euler")
class TauEulerPredictor(Predictor):
    """Euler–Maruyama on the reverse family, for any process, affine or not. Weak order 1.

        x ← x − [f x − ½ (1+τ²) g² s] Δt + τ g √Δt z

    Args:
      tau: τ ≥ 0; 1, the reverse SDE, by default, and 0 for the probability flow.
    """

    def __init__(self, sde, score_fn, probability_flow=False, *, tau: float | None = None):
        super().__init__(sde, score_fn, probability_flow)
        self.tau = choose_tau(tau, probability_flow, 1.0)
        self.rsde = sde.reverse(score_fn, tau=self.tau)
        self.stochastic = self.tau > 0

    def step(self, x, t, s):
        dt = t - s
        drift, diffusion = self.rsde.sde(x, batch_time(x, t))
        x_mean = x - drift * dt
        if not self.stochastic:
            return x_mean, x_mean
        return x_mean + expand(diffusion, x) * dt**0.5 * self.randn_like(x), x_mean


# --- two and three evaluations a step -------------------------------------------------------


@register_predictor(name="heun")
class HeunPredictor(Solver):
    """The two-stage family of Karras et al. 2022, alg. 1 and 3, on any affine process. Order 2.

    With x̄ = x/α and ρ = σ/α the probability flow is dx̄ = ε̂ dρ; h = ρ_s − ρ_t,

        d = ε̂(x̄, ρ_t),   d' = ε̂(x̄ + a h d, ρ_t + a h),   x̄_s = x̄ + h [(1 − 1/2a) d + d'/2a]

    Args:
      alpha: a in (0, 1]; 1 is Heun's, 1/2 the midpoint, 2/3 Ralston's method.
    """

    order = 2
    nfe_per_step = 2

    def __init__(self, sde, score_fn, probability_flow=False, *, alpha: float = 1.0):
        super().__init__(sde, score_fn, probability_flow)
        arguments.number(alpha=alpha)
        if not 0 < alpha <= 1:
            raise ValueError(
                f"the two-stage family needs 0 < alpha ≤ 1, got {alpha}; 1 is Heun, 0.5 midpoint"
            )
        self.a = float(alpha)

    def advance(self, x, t, s):
        h = s.rho - t.rho
        m = s if self.a == 1 else self.node_at(-torch.log(t.rho + self.a * h), x)
        d = self.eps(x, t)
        d_m = self.eps(m.alpha / t.alpha * x + m.alpha * self.a * h * d, m)
        slope = (1 - 0.5 / self.a) * d + (0.5 / self.a) * d_m
        x = s.alpha / t.alpha * x + s.alpha * h * slope
        return x, x


@register_predictor(name="edm")
class EDMPredictor(HeunPredictor):
    """The stochastic sampler of Karras et al. 2022, alg. 2, on any affine process. Weak order 2.

    Before each step of Heun's method, noise lifts ρ = σ/α to ρ̂ = (1 + γ) ρ:

        x̄ ← x̄ + √(ρ̂² − ρ²) S_noise z,   γ = min(S_churn/N, √2 − 1) where S_min ≤ ρ ≤ S_max

    N is the number of times of the grid; ρ̂ stays within the process, ρ̂ ≤ ρ_T. The order shows
    once N > S_churn/(√2 − 1), and with S_noise = 1.

    Args:
      S_churn, S_min, S_max, S_noise: as published; S_churn = 0 is Heun's method.
      alpha: of the two-stage family.
    """

    def __init__(
        self,
        sde,
        score_fn,
        probability_flow=False,
        *,
        S_churn: float = 0.0,
        S_min: float = 0.0,
        S_max: float = math.inf,
        S_noise: float = 1.0,
        alpha: float = 1.0,
    ):
        super().__init__(sde, score_fn, probability_flow, alpha=alpha)
        arguments.number(S_churn=S_churn, S_min=S_min, S_max=S_max, S_noise=S_noise)
        if S_min < 0 or S_max < S_min or S_noise < 0:
            raise ValueError(
                f"edm needs 0 ≤ S_min ≤ S_max and S_noise ≥ 0, got {S_min}, {S_max} and {S_noise}"
            )
        self.S_churn = choose_tau(S_churn, probability_flow, 0.0, "S_churn")
        self.S_min, self.S_max, self.S_noise = S_min, S_max, S_noise
        self.stochastic = S_churn > 0
        self.rho_max = math.inf

    def start(self, times):
        super().start(times)
        self.rho_max = float(torch.exp(-half_log_snr(self.sde, times[0])))

    def advance(self, x, t, s):
        if self.stochastic:
            x, t = self._churn(x, t)
        return super().advance(x, t, s)

    def _churn(self, x, t: Node):
        limit = min(self.S_churn / (self.length or self.sde.N), math.sqrt(2) - 1)
        inside = (t.rho >= self.S_min) & (t.rho <= self.S_max)
        rho = torch.where(inside, (1 + limit) * t.rho, t.rho).clamp(max=self.rho_max)
        up = self.node_at(-torch.log(rho), x)
        std = self.S_noise * torch.sqrt((rho**2 - t.rho**2).clamp(min=0))
        return up.alpha / t.alpha * x + up.alpha * std * self.randn_like(x), up


class _OneInside(Solver):
    """What the singlestep solvers with one inner evaluation share: where in (0, 1) it lies."""

    order = 2
    nfe_per_step = 2

    def __init__(self, sde, score_fn, probability_flow=False, *, r: float = 0.5):
        super().__init__(sde, score_fn, probability_flow)
        arguments.number(r=r)
        if not 0 < r < 1:
            raise ValueError(f"expected 0 < r < 1, got {r}; the published value is 0.5")
        self.r = float(r)


@register_predictor(name="dpm_solver_2")
class DPMSolver2Predictor(_OneInside):
    """DPM-Solver-2, singlestep (Lu et al. 2022a, alg. 4; alg. 1 at r = ½). Order 2.

        u = (α_m/α_t) x − σ_m (e^{rh} − 1) ε̂_t,   λ_m = λ_t + r h
        x_s = (α_s/α_t) x − σ_s (e^h − 1) [ε̂_t + (ε̂_m − ε̂_t)/2r]

    Args:
      r: where in (0, 1) the inner evaluation lies.
    """

    def advance(self, x, t, s):
        h, r = s.lam - t.lam, self.r
        m = self.node_at(t.lam + r * h, x)
        e = self.eps(x, t)
        u = m.alpha / t.alpha * x - m.sigma * torch.expm1(r * h) * e
        e_m = self.eps(u, m)
        x = s.alpha / t.alpha * x - s.sigma * torch.expm1(h) * (e + (e_m - e) / (2 * r))
        return x, x


@register_predictor(name="dpm_solver_3")
class DPMSolver3Predictor(Solver):
    """DPM-Solver-3, singlestep (Lu et al. 2022a, alg. 2 and 5; r1 = ⅓, r2 = ⅔). Order 3.

    u1 = (α_1/α_t) x − σ_1 r1 h φ_1(r1 h) ε̂_t
    u2 = (α_2/α_t) x − σ_2 r2 h [φ_1(r2 h) ε̂_t + (r2/r1) φ_2(r2 h) (ε̂_1 − ε̂_t)]
    x_s = (α_s/α_t) x − σ_s h [φ_1(h) ε̂_t + φ_2(h) (ε̂_2 − ε̂_t)/r2]
    """

    order = 3
    nfe_per_step = 3

    def advance(self, x, t, s):
        h, r1, r2 = s.lam - t.lam, 1 / 3, 2 / 3
        one, two = self.node_at(t.lam + r1 * h, x), self.node_at(t.lam + r2 * h, x)
        e = self.eps(x, t)
        u = one.alpha / t.alpha * x - one.sigma * torch.expm1(r1 * h) * e
        d1 = self.eps(u, one) - e
        phi_1, phi_2 = phi(2, r2 * h)
        u = two.alpha / t.alpha * x - two.sigma * r2 * h * (phi_1 * e + (r2 / r1) * phi_2 * d1)
        d2 = self.eps(u, two) - e
        phi_1, phi_2 = phi(2, h)
        x = s.alpha / t.alpha * x - s.sigma * h * (phi_1 * e + phi_2 / r2 * d2)
        return x, x


@register_predictor(name="dpmpp_2s")
class DPMpp2SPredictor(_OneInside):
    """DPM-Solver++(2S), singlestep (Lu et al. 2022b, alg. 1). Order 2.

        u = (σ_m/σ_t) x + α_m (1 − e^{−rh}) D_t,   λ_m = λ_t + r h
        x_s = (σ_s/σ_t) x + α_s (1 − e^{−h}) [D_t + (D_m − D_t)/2r]

    Args:
      r: where in (0, 1) the inner evaluation lies.
    """

    def advance(self, x, t, s):
        h, r = s.lam - t.lam, self.r
        m = self.node_at(t.lam + r * h, x)
        D = self.data(x, t)
        u = m.sigma / t.sigma * x - m.alpha * torch.expm1(-r * h) * D
        D_m = self.data(u, m)
        x = s.sigma / t.sigma * x - s.alpha * torch.expm1(-h) * (D + (D_m - D) / (2 * r))
        return x, x


# --- what there is --------------------------------------------------------------------------


def catalogue() -> list[tuple[str, type, dict]]:
    """(label, class, options) of every member worth listing; tests and benchmarks go by it."""
    return [
        ("ddim", DDIMPredictor, {}),
        ("ddim η=1", DDIMPredictor, {"eta": 1.0}),
        ("tau_euler τ=0", TauEulerPredictor, {"tau": 0.0}),
        ("tau_euler τ=½", TauEulerPredictor, {"tau": 0.5}),
        ("tau_euler τ=1", TauEulerPredictor, {"tau": 1.0}),
        ("tau_exponential τ=½", TauExponentialPredictor, {"tau": 0.5}),
        ("tau_exponential τ=1", TauExponentialPredictor, {"tau": 1.0}),
        ("heun", HeunPredictor, {}),
        ("midpoint", HeunPredictor, {"alpha": 0.5}),
        ("ralston", HeunPredictor, {"alpha": 2 / 3}),
        ("edm churn 10", EDMPredictor, {"S_churn": 10.0}),
        ("dpm_solver_2", DPMSolver2Predictor, {}),
        ("dpm_solver_3", DPMSolver3Predictor, {}),
        ("dpmpp_2s", DPMpp2SPredictor, {}),
        ("dpmpp_2m", DPMpp2MPredictor, {}),
        ("dpmpp_3m", DPMpp3MPredictor, {}),
        ("dpmpp_3m legacy", DPMpp3MPredictor, {"legacy_3m": True}),
        ("dpmpp_2m_sde", DPMpp2MSDEPredictor, {}),
        ("exp_ab data 2", ExponentialAdamsBashforthPredictor, {"order": 2}),
        ("exp_ab data 3", ExponentialAdamsBashforthPredictor, {"order": 3}),
        ("exp_ab noise 2", ExponentialAdamsBashforthPredictor, {"order": 2, "form": "noise"}),
        ("exp_ab noise 3", ExponentialAdamsBashforthPredictor, {"order": 3, "form": "noise"}),
        ("unipc 2", UniPCPredictor, {"order": 2}),
        ("unipc 3", UniPCPredictor, {"order": 3}),
        ("unipc 3 bh1", UniPCPredictor, {"order": 3, "variant": "bh1"}),
        ("unipc 3 predictor only", UniPCPredictor, {"order": 3, "corrector": False}),
        ("sa_solver τ=0", SASolverPredictor, {"tau": 0.0}),
        ("sa_solver", SASolverPredictor, {}),
    ]
