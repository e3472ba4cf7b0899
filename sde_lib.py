"""Forward SDEs, their reverse-time family, and the quantities other rooms ask of them.

A process perturbs data x_0 to x_t = α_t x_0 + σ_t z, z ~ N(0, I), by

    dx = f(x, t) dt + g(t) dw,   t in [0, T].

`SDE` is score_sde's abstract class: five methods make a process that trains, samples and
scores everywhere. `AffineSDE` needs less: α(t) and σ(t); drift, diffusion and λ follow.
Data have any shape (B, *). Coefficients are computed in float64 and cast last. The abstract classes
are written out in `sde_lib_base.py`, the processes that came after score_sde in `sde_lib_paths.py`,
the distributions of training times in `sde_lib_times.py`; their names are here too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

import arguments
from sde_lib_base import (
    SDE,
    AffineSDE,
    alpha_sigma,
    check_direction,
    check_process,
    double,
    drift_diffusion,
    expand,
    get_sde,
    half_log_snr,
    is_affine,
    is_declared_affine,
    origin,
    register_sde,
    sum_except_batch,
    time_of_half_log_snr,
    unbound,
)
from sde_lib_paths import (
    EDM,
    OUVE,
    CosineVP,
    LinearVE,
    RectifiedFlow,
    Stretch,
    common_stretch,
    lambda_range,
    sampling_process,
    within,
)
from sde_lib_times import (
    LikelihoodTimes,
    LogitNormalTimes,
    LogNormalTimes,
    TimeSampler,
    get_time_sampler,
    register_time_sampler,
)

__all__ = [
    "EDM",
    "OUVE",
    "SDE",
    "VESDE",
    "VPSDE",
    "AffineSDE",
    "CosineVP",
    "LikelihoodTimes",
    "LinearVE",
    "LogNormalTimes",
    "LogitNormalTimes",
    "RectifiedFlow",
    "Stretch",
    "TimeSampler",
    "adjacent_sigmas",
    "alpha_sigma",
    "check_direction",
    "check_process",
    "common_stretch",
    "double",
    "drift_diffusion",
    "expand",
    "get_sde",
    "get_time_sampler",
    "half_log_snr",
    "is_affine",
    "is_declared_affine",
    "lambda_range",
    "lookup",
    "origin",
    "register_sde",
    "register_time_sampler",
    "row",
    "sampling_process",
    "subVPSDE",
    "sum_except_batch",
    "time_of_half_log_snr",
    "unbound",
    "within",
]

# --- variance preserving and sub-VP -------------------------------------------------------


class _Table:
    """A table of N numbers that follows `N`; an attribute set on the instance replaces it."""

    def __init__(self, fn: Callable):
        self.fn = fn
        self.__doc__ = fn.__doc__

    def __get__(self, obj, owner=None) -> Any:
        return self if obj is None else self.fn(obj)


@functools.lru_cache(maxsize=32)
def _beta_tables(beta_0: float, beta_1: float, N: int) -> dict[str, torch.Tensor]:
    if beta_1 >= N:
        raise ValueError(
            f"VP with beta_max={beta_1:g} needs N ≥ {math.floor(beta_1) + 1}, got N={N}; "
            "for fewer evaluations set steps"
        )
    betas = torch.linspace(beta_0 / N, beta_1 / N, N, dtype=torch.float64)
    cumprod = torch.cumprod(1 - betas, dim=0)
    tables = {
        "discrete_betas": betas,
        "alphas": 1 - betas,
        "alphas_cumprod": cumprod,
        "sqrt_alphas_cumprod": torch.sqrt(cumprod),
        "sqrt_1m_alphas_cumprod": torch.sqrt(1 - cumprod),
    }
    return {name: table.float() for name, table in tables.items()}


def row(sde: SDE, t: torch.Tensor) -> torch.Tensor:
    """Index floor(t (N − 1)/T) into a table of N numbers, computed in t's own dtype."""
    return (t * (sde.N - 1) / sde.T).long()


