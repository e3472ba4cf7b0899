"""Posterior sampling by particles: twisted sequential Monte Carlo (Wu et al. 2023).

A guided sampler proposes, and weights make good what its guidance got wrong, so that the weighted
particles tend to the posterior of the discretised model as their number grows, whatever the
network and however rough the guidance.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import arguments
import sde_lib
from controllable_generation_methods import (
    check_measurement,
    check_noise,
    check_problem,
    register_inverse_solver,
)
from controllable_generation_posterior import (
    Guide,
    PosteriorScore,
    get_rule,
    posterior_score,
)
from parametrization import Point
from randomness import seed_for
from sampling_grids import RHO, check_eps, time_grid
from sampling_loop import FiniteWatch, check_dtype, check_seeds, score_and_device, step_bar
from sampling_noise import NoiseSource
from sde_lib import alpha_sigma, half_log_snr


@dataclass(frozen=True)
class Particles:
    """Weighted samples of the posterior, for each of B measurements K of them.

    `x` is (B, K, *), `log_weights` (B, K), normalised; `log_evidence` (B,) is the logarithm of an
    unbiased estimate of p(y) under the discretised model; `ess` (steps, B) is the effective sample
    size at every time, before resampling; `nfe` and `vjps` are evaluations and backward passes
    of the network for one particle.
    """

    x: torch.Tensor
    log_weights: torch.Tensor
    log_evidence: torch.Tensor
    ess: torch.Tensor
    nfe: int
    vjps: int

    def mean(self) -> torch.Tensor:
        """E[x_0 | y], (B, *)."""
        w = self.log_weights.exp().to(self.x.dtype)
        return (w.reshape(*w.shape, *(1,) * (self.x.ndim - 2)) * self.x).sum(1)

    def draw(
        self,
        n: int,
        generator: torch.Generator | None = None,
        seeds: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """n samples without weights for each measurement, (B, n, *), by systematic resampling.

        Args:
          generator, seeds: the source of chance, as in `twisted_smc`.
        """
        u = torch.special.ndtr(
            NoiseSource(generator, _other(seeds)).randn_like(
                self.log_weights.new_empty(len(self.x), n + 1)
            )
        )
        picked = _systematic(self.log_weights, u[:, :1], n)
        return _gather(self.x, picked.gather(1, u[:, 1:].argsort(1)))


def twisted_smc(
    model,
    sde,
    operator,
    y: torch.Tensor,
    noise: float,
    *,
    particles: int = 64,
    method: str = "pigdm",
    steps: int = 100,
    schedule: str | Callable = "logsnr",
    rho: float = RHO,
    eps: float | None = None,
    tau: float = 1.0,
    resample_below: float = 0.5,
    chunk: int | None = None,
    conditions: dict[str, torch.Tensor] | None = None,
    denoise: bool = True,
    continuous: bool = True,
    device=None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    callback: Callable | None = None,
    progress: bool = False,
    **options,
) -> Particles:
    """Weighted samples of x_0 given y = A x_0 + σ_y z, exact as the number of particles grows.

    The model is the exponential integrator of the reverse family (`tau_exponential`),

        p(x_s | x_t) = N((σ_s/σ_t) e^{−τ²h} x + κ D, v),   κ = α_s (1 − e^{−(1+τ²)h}),
                                                            v = σ_s² (1 − e^{−2τ²h})

    the proposal moves its mean by κ (σ²/α) g, as the guided sampler of `posterior_score` does, and
    with ψ_t(x_t) ≈ p(y | x_t) of the same method

        w_s = p(x_s | x_t)/q(x_s | x_t) · ψ_s(x_s)/ψ_t(x_t),   ψ_eps = N(y; A D(x_eps), σ_y²)

    (Wu et al. 2023, alg. 1). Any ψ > 0 gives the same limit; a better one needs fewer particles.

    Args:
      model: a network or a ScoreFunction.
      sde: the forward process, affine in x.
      operator: A.
      y: (B, *shape_out), B measurements, each with particles of its own.
      noise: σ_y > 0.
      particles: K for each measurement.
      method, options: of `posterior_score`; they make g and ψ.
      steps, schedule, rho, eps: the grid, see `time_grid`.
      tau: τ > 0, the noise of the reverse family; 1 is the reverse SDE.
      resample_below: resample, systematically, where the effective sample size falls below this
        share of K; 0 is importance sampling.
      chunk: particles in a call of the network at most, of all measurements together.
      conditions: keyword arguments of the network, tensors with one row for each measurement.
      denoise: return D(x_eps) in place of x_eps.
      continuous, device, dtype, generator, seeds, progress: as in `get_pc_sampler`; one seed for
        each measurement.
      callback: called as callback(i, t, x, ess) at every time, x (B, K, *).

    Raises: ValueError for arguments out of range; FloatingPointError, naming t, where the state
      is not finite.
    """
    end = sde.sampling_eps if eps is None else eps
    _check(
        sde, operator, y, noise, particles=particles, method=method, tau=tau,
        resample_below=resample_below, seeds=seeds, chunk=chunk, dtype=dtype, callback=callback,
    )  # fmt: skip
    check_eps(sde, end, (1, *operator.shape_in))
    times = time_grid(sde, end, steps, schedule, rho=rho)
    inner, target = score_and_device(sde, model, continuous, device)
    score = posterior_score(inner, sde, operator, y, noise, method, **options)
    run = _Run(score, y.to(target), particles, chunk or len(y) * particles, conditions or {})
    run.noise = NoiseSource(generator, seeds)
    with torch.no_grad():
        x = run.prior().to(target, dtype or torch.float32)
        watch = FiniteWatch(times)
        ess = []
        log_w = torch.zeros(x.shape[:2], dtype=torch.float64, device=target)
        log_evidence = torch.zeros(len(x), dtype=torch.float64, device=target)
        log_psi = torch.zeros_like(log_w)
        for i in step_bar(range(steps), progress):
            last = i == steps - 1
            guide = run.last(x, times[i]) if last else run.guide(x, times[i])
            log_w = log_w + guide.log_likelihood.double() - log_psi
            log_psi = guide.log_likelihood.double()
            ess.append(torch.exp(2 * log_w.logsumexp(1) - (2 * log_w).logsumexp(1)))
            watch(i, x)
            if callback is not None:
                callback(i, float(times[i]), x, ess[-1])
            if last:
                x = guide.D if denoise else x
                break
            gain, log_w, picked = run.resample(log_w, ess[-1] < resample_below * particles)
            log_evidence = log_evidence + gain
            x, D, shift, log_psi = (_gather(v, picked) for v in (x, guide.D, guide.shift, log_psi))
            x, log_ratio = run.move(x, D, shift, times[i], times[i + 1], tau)
            log_w = log_w + log_ratio
        watch.last(x.flatten(1))
    log_evidence = log_evidence + log_w.logsumexp(1) - math.log(particles)
    calls = max(1, math.ceil(len(y) * particles / run.chunk))
    return Particles(
        x, log_w.log_softmax(1), log_evidence, torch.stack(ess), steps, score.vjps // calls
    )


@register_inverse_solver(name="smc")
def get_smc_solver(sde, shape, operator, y, *, noise: float = 0.0, **options: Any) -> Callable:
    """Twisted SMC as a solver by name: sampler(model) -> (samples without weights, evaluations).

    One y for all of the batch has one set of particles, of which samples are drawn; a y for each
    has a set for each.

    Args:
      options: of `twisted_smc`; `particles` is at least the number drawn.
    """
    check_problem(shape, operator, y, noise)
    each = shape[0] // len(y)
    settings = {"particles": max(64, each), **options}
    _check(sde, operator, y, noise, **settings)
    explicit = inspect.signature(twisted_smc).parameters
    of_rule = {k: v for k, v in options.items() if k not in {*explicit, "data_std", "until"}}
    get_rule(options.get("method", "pigdm"), of_rule)

    def sampler(model):
        result = twisted_smc(model, sde, operator, y, noise, **settings)
        drawn = result.draw(each, options.get("generator"), options.get("seeds"))
        return drawn.flatten(0, 1), result.nfe

    return sampler


class _Run:
    """The particles' network, noise and moves; states are (B, K, *)."""

    noise: NoiseSource

    def __init__(self, score: PosteriorScore, y, particles: int, chunk: int, conditions: dict):
        self.score, self.sde, self.y, self.chunk = score, score.sde, y, chunk
        self.items, self.particles = len(y), particles
        self.conditions = conditions

    def prior(self) -> torch.Tensor:
        shape = (self.items, self.particles, *self.score.operator.shape_in)
        x = self.noise.prior(sde_lib.unbound(self.sde), shape)
        y = sde_lib.origin(self.sde, x[:, 0])
        return x if y is None else x + y.unsqueeze(1)

    def guide(self, x, t) -> Guide:
        return self._in_chunks(x, t, self.score.guide)

    def last(self, x, t) -> Guide:
        """D at eps, with log N(y; A D, σ_y²) in full."""
        A, s2 = self.score.operator, self.score.sigma_y**2

        def look(rows, t, y, conditions):
            D = self.score.inner[0].denoise(rows, t, **conditions)
            r = y.to(D.dtype) - A(D)
            squares = sde_lib.sum_except_batch(r.double().square()) / s2
            constant = r[0].numel() * math.log(2 * math.pi * s2)
            return Guide(D, torch.zeros_like(D), -0.5 * (squares + constant), r)

        return self._in_chunks(x, t, look)

    def _in_chunks(self, x, t, look: Callable) -> Guide:
        rows = x.flatten(0, 1)
        per_row = {k: v.repeat_interleave(self.particles, 0) for k, v in self.conditions.items()}
        y = self.y.repeat_interleave(self.particles, 0)
        parts = []
        for start in range(0, len(rows), self.chunk):
            part = slice(start, start + self.chunk)
            here = rows[part]
            vec_t = torch.ones(len(here), dtype=x.dtype, device=x.device) * t
            given = {k: v[part].to(x.device) for k, v in per_row.items()}
            parts.append(look(here, vec_t, y[part], given))

        def whole(name):
            return torch.cat([getattr(p, name) for p in parts]).unflatten(0, x.shape[:2])

        return Guide(*(whole(n) for n in ("D", "shift", "log_likelihood", "residual")))

    def resample(self, log_w, due):
        """The evidence gained, the new weights, and the particles picked, (B, K)."""
        # Drawn at every time, so that no measurement's numbers depend on another's.
        u = torch.special.ndtr(self.noise.randn_like(log_w[:, :1]))
        due = due.unsqueeze(1)
        stay = torch.arange(self.particles, device=log_w.device).expand_as(log_w)
        picked = torch.where(due, _systematic(log_w, u, self.particles), stay)
        gain = log_w.logsumexp(1) - math.log(self.particles)
        return (
            torch.where(due[:, 0], gain, 0.0),
            torch.where(due, torch.zeros_like(log_w), log_w),
            picked,
        )

    def move(self, x, D, shift, t, s, tau: float):
        """A step of the guided proposal, and log p(x_s | x_t) − log q(x_s | x_t)."""
        (alpha, sigma), h = alpha_sigma(self.sde, s, x[0]), self._h(t, s)
        kappa = -alpha * torch.expm1(-(1 + tau**2) * h)
        std = sigma * torch.sqrt(-torch.expm1(-2 * tau**2 * h))
        carry = sigma / alpha_sigma(self.sde, t, x[0])[1] * torch.exp(-(tau**2) * h)
        z = self.noise.randn_like(x)
        before, after = self._origin(t, x), self._origin(s, x)
        moved = after + carry * (x - before) + kappa * (D + shift) + std * z
        pull = ((kappa / std) * shift).double().flatten(2)
        log_ratio = -(pull * z.double().flatten(2)).sum(2) - 0.5 * pull.square().sum(2)
        return moved, log_ratio

    def _h(self, t, s):
        return half_log_snr(self.sde, s) - half_log_snr(self.sde, t)

    def _origin(self, t, x):
        """E[x_t | x_0 = 0], for one particle of each measurement."""
        shift = Point(self.sde, t, x[:, 0]).shift
        return 0.0 if shift is None else shift.unsqueeze(1)


