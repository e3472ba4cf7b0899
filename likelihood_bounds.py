"""Lower bounds on the log-likelihood of the plug-in reverse SDE, without simulating it.

The model is the reverse SDE with the learned score s in place of ∇log p_t, from the prior π at T to
eps, and last x_0 ~ N(D(x_eps), (σ_eps/α_eps)² I). With ε̂ = −σ s and x_t = α x_0 + σ z (plus m_t for
a process with a shifted origin), the forward process gives for every x_0

    log p(x_0) ≥ E log π(x_T) + d log(σ_T/σ_eps) − c ∫ E ‖ε̂ − z‖² |dλ|            'prior', 'path'
                 + d log α_eps + ½ (d − E ‖ε̂(x_eps) − z‖²)                         'offset'

over λ = log(α/σ) from λ_T to λ_eps, with c = 1 (Song, Durkan, Murray & Ermon 2021, theorem 3; Huang
et al. 2021, theorem 3). What each number bounds:

    prior + path            E[log p_eps(x_eps) | x_0], of the data with the noise of time eps;
                            equal to it where the score and the prior are exact
    prior + path + offset   log p(x_0), of the data themselves, the last step included
    start='eps'             log p_eps(x), the number of the probability-flow ODE, by starting the
                            forward process at eps in x; equal to it where score and prior are exact

The two forms have the same mean, since E ε̂ᵀz = σ E ∇·ε̂ (Stein):

    score      ‖ε̂ − z‖²                      one network evaluation
    implicit   ‖ε̂‖² + d − 2 σ ∇·ε̂            and one vector-Jacobian product per probe

The family of plug-in reverse SDEs (Huang et al. 2021, appendix C) has noise τ g, τ² = 1 − λ_H; a
sampler of it is 'tau_euler' or 'tau_exponential' with the option tau = `tau_of(λ_H)`. The forward
process of drift f x − ½ λ_H g² ∇log p(x_t | x_0) has the noise τ g too, and the same p(x_t | x_0);
it gives the bound above with

    c = (1 − λ_H/2)²/(1 − λ_H).

That grows without limit as λ_H → 1, the ODE, whose likelihood is exact (`get_ode_likelihood_fn`); a
bound that stays tight on the way there, by simulation, is `likelihood_family.get_family_bound_fn`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

import arguments
import sde_lib
from divergence import Trace, get_trace, watched
from likelihood_bits import Likelihood, check_data, refuse_nan
from models.utils import get_score_fn
from parametrization import SIGMA_DATA
from randomness import normal
from sde_lib import double, expand, sum_except_batch

FORMS = ("score", "implicit")
TIMES = ("likelihood", "uniform")
STARTS = ("data", "eps")


def tau_of(lam: float) -> float:
    """τ = √(1 − λ_H) of the member λ_H of the family: 1 is the reverse SDE, 0 the ODE."""
    if not 0 <= lam <= 1:
        raise ValueError(f"the family of reverse SDEs needs 0 ≤ lam ≤ 1, got {lam}")
    return math.sqrt(1 - lam)


def path_factor(lam: float) -> float:
    """c = (1 − λ_H/2)²/(1 − λ_H), what the path term of the member λ_H is multiplied by."""
    check_stochastic(lam)
    return (1 - lam / 2) ** 2 / (1 - lam)


def check_stochastic(lam: float) -> None:
    """Refuse the ODE, whose paths have no density with respect to a diffusion's."""
    if not 0 <= lam < 1:
        raise ValueError(
            f"this bound needs 0 ≤ lam < 1, got {lam}; lam=1 is the probability-flow ODE, whose "
            "likelihood is exact: use likelihood.get_ode_likelihood_fn"
        )


def check_process(sde, eps: float) -> None:
    """Refuse a process without λ, and an eps that has no noise or is no time of it."""
    sde_lib.check_process(sde)
    arguments.real(eps=eps)
    if not sde_lib.is_affine(sde):
        raise ValueError(
            f"a bound needs p(x_t | x_0) = N(α x_0, σ²), and the drift or mean of "
            f"{type(sde).__name__} is not affine in x; use likelihood.get_ode_likelihood_fn"
        )
    at = torch.tensor([eps], dtype=torch.float64)
    if not 0 <= eps < sde.T or not sde_lib.alpha_sigma(sde, at)[1].item() > 0:
        raise ValueError(
            f"a bound needs 0 < eps < {sde.T}, with σ(eps) > 0, got {eps}; use "
            f"{sde.sampling_eps or 1e-5}"
        )