def lookup(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`table[index]` on the index's device.

    Raises: ValueError for an index outside of the table, where that costs no wait for a GPU.
    """
    if index.device.type == "cpu" and ((index < 0) | (index >= len(table))).any():
        raise ValueError(
            f"expected times in [0, T], which give rows 0 ... {len(table) - 1} of a table, got "
            f"rows {index.min().item()} ... {index.max().item()}; check t"
        )
    return _on_device(table, index.device)[index]


_DEVICE_COPIES: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}


def _on_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    if table.device == device:
        return table
    key = (id(table), device)
    if key not in _DEVICE_COPIES or _DEVICE_COPIES[key][0] is not table:
        if len(_DEVICE_COPIES) > 64:
            _DEVICE_COPIES.clear()
        _DEVICE_COPIES[key] = (table, table.to(device))
    return _DEVICE_COPIES[key][1]


class _LinearBeta:
    """β(t) = β_0 + t (β_1 − β_0), its integral B, α = e^{−B/2}, and DDPM's tables of N numbers."""

    N: int
    prior_std = 1.0  # as published; σ at T is 2e-5 below it, that of sub-VP 4e-5

    def __init__(self, beta_min=0.1, beta_max=20, N=1000):
        super().__init__(N)  # type: ignore[call-arg]  # of AffineSDE, beside which it stands
        arguments.real(beta_min=beta_min, beta_max=beta_max)
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"expected 0 < beta_min <= beta_max, got {beta_min} and {beta_max}")
        self.beta_0 = beta_min
        self.beta_1 = beta_max

    @classmethod
    def from_config(cls, config):
        return cls(config.model.beta_min, config.model.beta_max, config.model.num_scales)

    def beta(self, t):
        """β(t)."""
        return self.beta_0 + t * (self.beta_1 - self.beta_0)

    def B(self, t):
        """∫_0^t β(s) ds = β_0 t + ½ (β_1 − β_0) t²."""
        return self.beta_0 * t + 0.5 * (self.beta_1 - self.beta_0) * t**2

    def _time_of_B(self, B):
        # The form of the quadratic's root that also holds for β_1 = β_0.
        root = torch.sqrt(self.beta_0**2 + 2 * (self.beta_1 - self.beta_0) * B)
        return 2 * B / (self.beta_0 + root)

    def alpha(self, t) -> torch.Tensor:
        return torch.exp(-0.5 * self.B(t))

    def f(self, t):
        return -0.5 * self.beta(t)

    def _table(self, name: str) -> torch.Tensor:
        return _beta_tables(float(self.beta_0), float(self.beta_1), self.N)[name]

    @_Table
    def discrete_betas(self):
        """β_i = linspace(β_min/N, β_max/N, N); refused where some β_i ≥ 1."""
        return self._table("discrete_betas")

    @_Table
    def alphas(self):
        """1 − β_i."""
        return self._table("alphas")


@register_sde(name="vpsde")
class VPSDE(_LinearBeta, AffineSDE):
    """The variance-preserving SDE (Song et al. 2021, eq. 11), the limit of DDPM.

        dx = −½ β(t) x dt + √β(t) dw,   α = e^{−B/2},   σ = √(1 − e^{−B})

    σ is computed by expm1: the original's 1 − exp(·) in float32 is off by up to 1.4 % below 1e-4.

    Args:
      beta_min, beta_max: β(0) and β(1).
      N: number of discretisation steps.
    """

    def sigma(self, t):
        return torch.sqrt(-torch.expm1(-self.B(t)))

    def g2(self, t):
        return self.beta(t)

    def lambda_(self, t):
        return -0.5 * torch.log(torch.expm1(self.B(t)))

    def inverse_lambda(self, lam):
        return self._time_of_B(torch.nn.functional.softplus(-2 * lam))

    @_Table
    def alphas_cumprod(self):
        """Π_{j ≤ i} (1 − β_j)."""
        return self._table("alphas_cumprod")

    @_Table
    def sqrt_alphas_cumprod(self):
        """DDPM's α."""
        return self._table("sqrt_alphas_cumprod")

    @_Table
    def sqrt_1m_alphas_cumprod(self):
        """DDPM's σ."""
        return self._table("sqrt_1m_alphas_cumprod")

    def discretize(self, x, t):
        """DDPM's discretisation: f = (√(1 − β_i) − 1) x, G = √β_i."""
        beta = lookup(self.discrete_betas, row(self, t))
        return expand(torch.sqrt(1 - beta) - 1, x) * x, torch.sqrt(beta)