def _other(seeds: Sequence[int] | None) -> list[int] | None:
    """Seeds of a stream that has nothing in common with the one of `seeds`."""
    return None if seeds is None else [seed_for("draw", int(s)) for s in seeds]


def _systematic(log_w: torch.Tensor, u: torch.Tensor, n: int) -> torch.Tensor:
    """Systematic resampling: the particles at (k + u)/n of the cumulative weights, (B, n)."""
    cumulative = log_w.softmax(1).cumsum(1)
    places = (torch.arange(n, device=log_w.device, dtype=log_w.dtype) + u) / n
    picked = torch.searchsorted(cumulative.contiguous(), places.contiguous())
    return picked.clamp(max=log_w.shape[1] - 1)


def _gather(v: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
    """Rows v[b, picked[b]]."""
    return v[torch.arange(len(v), device=v.device).unsqueeze(1), picked]


def _check(
    sde,
    operator,
    y,
    noise,
    *,
    particles: int,
    method: str = "pigdm",
    tau: float = 1.0,
    resample_below: float = 0.5,
    seeds=None,
    chunk: int | None = None,
    dtype: torch.dtype | None = None,
    callback: Callable | None = None,
    **_,
) -> None:
    """Refuse what `twisted_smc` cannot do, before the long work."""
    if method == "dps":
        raise ValueError(
            "'dps' approximates no p(y | x_t), which twisted_smc needs; use 'pigdm', with "
            "data_std near 0 for the likelihood that dps starts from, 'tmpd' or 'mmps'"
        )
    check_dtype(dtype)
    arguments.optional(arguments.function, callback=callback)
    arguments.whole(particles=particles)
    arguments.number(tau=tau, resample_below=resample_below)
    arguments.optional(arguments.whole, chunk=chunk)
    if not sde_lib.is_affine(sde):
        raise ValueError(
            f"twisted_smc needs λ = log(α/σ), and the drift or mean of {type(sde).__name__} is not "
            "affine in x; use posterior_score under euler_maruyama"
        )
    if not check_noise(noise) > 0:
        raise ValueError(
            f"twisted_smc weighs by N(y; A D, σ_y²) and needs noise > 0, got {noise}; give a small "
            "one, such as 0.01 of the data's standard deviation"
        )
    check_measurement(operator, y, len(y))
    if particles < 1 or not tau > 0 or not 0 <= resample_below <= 1:
        raise ValueError(
            "twisted_smc needs particles ≥ 1, tau > 0 and 0 ≤ resample_below ≤ 1, got "
            f"{particles}, {tau} and {resample_below}"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"expected chunk ≥ 1, got {chunk}")
    check_seeds(seeds, (len(y),), what="measurement")
