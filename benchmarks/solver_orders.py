"""Orders, measured: how fast the error of each predictor falls on each process.

Deterministic ones are compared with SciPy's solution on a 2-D mixture. Stochastic ones keep a
Gaussian Gaussian, so that the mean and variance they give are read off their response to each
single random number: there is no Monte Carlo in it.
"""

from __future__ import annotations

import itertools
import math

import torch

import sde_lib
from benchmarks.solver_beds import Gaussian, Member, Mixture

#: Steps whose errors are compared, without and with noise.
COUNTS = {False: (128, 256), True: (64, 256)}
LAMBDA = (-5.0, 2.0)


def equal_steps(sde, n: int) -> torch.Tensor:
    """Times of n equal steps in λ, the first of them halved 2 log₂ n times.

    Multistep methods start at order 1; from a step of h/n² their order shows all the same.
    """
    ends = torch.tensor([float(sde.T), sde.sampling_eps], dtype=torch.float64)
    low, high = sde_lib.half_log_snr(sde, ends).tolist()
    low, high = max(low, LAMBDA[0]), min(high, LAMBDA[1])
    u = torch.arange(n + 1, dtype=torch.float64)
    halves = 0.5 ** torch.arange(math.ceil(2 * math.log2(n)), 0, -1, dtype=torch.float64)
    u = torch.cat([u[:1], halves, u[1:]]) / n
    times = sde_lib.time_of_half_log_snr(sde, low + (high - low) * u)
    return times.clamp(ends[1], ends[0])


def observed_order(member: Member, sde) -> float:
    """The slope of log(error) against log(steps)."""
    stochastic = member.probe(sde).stochastic
    error = _weak_error if stochastic else _Path(sde).error
    few, many = COUNTS[stochastic]
    errors = [error(member, sde, equal_steps(sde, n)) for n in (few, many)]
    return math.log(errors[0] / errors[1]) / math.log(many / few)


def declared_order(member: Member, sde) -> int:
    """What the member says of itself."""
    return member.probe(sde).order


class _Path:
    def __init__(self, sde):
        self.bed = Mixture.pair(sde)

    def error(self, member: Member, sde, times) -> float:
        """Mean distance to the exact solution."""
        t = times[0]
        alpha, sigma = sde_lib.alpha_sigma(sde, t)
        noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        x = alpha * self.bed.sample(16, seed=2) + sigma * noise
        exact = self.bed.flow(x, t, times[-1])
        predictor = member.make(sde, self.bed.score_fn())
        return float((_run(predictor, x, times) - exact).norm(dim=1).mean())


def _run(predictor, x, times):
    predictor.start(times)
    with torch.no_grad():
        for t, s in itertools.pairwise(times):
            x = predictor.step(x, t, s)[0]
    return x


def _weak_error(member: Member, sde, times) -> float:
    """Errors of mean and variance after a run.

    The end of a run is a_0 + a_1 x + Σ_k b_k z_k, an affine function of the start and of the
    random numbers: row 0 has all zero, row 1 has x = 1, and row k + 2 has z_k = 1.
    """
    bed = Gaussian(sde)
    draws = _Draws()
    _run_with(draws, member, sde, bed, torch.zeros(1, 1, dtype=torch.float64), times)
    x = torch.zeros(draws.count + 2, 1, dtype=torch.float64)
    x[1] = 1
    end = _run_with(_Draws(), member, sde, bed, x, times)[:, 0]
    (m0, v0), (m1, v1) = (bed.moments(t, torch.zeros(1, 1)) for t in (times[0], times[-1]))
    mean = end[0] + (end[1] - end[0]) * m0
    var = (end[1] - end[0]) ** 2 * v0 + (end[2:] - end[0]).square().sum()
    return float((mean - m1).abs() + (var - v1).abs())


class _Draws:
    """In the place of noise: at its k-th call 1 in row k + 2 and 0 elsewhere."""

    def __init__(self):
        self.count = 0

    def __call__(self, x):
        z = torch.zeros_like(x)
        if self.count + 2 < len(x):
            z[self.count + 2] = 1
        self.count += 1
        return z


def _run_with(draws: _Draws, member: Member, sde, bed: Gaussian, x, times):
    predictor = member.make(sde, bed.score_fn())
    predictor.randn_like = draws
    return _run(predictor, x, times)
