"""Processes, exact scores, exact solutions and drivers that the tests of solvers share."""

from __future__ import annotations

import itertools
import math

import torch
from toys import UserSDE

import sde_lib
import solvers
from sampling_steps import batch_time
from sde_lib import expand

#: Weak orders are read off Gaussians, which linear samplers keep Gaussian.
MEAN = torch.tensor([0.7, -0.4], dtype=torch.float64).reshape(1, 2, 1, 1)
STD = torch.tensor([0.3, 0.8], dtype=torch.float64).reshape(1, 2, 1, 1)


def paths() -> dict[str, sde_lib.SDE]:
    """Every process the solvers promise to run on."""
    return {
        "ve": sde_lib.VESDE(),
        "vp": sde_lib.VPSDE(),
        "subvp": sde_lib.subVPSDE(),
        "cosine": sde_lib.CosineVP(),
        "edm": sde_lib.EDM(),
        "rectified flow": sde_lib.RectifiedFlow(),
        "linear ve": sde_lib.LinearVE(),
        "ouve": sde_lib.OUVE(),
        "user": UserSDE(),
    }


PATHS = tuple(paths())


def grid(sde, steps: int, lam_end: float = 2.0) -> torch.Tensor:
    """Times of `steps` equal steps in λ, from λ = −5 or T to `lam_end` or eps.

    The first of them is halved 2 log₂(steps) times, so that multistep solvers, which start at
    order 1, do so in a step of h/steps²: their order needs starting values that accurate.
    """
    ends = torch.tensor([float(sde.T), sde.sampling_eps], dtype=torch.float64)
    low, high = sde_lib.half_log_snr(sde, ends).tolist()
    low, high = max(low, -5.0), min(high, lam_end)
    halvings = math.ceil(2 * math.log2(steps))
    u = torch.arange(steps + 1, dtype=torch.float64)
    u = torch.cat([u[:1], 0.5 ** torch.arange(halvings, 0, -1), u[1:]]) / steps
    times = sde_lib.time_of_half_log_snr(sde, low + (high - low) * u)
    return times.clamp(ends[1], ends[0])


# --- data with closed forms -----------------------------------------------------------------


class Gaussian:
    """N(mean, diag std²) and everything exact about it along a path."""

    def __init__(self, sde, mean=MEAN, std=STD):
        self.sde, self.mean, self.std = sde, mean, std
        self.calls = 0

    def moments(self, t, x):
        """Mean and variance of x_t."""
        a, s = (expand(c, x) for c in sde_lib.alpha_sigma(self.sde, t, x))
        return a * self.mean, (a * self.std) ** 2 + s**2

    def __call__(self, x, t):
        """The score."""
        self.calls += 1
        mean, var = self.moments(t, x)
        return -(x - mean) / var

    def flow(self, x, t, s):
        """The probability flow from t to s: x_s = μ_s + √(v_s/v_t) (x − μ_t)."""
        (m_t, v_t), (m_s, v_s) = (self.moments(batch_time(x, u), x) for u in (t, s))
        return m_s + torch.sqrt(v_s / v_t) * (x - m_t)


class Mixture:
    """Two Gaussians of unequal weight and width in two dimensions, and their score."""

    def __init__(self, sde):
        self.sde = sde
        self.means = torch.stack([MEAN[0], -1.5 * MEAN[0].flip(0)]).unsqueeze(1)  # (2, 1, 2, 1, 1)
        self.vars = torch.tensor([0.3, 0.5], dtype=torch.float64).reshape(2, 1, 1, 1, 1) ** 2
        self.log_weights = torch.tensor([0.4, 0.6]).double().log().reshape(2, 1, 1, 1, 1)

    def score(self, x, alpha, sigma):
        pull, var = alpha * self.means - x, alpha**2 * self.vars + sigma**2
        square = (pull**2 / var).sum(dim=(2, 3, 4), keepdim=True)
        log_w = self.log_weights - 0.5 * square - torch.log(var)  # two dimensions
        return (torch.softmax(log_w, dim=0) * pull / var).sum(dim=0)

    def __call__(self, x, t):
        return self.score(x, *(expand(c, x) for c in sde_lib.alpha_sigma(self.sde, t, x)))

    def flow(self, x, t, s):
        """The probability flow from t to s, by SciPy's eighth-order method.

        x̄ = x/α obeys dx̄/dλ = −ρ ε̂ = ρ² times its score, with ρ = σ/α.
        """
        from scipy.integrate import solve_ivp

        (a_t, _), (a_s, _) = (sde_lib.alpha_sigma(self.sde, u, x) for u in (t, s))

        def rhs(lam, flat):
            rho = math.exp(-lam)
            return (rho**2 * self.score(torch.as_tensor(flat).reshape(x.shape), 1.0, rho)).flatten()

        span = [float(sde_lib.half_log_snr(self.sde, u)) for u in (t, s)]
        start = (x / a_t).flatten().numpy()
        result = solve_ivp(rhs, span, start, "DOP853", rtol=1e-12, atol=1e-13)
        assert result.success
        return a_s * torch.as_tensor(result.y[:, -1]).reshape(x.shape)


def start_points(sde, t, n: int = 16) -> torch.Tensor:
    """States at time t, as wide as the noise, in float64."""
    g = torch.Generator().manual_seed(3)
    width = sde_lib.alpha_sigma(sde, t, MEAN)[1]
    return width * torch.randn(n, 2, 1, 1, dtype=torch.float64, generator=g)


# --- running a solver -----------------------------------------------------------------------


def run(solver, x, times):
    """All steps and the last call: (x, x_mean) at eps."""
    solver.start(times)
    for t, s in itertools.pairwise(times):
        x, _ = solver.step(x, t, s)
    return solver.finish(x, times[-1])


def affine_map(solver, times):
    """A, b and c_k of x_eps = A x_T + b + Σ_k c_k z_k of a solver whose score is affine in x.

    Read off by running 0, 1 and, with no noise but that of one draw, each unit of noise: rows of
    one batch, since a diagonal map acts on every coordinate alone.
    """
    draws = 4 * len(times)
    x = torch.zeros(draws + 2, 2, 1, 1, dtype=torch.float64)
    x[1] = 1.0
    count = [0]

    def unit(state):
        z = torch.zeros_like(state)
        z[2 + count[0]] = 1.0
        count[0] += 1
        return z

    solver.randn_like = unit
    out = run(solver, x, times)[0]
    b = out[0]
    return out[1] - b, b, out[2 : 2 + count[0]] - b


def moments_at_end(solver, data: Gaussian, times):
    """Mean and variance at eps of a solver started from the exact p_T."""
    x = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    mean, var = data.moments(batch_time(x, times[0]), x)
    A, b, c = affine_map(solver, times)
    return A * mean + b, A**2 * var + (c**2).sum(dim=0)


def members(stochastic: bool):
    """The catalogue's deterministic or stochastic part."""
    sde = sde_lib.VPSDE()
    for label, cls, options in solvers.catalogue():
        if cls(sde, lambda x, t: x, **options).stochastic == stochastic:
            yield label, cls, options


def ids(cases) -> list[str]:
    return [label for label, *_ in cases]