@register_sde(name="subvpsde")
class subVPSDE(_LinearBeta, AffineSDE):
    """The sub-VP SDE (Song et al. 2021, eq. 12), best at likelihoods.

        dx = −½ β x dt + √(β (1 − e^{−2B})) dw,   α = e^{−B/2},   σ = 1 − e^{−B}

    Unlike the original it has `discrete_betas` and `alphas`, so that correctors work.

    Args:
      beta_min, beta_max: β(0) and β(1).
      N: number of discretisation steps.
    """

    def sigma(self, t):
        return -torch.expm1(-self.B(t))

    def g2(self, t):
        return -self.beta(t) * torch.expm1(-2 * self.B(t))

    def lambda_(self, t):
        return -torch.log(2 * torch.sinh(0.5 * self.B(t)))

    def inverse_lambda(self, lam):
        return self._time_of_B(2 * torch.asinh(0.5 * torch.exp(-lam)))


# --- variance exploding -------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def _sigma_table(sigma_min: float, sigma_max: float, N: int) -> torch.Tensor:
    log_sigmas = torch.linspace(math.log(sigma_min), math.log(sigma_max), N, dtype=torch.float64)
    return torch.exp(log_sigmas).float()


@register_sde(name="vesde")
class VESDE(AffineSDE):
    """The variance-exploding SDE (Song et al. 2021, eq. 9 and App. C), the limit of SMLD.

        dx = σ(t) √(2 ln(σ_max/σ_min)) dw,   σ(t) = σ_min (σ_max/σ_min)^t,   α = 1

    The prior N(0, σ_max²) leaves out the data's own variance, and g² integrates to
    σ(t)² − σ_min²: both as published.

    Args:
      sigma_min, sigma_max: σ(0) and σ(1).
      N: number of discretisation steps.
    """

    sampling_eps = 1e-5

    def __init__(self, sigma_min=0.01, sigma_max=50, N=1000):
        super().__init__(N)
        arguments.real(sigma_min=sigma_min, sigma_max=sigma_max)
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"expected 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    @classmethod
    def from_config(cls, config):
        """The process with `config.model`'s sigma_min, sigma_max and num_scales."""
        return cls(config.model.sigma_min, config.model.sigma_max, config.model.num_scales)

    @property
    def prior_std(self):  # type: ignore[override]
        """σ_max."""
        return self.sigma_max

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max) - math.log(self.sigma_min)

    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return self.sigma_min * torch.exp(t * self._log_ratio)

    def f(self, t):
        return torch.zeros_like(t)

    def g2(self, t):
        return 2 * self._log_ratio * self.sigma(t) ** 2

    def lambda_(self, t):
        return -math.log(self.sigma_min) - t * self._log_ratio

    def inverse_lambda(self, lam):
        return (-lam - math.log(self.sigma_min)) / self._log_ratio

    @_Table
    def discrete_sigmas(self):
        """σ_i, N numbers evenly spaced in log σ, ascending."""
        return _sigma_table(float(self.sigma_min), float(self.sigma_max), self.N)

    def discretize(self, x, t):
        """SMLD's discretisation: f = 0, G = √(σ_i² − σ_{i−1}²) with σ_{−1} = 0."""
        sigma, adjacent = adjacent_sigmas(self, t)
        return torch.zeros_like(x), torch.sqrt(sigma**2 - adjacent**2)


def adjacent_sigmas(sde, t: torch.Tensor):
    """σ_i and σ_{i−1} of a VE process at its table row i of `t`, with σ_{−1} = 0."""
    index = row(sde, t)
    sigma = lookup(sde.discrete_sigmas, index)
    previous = lookup(sde.discrete_sigmas, (index - 1).clamp(min=0))
    return sigma, torch.where(index == 0, torch.zeros_like(previous), previous)
