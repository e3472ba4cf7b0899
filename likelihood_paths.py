"""Importance-weighted bounds on the log-likelihood of a discrete reverse chain.

The model here is the chain that a sampler of `steps` exponential steps runs: x_T ~ π, then for each
pair of times t > s, with h = λ_s − λ_t, D = E[x_0 | x_t] of the network and τ² = 1 − λ_H,

    p(x_s | x_t) = N(e^{−τ²h} (σ_s/σ_t) x_t + α_s (1 − e^{−(1+τ²)h}) D,  σ_s² (1 − e^{−2τ²h})),

and last p(x_0 | x_eps) = N(D, (σ_eps/α_eps)²). ('tau_exponential' is this chain; for τ = 1 it is
ancestral sampling.) Given x_0 a path is drawn from the same Gaussians with x_0 in place of D, which
keep p(x_t | x_0) of the process at every time (Song, Meng & Ermon 2021, eq. 7). Both are exact, so
for any number of steps

    log p(x_0) ≥ E log (1/K) Σ_k w_k,   w = π(x_T) Π p(x_s | x_t) p(x_0 | x_eps) / q(path | x_0),

which rises with K to log p(x_0) of this discrete model (Burda et al. 2016, theorem 1). It is no
estimate of the continuous model's likelihood, which it nears as steps grow.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

import arguments
import sde_lib
from likelihood_bits import Likelihood, check_data, refuse_nan
from likelihood_bounds import check_process, check_stochastic, dot, numbered, tau_of
from models.utils import get_score_fn
from randomness import normal
from sde_lib import double, expand


def importance_weighted(logw: torch.Tensor) -> torch.Tensor:
    """log (1/K) Σ_k w_k of log-weights (K, B), as of K paths or K dequantisations: (B,).

    A lower bound on log E w in mean, which rises with K (Burda et al. 2016). Weights are added in
    float64.
    """
    return torch.logsumexp(double(logw), dim=0) - math.log(len(logw))


def importance_error(logw: torch.Tensor) -> torch.Tensor:
    """The standard error of `importance_weighted` by the delta method: sd(w)/(mean(w) √K); (B,).

    nan for K = 1. It says nothing of the bias, the bound's own gap, and where few of the weights
    have most of the sum it understates the spread, by a factor of two or three at K of 4 to 64.
    """
    if len(logw) == 1:
        return torch.full_like(double(logw[0]), float("nan"))
    w = torch.exp(double(logw) - double(logw).max(dim=0).values)
    return w.std(dim=0) / w.mean(dim=0) / math.sqrt(len(logw))


def get_path_bound_fn(
    sde,
    *,
    paths: int = 1,
    steps: int = 100,
    lam: float = 0.0,
    eps: float = 1e-5,
    continuous: bool = True,
) -> Callable:
    """path_bound(model, data, *, draws=None) -> Likelihood: the importance-weighted bound, in nats.

    The terms 'prior', 'path' and 'offset' are means over the paths, which add up to the ELBO (K =
    1) of these paths; 'importance' is what the weighting adds, never negative.

    Args:
      sde: the forward process, any affine one.
      paths: K; as many times the network evaluations. Small batches of paths are no cheaper.
      steps: of the chain from T to eps, uniform in λ; steps + 1 evaluations per path.
      lam: the member λ_H of the family of reverse SDEs, 0 ≤ lam < 1.
      eps: the smallest time.
      continuous: whether the network was trained with continuous time.
    """
    arguments.whole(paths=paths, steps=steps)
    arguments.real(lam=lam)
    if paths < 1 or steps < 1:
        raise ValueError(f"a path bound needs paths ≥ 1 and steps ≥ 1, got {paths} and {steps}")
    check_stochastic(lam)
    check_process(sde, eps)
    times = lambda_grid(sde, eps, steps)

    @torch.inference_mode(False)
    @torch.no_grad()
    def path_bound(model, data, *, draws=None) -> Likelihood:
        check_data(data)
        data = data.clone() if data.is_inference() else data
        score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
        found = [
            _log_weight(sde, score_fn, data, times, tau_of(lam), numbered(draws, k))
            for k in range(paths)
        ]
        logw = torch.stack([prior + path + offset for prior, path, offset in found])
        logp = importance_weighted(logw)
        prior, path, offset = (torch.stack(part).mean(dim=0) for part in zip(*found, strict=True))
        terms = {"prior": prior, "path": path, "offset": offset}
        terms["importance"] = logp - logw.mean(dim=0)
        nfe = torch.full((len(data),), paths * (steps + 1), device=data.device)
        return refuse_nan(Likelihood(logp, importance_error(logw), None, nfe, terms))

    return path_bound


def lambda_grid(sde, eps: float, steps: int) -> list[float]:
    """steps + 1 times from T to eps, uniform in λ."""
    ends = sde_lib.half_log_snr(sde, torch.tensor([sde.T, eps], dtype=torch.float64))
    lam = torch.linspace(ends[0].item(), ends[1].item(), steps + 1, dtype=torch.float64)
    inner = sde_lib.time_of_half_log_snr(sde, lam[1:-1]).tolist()
    return [float(sde.T), *inner, float(eps)]


def _log_weight(sde, score_fn, data, times, tau: float, draws):
    """log w of one path for each x_0 of the batch, in its three parts, (B,) each, in float64.

    With x_t = m_t + α x_0 + σ z_t the path is z_s = e^{−τ²h} z_t + √(1 − e^{−2τ²h}) ξ, and with
    e = ε̂(x_t) − z_t the two means differ by −κ e standard deviations:

        log p(x_s | x_t) − log q(x_s | x_t, x_0) = −½ ‖ξ + κ e‖² + ½ ‖ξ‖² = −κ ξᵀe − ½ κ² ‖e‖²,
        κ = e^h (1 − e^{−(1+τ²)h}) / √(1 − e^{−2τ²h}).
    """
    ones = torch.ones(len(data), dtype=data.dtype, device=data.device)
    coefficients = torch.tensor(times, dtype=torch.float64)
    alpha, sigma = sde_lib.alpha_sigma(sde, coefficients, data)
    lam = sde_lib.half_log_snr(sde, coefficients).tolist()
    d = data.shape[1:].numel()

    def at(i: int, z):
        mean, std = sde.marginal_prob(data, ones * times[i])
        return mean + expand(std, data) * z

    def error(i: int, z):
        return -float(sigma[i]) * score_fn(at(i, z), ones * times[i]) - z

    z = normal(data, draws, "prior")
    log_q = -0.5 * (d * math.log(2 * math.pi * float(sigma[0]) ** 2) + dot(z, z))
    prior = double(sde.prior_logp(at(0, z))) - log_q
    path = torch.zeros_like(prior)
    for i in range(len(times) - 1):
        h, e = lam[i + 1] - lam[i], error(i, z)
        noise = math.sqrt(-math.expm1(-2 * tau**2 * h))
        kappa = -math.exp(h) * math.expm1(-(1 + tau**2) * h) / noise
        xi = normal(data, draws, f"step {i}")
        path = path - kappa * dot(xi, e) - 0.5 * kappa**2 * dot(e, e)
        z = math.exp(-(tau**2) * h) * z + noise * xi
    e = error(len(times) - 1, z)
    scale = float(sigma[-1] / alpha[-1])
    offset = -0.5 * (d * math.log(2 * math.pi * scale**2) + dot(e, e))
    return prior, path, offset
