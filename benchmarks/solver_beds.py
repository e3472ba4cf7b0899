"""What solvers are measured on, a Gaussian and 2-D mixtures with exact scores, and who competes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import sampling
import sde_lib
import solvers
from parametrization import as_score_function
from sde_lib import expand


@dataclass(frozen=True)
class Member:
    """A predictor, or a whole sampler, with options."""

    label: str
    cls: Any
    options: dict = field(default_factory=dict)

    @property
    def make(self) -> Callable:
        return functools.partial(self.cls, **self.options)

    def probe(self, sde):
        """An instance, for its declared order, evaluations a step and noise."""
        return self.make(sde, lambda x, t: -x)


def processes() -> dict[str, Any]:
    """The built-in processes, with their published parameters."""
    return {
        "VE": sde_lib.VESDE(),
        "VP": sde_lib.VPSDE(),
        "sub-VP": sde_lib.subVPSDE(),
        "cosine": sde_lib.CosineVP(),
        "EDM": sde_lib.EDM(),
        "rectified flow": sde_lib.RectifiedFlow(),
        "linear VE": sde_lib.LinearVE(),
        "OUVE": sde_lib.OUVE(),
    }


def members() -> list[Member]:
    """score_sde's predictors and the catalogue of the newer ones."""
    legacy = [
        Member("euler_maruyama", sampling.EulerMaruyamaPredictor),
        Member("reverse_diffusion", sampling.ReverseDiffusionPredictor),
        Member("ancestral_sampling", sampling.AncestralSamplingPredictor),
    ]
    return legacy + [Member(*entry) for entry in solvers.catalogue()]


class Gaussian:
    """N(mean, std²) in one dimension, and its exact score."""

    def __init__(self, sde, mean: float = 0.7, std: float = 0.5):
        self.sde, self.mean, self.std = sde, mean, std

    def moments(self, t, x):
        """Mean and variance of x_t."""
        alpha, sigma = (expand(c, x) for c in sde_lib.alpha_sigma(self.sde, t, x))
        return alpha * self.mean, (alpha * self.std) ** 2 + sigma**2

    def score_fn(self):
        def score(x, t):
            mean, var = self.moments(t, x)
            return -(x - mean) / var

        return as_score_function(score, self.sde)


class Mixture:
    """Gaussians of equal weight in two dimensions, and the exact score of a process on them.

    Args:
      means: (k, 2).
      stds: (k,).
    """

    def __init__(self, sde, means: torch.Tensor, stds: torch.Tensor):
        self.sde, self.means, self.stds = sde, means.double(), stds.double()

    @classmethod
    def ring(cls, sde, k: int = 8, std: float = 0.08):
        """k narrow modes on the unit circle."""
        angle = torch.arange(k, dtype=torch.float64) * (2 * math.pi / k)
        means = torch.stack([angle.cos(), angle.sin()], dim=1)
        return cls(sde, means, torch.full((k,), std, dtype=torch.float64))

    @classmethod
    def pair(cls, sde):
        """Two wide modes, smooth enough for orders to show at few steps."""
        return cls(sde, torch.tensor([[0.7, -0.4], [-0.6, 0.9]]), torch.tensor([0.35, 0.5]))

    def sample(self, n: int, seed: int) -> torch.Tensor:
        """n points of the data, (n, 2)."""
        generator = torch.Generator().manual_seed(seed)
        k = torch.randint(len(self.means), (n,), generator=generator)
        z = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        return self.means[k] + self.stds[k, None] * z

    def score_at(self, x, alpha, sigma):
        """∇ log Σ_k N(x; α μ_k, α² s_k² + σ²)."""
        var = (alpha * self.stds) ** 2 + sigma**2
        pull = alpha[..., None] * self.means - x[:, None]
        log_w = -0.5 * pull.square().sum(2) / var - torch.log(var)
        return (torch.softmax(log_w, dim=1)[..., None] * pull / var[..., None]).sum(1)

    def score_fn(self):
        def score(x, t):
            alpha, sigma = (c[:, None] for c in sde_lib.alpha_sigma(self.sde, t, x))
            return self.score_at(x.double(), alpha, sigma).to(x.dtype)

        return as_score_function(score, self.sde)

    def flow(self, x, t, s):
        """The probability flow from t to s, by SciPy's eighth-order method in λ.

        x̄ = x/α obeys dx̄/dλ = ρ² ∇ log p(x̄), with ρ = σ/α = e^{−λ}.
        """
        from scipy.integrate import solve_ivp

        one = torch.ones(len(x), 1, dtype=torch.float64)

        def rhs(lam, flat):
            rho = math.exp(-lam)
            x_bar = torch.from_numpy(flat).reshape(x.shape)
            return (rho**2 * self.score_at(x_bar, one, rho * one)).reshape(-1).numpy()

        ends = torch.stack([torch.as_tensor(u, dtype=torch.float64) for u in (t, s)])
        alpha = sde_lib.alpha_sigma(self.sde, ends, x)[0]
        span = sde_lib.half_log_snr(self.sde, ends).tolist()
        start = (x.double() / alpha[0]).reshape(-1).numpy()
        result = solve_ivp(rhs, span, start, "DOP853", rtol=1e-11, atol=1e-12)
        if not result.success:
            raise RuntimeError(f"no reference solution: {result.message}")
        return alpha[1] * torch.from_numpy(result.y[:, -1]).reshape(x.shape)


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor, projections: int = 128) -> float:
    """Sliced 2-Wasserstein distance of two sets of n points, (n, *): the root mean square of the
    one-dimensional distances, which are those of sorted projections, over fixed directions."""
    a, b = a.reshape(len(a), -1).double(), b.reshape(len(b), -1).double()
    if a.shape != b.shape:
        raise ValueError(
            f"expected as many points of one dimension, got {list(a.shape)} and {list(b.shape)}"
        )
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(a.shape[1], projections, generator=generator, dtype=torch.float64)
    directions = torch.nn.functional.normalize(directions, dim=0)
    gaps = (a @ directions).sort(dim=0).values - (b @ directions).sort(dim=0).values
    return float(gaps.square().mean().sqrt())
