"""A bound for every plug-in reverse SDE between the SDE and the ODE, by simulation, tight for all.

The model of λ_H (Huang et al. 2021, appendix C), τ² = 1 − λ_H, in reverse time:

    dx = [f x − ½ (1 + τ²) g² s] dt + τ g dw̄.

The forward process that reverses it where s = ∇log p_t is dx = [f x − ½ λ_H g² s] dt + τ g dw. From
x at eps it gives for any s (Huang et al. 2021, theorem 3, with a = τ g s)

    log p_eps(x) ≥ E [log π(x_T) − ∫ ½ τ² g² ‖s‖² + ½ (1 + τ²) g² ∇·s − ∇·(f x) dt],

with equality for the exact score and prior. λ_H = 0 is the ELBO of `likelihood_bounds.py` with
start='eps'; at λ_H = 1 nothing is random, and it is the exact log-likelihood of the ODE.

In y = (x − m)/α and V = σ²/α² = e^{−2λ} the process is dy = −½ λ_H s_y dV + τ dW(V), which Heun's
method takes in steps uniform in λ: of weak order 2, as the trapezoidal rule for the integral is.
The bound is one up to that error; `likelihood_paths.py` has an exact one of a discrete model.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

import arguments
import sde_lib
from divergence import get_trace, mean_and_error, watched
from likelihood_bits import Likelihood, check_data, refuse_nan
from likelihood_bounds import check_process, dot, numbered, tau_of
from likelihood_paths import lambda_grid
from models.utils import get_score_fn
from randomness import normal
from sde_lib import double


def get_family_bound_fn(
    sde,
    *,
    lam: float = 0.0,
    paths: int = 1,
    steps: int = 100,
    eps: float = 1e-5,
    trace: str = "rademacher",
    probes: int = 1,
    continuous: bool = True,
) -> Callable:
    """family_bound(model, data, *, draws=None) -> Likelihood: the bound on log p_eps(x) in nats.

    Each path's estimate has −∫ a dw added, a number of mean zero that cancels its noise: for the
    exact score a single path gives log p_eps(x), as does the ODE.

    Args:
      sde: the forward process, any affine one.
      lam: λ_H in [0, 1].
      paths: independent paths, whose spread is the standard error.
      steps: per path, uniform in λ; 2 steps + 1 network evaluations, steps + 1 for lam = 0.
      eps: the time of the data.
      trace, probes: as `divergence.get_trace`; the probes are fixed along a path.
      continuous: whether the network was trained with continuous time.
    """
    arguments.whole(paths=paths, steps=steps)
    arguments.real(lam=lam)
    if paths < 1 or steps < 1:
        raise ValueError(f"a bound needs paths ≥ 1 and steps ≥ 1, got {paths} and {steps}")
    check_process(sde, eps)
    tau, estimator = tau_of(lam), get_trace(trace, probes)
    times = lambda_grid(sde, eps, steps)[::-1]
    per_path = steps + 1 + (steps if lam else 0)

    @torch.inference_mode(False)
    @torch.no_grad()
    def family_bound(model, data, *, draws=None) -> Likelihood:
        check_data(data)
        data = data.clone() if data.is_inference() else data
        score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
        walk = _Walk(sde, score_fn, data, times, tau, estimator)
        priors, integrals, codes = zip(
            *(walk.run(numbered(draws, k)) for k in range(paths)), strict=True
        )
        prior, path = torch.stack(priors, dim=1), torch.stack(integrals, dim=1)
        stochastic = tau > 0 or estimator.stochastic
        logp, error = mean_and_error(prior + path, stochastic)
        nfe = torch.full((len(data),), paths * per_path, device=data.device)
        terms = {"prior": prior.mean(dim=1), "path": path.mean(dim=1)}
        return refuse_nan(Likelihood(logp, error, codes[-1], nfe, terms))

    return family_bound


class _Walk:
    """One path from x_eps for each sample of a batch, in y = (x − m)/α at the times of a grid."""

    def __init__(self, sde, score_fn, data, times, tau: float, estimator):
        at = torch.tensor(times, dtype=torch.float64)
        self.sde, self.score_fn, self.data, self.times = sde, score_fn, data, times
        self.tau, self.estimator = tau, estimator
        self.alpha = sde_lib.alpha_sigma(sde, at, data)[0].tolist()
        self.lam = sde_lib.half_log_snr(sde, at).tolist()

    def x_of(self, i: int, y):
        """x = m + α y at time i."""
        shift = self.sde.marginal_prob(torch.zeros_like(self.data), self._t(i))[0]
        return shift + self.alpha[i] * y

    def _t(self, i: int):
        ones = torch.ones(len(self.data), dtype=self.data.dtype, device=self.data.device)
        return ones * self.times[i]

    def _sigma(self, i: int) -> float:
        return self.alpha[i] * math.exp(-self.lam[i])

    def noise(self, i: int, x):
        """ε̂ = −σ s."""
        return -self._sigma(i) * self.score_fn(x, self._t(i))

    def node(self, i: int, y, probe):
        """ε̂, and the integral's rate per unit of |λ|: −τ² ‖ε̂‖² + (1 + τ²) σ ∇·ε̂."""
        value, columns = self.estimator(watched(lambda x: self.noise(i, x)), self.x_of(i, y), probe)
        divergence = self._sigma(i) * double(columns.mean(dim=1))
        return value, -(self.tau**2) * dot(value, value) + (1 + self.tau**2) * divergence

    def step(self, i: int, y, value, draws):
        """y at time i + 1, by Heun's method, and −∫ a dw of the step."""
        tau, h = self.tau, self.lam[i] - self.lam[i + 1]
        before, after = math.exp(-self.lam[i]), math.exp(-self.lam[i + 1])  # √V
        there, martingale = y, 0.0
        if tau:
            xi = normal(self.data, draws, f"step {i}")
            spread = tau * math.sqrt(after**2 - before**2)
            there, martingale = y + spread * xi, spread / before * dot(value, xi)
        if tau == 1:
            return there, martingale
        slope = before * value
        euler = there + (1 - tau**2) * h * slope
        slope = 0.5 * (slope + after * self.noise(i + 1, self.x_of(i + 1, euler)))
        return there + (1 - tau**2) * h * slope, martingale

    def run(self, draws):
        """log π(x_T), the integral, both (B,) in float64, and x_T."""
        probe, last = self.estimator.draw(self.data, draws), len(self.times) - 1
        y = (self.data - self.x_of(0, torch.zeros_like(self.data))) / self.alpha[0]
        value, rate = self.node(0, y, probe)
        d = self.data.shape[1:].numel()
        total = torch.full_like(rate, d * math.log(self.alpha[-1] / self.alpha[0]))
        for i in range(last):
            y, martingale = self.step(i, y, value, draws)
            before = rate
            value, rate = self.node(i + 1, y, probe)
            h = self.lam[i] - self.lam[i + 1]
            total = total + martingale + 0.5 * h * (before + rate)
        x = self.x_of(last, y)
        return double(self.sde.prior_logp(x)), total, x