def get_elbo_fn(
    sde,
    *,
    eps: float = 1e-5,
    points: int = 2,
    form: str = "score",
    times: str = "likelihood",
    truncate: float = 0.0,
    trace: str = "rademacher",
    probes: int = 1,
    lam: float = 0.0,
    start: str = "data",
    offset: bool = True,
    continuous: bool = True,
) -> Callable:
    """elbo(model, data, *, draws=None) -> Likelihood: a lower bound on log p in nats, unbiased.

    The formulas stand above. Times come in pairs, a pair for each of points/2 equal parts of their
    distribution, and the standard error is that of the pairs: it counts times, noise and probes.
    An image's numbers depend on `draws` (a `randomness.Draws` of the images), not on the batch.

    Args:
      sde: the forward process, any affine one.
      eps: the smallest time.
      points: times per image, 1 (no error is known) or an even number. As many network
        evaluations, and for the offset points/8 more, at least 2 (1 for one point).
      form: 'score' or 'implicit', of equal mean.
      times: 'likelihood', uniform in λ; or 'uniform' in t.
      truncate: of 'likelihood', a time below which their density is constant, as
        `sde_lib.LikelihoodTimes`: still unbiased.
      trace, probes: of the implicit form, as `divergence.get_trace`.
      lam: the member λ_H of the family of reverse SDEs, 0 ≤ lam < 1.
      start: 'data', or 'eps' for a bound on log p_eps(x), which needs the implicit form.
      offset: whether to add the last step; without it the bound is on E[log p_eps(x_eps) | x_0].
      continuous: whether the network was trained with continuous time.
    """
    arguments.whole(points=points)
    arguments.real(truncate=truncate, lam=lam)
    _check_options(points, form, times, truncate, start, lam)
    check_process(sde, eps)
    bound = _Bound(
        sde,
        eps,
        _times(sde, eps, times, truncate),
        get_trace(trace, probes) if form == "implicit" else None,
        path_factor(lam),
        start == "eps",
    )
    offset = offset and start == "data"

    @torch.inference_mode(False)
    @torch.no_grad()
    def elbo(model, data, *, draws=None) -> Likelihood:
        check_data(data)
        data = data.clone() if data.is_inference() else data
        score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
        found = [bound.point(score_fn, data, j, points, draws) for j in range(points)]
        prior, path = (torch.stack(values) for values in zip(*found, strict=True))
        terms = {"prior": prior.mean(dim=0), "path": path.mean(dim=0) + bound.constant(data)}
        variance = _pair_variance(prior + path)
        count = 0
        if offset:
            count = max(min(points, 2), points // 8)
            last = torch.stack([bound.offset(score_fn, data, j, draws) for j in range(count)])
            terms["offset"] = last.mean(dim=0)
            variance = variance + last.var(dim=0) / count if count > 1 else variance
        logp = torch.stack(list(terms.values())).sum(dim=0)
        nfe = torch.full((len(data),), points + count, dtype=torch.int64, device=data.device)
        return refuse_nan(Likelihood(logp, variance.sqrt(), None, nfe, terms))

    return elbo


def _check_options(points, form, times, truncate, start, lam) -> None:
    for name, value, known in (("form", form, FORMS), ("times", times, TIMES)):
        if value not in known:
            raise ValueError(f"{name} {value!r} of a bound is unknown; known: {', '.join(known)}")
    if points < 1 or (points > 1 and points % 2):
        raise ValueError(f"a bound takes its times in pairs: points=1 or even, got {points}")
    if truncate and times == "uniform":
        raise ValueError("truncate is of times='likelihood'; leave it 0.0 for uniform times")
    if start not in STARTS:
        raise ValueError(f"start {start!r} of a bound is unknown; known: {', '.join(STARTS)}")
    if start == "eps" and (form != "implicit" or lam):
        raise ValueError(
            "start='eps' needs form='implicit' and lam=0: the score p(x_t | x_eps) is infinite at "
            "t = eps; see likelihood_family for other lam"
        )


def _times(sde, eps: float, name: str, truncate: float) -> sde_lib.TimeSampler:
    if name == "uniform":
        return sde_lib.TimeSampler(sde, eps)
    return sde_lib.LikelihoodTimes(sde, eps, truncate=truncate)


class Numbered:
    """The random numbers of one of several repetitions: streams with a number before the name."""

    def __init__(self, draws, number: int):
        self.draws, self.number = draws, number

    def rand(self, stream: str, *args, **options) -> torch.Tensor:
        """Uniform numbers, as `Draws.rand`."""
        return self.draws.rand(f"{self.number} {stream}", *args, **options)

    def randn(self, stream: str, *args, **options) -> torch.Tensor:
        """Standard normal numbers, as `Draws.randn`."""
        return self.draws.randn(f"{self.number} {stream}", *args, **options)


def numbered(draws, number: int) -> Numbered | None:
    """The numbers of repetition `number`; None, torch's own generator, where draws is None."""
    return None if draws is None else Numbered(draws, number)


def dot(v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """vᵀw of each sample, (B,), summed in float64."""
    return sum_except_batch(double(v * w))


@dataclass(frozen=True)
class _Bound:
    """One evaluation of the bound at one time per image."""

    sde: sde_lib.SDE
    eps: float
    times: sde_lib.TimeSampler
    trace: Trace | None
    factor: float
    from_eps: bool

    def _ends(self):
        ends = torch.tensor([self.eps, self.sde.T], dtype=torch.float64)
        return [c.tolist() for c in sde_lib.alpha_sigma(self.sde, ends)]

    def constant(self, data) -> float:
        """d log(σ_T/σ_eps); from eps it is −∫ ∇·(−f x) dt = d log(α_T/α_eps)."""
        (a, a_T), (s, s_T) = self._ends()
        return data.shape[1:].numel() * math.log(a_T / a if self.from_eps else s_T / s)

    def _perturb(self, data, t, z):
        """x_t of x_0, or of x_eps, and its standard deviation given it."""
        mean, std = self.sde.marginal_prob(data, t)
        if not self.from_eps:
            return mean + expand(std, data) * z, std
        # x_t = m_t + (α_t/α_eps)(x − m_eps) + …: the mean is affine, so from that of
        # (x − m_eps)/α_eps at time 0.
        zero = torch.zeros_like(data)
        at = torch.full_like(t, self.eps)
        (a, s), (a_t, s_t) = (sde_lib.alpha_sigma(self.sde, u, data) for u in (at, t))
        centred = (data - self.sde.marginal_prob(zero, at)[0]) / expand(a, data)
        mean = self.sde.marginal_prob(centred, t)[0]
        std = torch.sqrt((s_t**2 - (a_t / a * s) ** 2).clamp(min=0)).to(data.dtype)
        return mean + expand(std, data) * z, std

    def point(self, score_fn, data, j: int, points: int, draws):
        """log π(x_T), and minus the path term at one random time; (B,) each, in float64."""
        own, parts = numbered(draws, j), max(points // 2, 1)
        u = torch.rand(len(data), device=data.device) if own is None else own.rand("time")
        t = self.times.quantile((j // 2 + double(u.to(data.device))) / parts).to(data.dtype)
        z = normal(data, own, "noise")
        x, std = self._perturb(data, t, z)
        error = self._error(score_fn, x, t, z, std, own)
        s = sde_lib.alpha_sigma(self.sde, t, data)[1]
        g = sde_lib.drift_diffusion(self.sde, t, data)[1]
        weight = g**2 / (2 * s**2) / self.times.density(t)
        return self._prior(data, z), -weight * error

    def _prior(self, data, z):
        """log π(x_T) + ½ (‖z‖² − d): the second part has mean zero, and cancels most noise."""
        end = torch.full((len(data),), float(self.sde.T), dtype=data.dtype, device=data.device)
        x, _ = self._perturb(data, end, z)
        return double(self.sde.prior_logp(x)) + 0.5 * _excess(z)

    def _error(self, score_fn, x, t, z, std, draws):
        """The integrand over λ, (B,): in either form c ‖ε̂ − z‖² in mean.

        A multiple of ‖z‖² − d, of mean zero, is taken off: for data N(m, σ_data²) the one that
        leaves nothing of ‖z‖².
        """
        alpha, sigma = sde_lib.alpha_sigma(self.sde, t, x)
        d, v = x.shape[1:].numel(), alpha**2 * SIGMA_DATA**2 + sigma**2

        def noise(y):
            return -expand(sigma, y) * score_fn(y, t)

        if self.trace is None:
            w = (alpha**2 * SIGMA_DATA**2 / v) ** 2
            return self.factor * (_square(noise(x) - z) - w * _excess(z))
        value, columns = self.trace(watched(noise), x, self.trace.draw(x, draws))
        w = (sigma * double(std) / v) ** 2
        both = _square(value) - w * _excess(z) - 2 * sigma * double(columns.mean(dim=1))
        return both if self.from_eps else self.factor * (both + d)

    def offset(self, score_fn, data, j: int, draws):
        """d log α_eps + ½ (d − ‖ε̂(x_eps) − z‖²): log p(x_0 | x_eps) − log p(x_eps | x_0), (B,)."""
        t = torch.full((len(data),), self.eps, dtype=data.dtype, device=data.device)
        z = normal(data, numbered(draws, j), "offset")
        mean, std = self.sde.marginal_prob(data, t)
        x = mean + expand(std, data) * z
        sigma = sde_lib.alpha_sigma(self.sde, t, data)[1]
        e = -expand(sigma, x) * score_fn(x, t) - z
        alpha, d = self._ends()[0][0], data.shape[1:].numel()
        return d * math.log(alpha) + 0.5 * (d - _square(e) + _excess(z))


def _square(x: torch.Tensor) -> torch.Tensor:
    return dot(x, x)


def _excess(z: torch.Tensor) -> torch.Tensor:
    """‖z‖² − d, of mean zero."""
    return _square(z) - z.shape[1:].numel()


def _pair_variance(values: torch.Tensor) -> torch.Tensor:
    """The variance of the mean of values (points, B), which are independent in pairs; (B,).

    Of a stratum's mean (a + b)/2 it is (a − b)²/4. nan where there is one value.
    """
    if len(values) == 1:
        return torch.full_like(values[0], float("nan"))
    difference = values[0::2] - values[1::2]
    return (difference**2 / 4).sum(dim=0) / len(difference) ** 2
