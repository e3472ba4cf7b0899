"""Forward SDEs, their reverse-time family, and the quantities other rooms ask of them.

A process perturbs data x_0 to x_t = α_t x_0 + σ_t z, z ~ N(0, I), by

    dx = f(x, t) dt + g(t) dw,   t in [0, T].

`SDE` is score_sde's abstract class: five methods make a process that trains, samples and
scores everywhere. `AffineSDE` needs less: α(t) and σ(t); drift, diffusion and λ follow.
Data have any shape (B, *). Coefficients are computed in float64 and cast last.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable

import torch

_SDES: dict[str, type] = {}


# --- helpers shared by every room ---------------------------------------------------------


def expand(v, x: torch.Tensor):
    """Shape a coefficient `v`, a number or (B,), so that it multiplies `x` of shape (B, *).

    A 0-dim tensor passes unchanged: on the CPU in float64 it multiplies a float32 batch on any
    device without promotion, copy or synchronisation.
    """
    if not torch.is_tensor(v) or v.ndim == 0:
        return v
    return v.reshape(v.shape + (1,) * (x.ndim - v.ndim)).to(x.dtype)


def sum_except_batch(x: torch.Tensor) -> torch.Tensor:
    """Sum over all axes but the first: (B, *) -> (B,)."""
    return x.reshape(x.shape[0], -1).sum(dim=1)


def double(t: torch.Tensor) -> torch.Tensor:
    """`t` in float64, or in float32 on a device that has no float64."""
    return t.to(torch.float32 if t.device.type == "mps" else torch.float64)


def _derivative(fn: Callable, t: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        u = t.detach().clone().requires_grad_(True)
        y = fn(u)
        return torch.autograd.grad(y.sum(), u)[0] if y.requires_grad else torch.zeros_like(u)


# --- the abstract classes -----------------------------------------------------------------


class SDE(abc.ABC):
    """A forward SDE on mini-batches; subclasses define five methods: `T`, `sde`,
    `marginal_prob`, `prior_sampling` and `prior_logp`.

    Args:
      N: number of training discretisation steps. Assignable later: tables and the default
        number of sampling steps follow it; a network's labels never do.
    """

    #: Where sampling ends; σ(sampling_eps) > 0.
    sampling_eps: float = 1e-3

    def __init__(self, N: int):
        super().__init__()
        self.N = N

    @property
    @abc.abstractmethod
    def T(self):
        """End time of the process."""

    @abc.abstractmethod
    def sde(self, x, t):
        """Drift f(x, t), of x's shape, and diffusion g(t), (B,), at times t, (B,)."""

    @abc.abstractmethod
    def marginal_prob(self, x, t):
        """Mean, of x's shape, and standard deviation, (B,), of p_t(x_t | x_0 = x)."""

    @abc.abstractmethod
    def prior_sampling(self, shape):
        """A sample of the given shape (B, *) from the prior π ≈ p_T, on the CPU."""

    @abc.abstractmethod
    def prior_logp(self, z):
        """log π(z) in nats: (B, *) -> (B,)."""

    def discretize(self, x, t):
        """f_i(x) and G_i of x_{i+1} = x_i + f_i(x_i) + G_i z_i.

        Euler–Maruyama with Δt = T/N unless a subclass knows better.
        """
        dt = self.T / self.N
        drift, diffusion = self.sde(x, t)
        return drift * dt, diffusion * math.sqrt(dt)

    def reverse(self, score_fn, probability_flow: bool = False, *, tau: float | None = None):
        """The reverse-time process, an instance of this class with all its attributes.

            dx = [f(x, t) − ½ (1 + τ²) g² s(x, t)] dt + τ g dw̄

        Args:
          score_fn: s(x, t).
          probability_flow: τ = 0, the probability-flow ODE (Song et al. 2021, eq. 13).
          tau: any other member of the family of equal marginals (Huang et al. 2021, App. C);
            1, the default, is the reverse SDE (Song et al. 2021, eq. 6).
        """
        tau = (0.0 if probability_flow else 1.0) if tau is None else float(tau)
        if tau < 0:
            raise ValueError(f"reverse() needs tau ≥ 0, got {tau}")
        rsde = object.__new__(_reverse_class(type(self)))
        # Sharing the dictionary makes `N` and user attributes one and the same in both.
        object.__setattr__(rsde, "__dict__", self.__dict__)
        for name, value in (("forward_sde", self), ("score_fn", score_fn), ("tau", tau)):
            object.__setattr__(rsde, name, value)
        return rsde


class _Reverse:
    """The reverse-time half of a class made by `SDE.reverse`."""

    __slots__ = ("forward_sde", "score_fn", "tau")
    forward_sde: SDE
    score_fn: Callable
    tau: float

    @property
    def probability_flow(self) -> bool:
        return self.tau == 0

    def sde(self, x, t):
        """Reverse drift and diffusion; one evaluation of the score."""
        drift, diffusion = self.forward_sde.sde(x, t)
        g = expand(torch.as_tensor(diffusion), x)
        drift = drift - (0.5 * (1 + self.tau**2)) * g**2 * self.score_fn(x, t)
        return drift, diffusion * self.tau

    def discretize(self, x, t):
        """f and G of the reverse iteration x_i = x_{i+1} − f + G z (Song et al. 2021, eq. 46)."""
        f, G = self.forward_sde.discretize(x, t)
        g = expand(torch.as_tensor(G), x)
        return f - (0.5 * (1 + self.tau**2)) * g**2 * self.score_fn(x, t), G * self.tau


@functools.lru_cache(maxsize=None)
def _reverse_class(cls: type) -> type:
    return type(f"Reverse{cls.__name__}", (_Reverse, cls), {"__doc__": f"Reverse of {cls.__name__}."})


class AffineSDE(SDE):
    """A process given by α(t) and σ(t) alone, with λ = log(α/σ) falling in t:

        dx = f(t) x dt + g(t) dw,   f = d log α/dt,   g² = −2 σ² dλ/dt.

    Subclasses define `alpha` and `sigma` of a float64 tensor of times; closed forms of `f`,
    `g2`, `lambda_` and `inverse_lambda` may replace the derived ones. The prior is
    N(0, prior_std²).
    """

    prior_std: float = 1.0

    @property
    def T(self):
        return 1

    @abc.abstractmethod
    def alpha(self, t):
        """Scale of the data at time t."""

    @abc.abstractmethod
    def sigma(self, t):
        """Standard deviation of the noise at time t."""

    def lambda_(self, t):
        """Half the logarithm of the signal-to-noise ratio, λ = log(α/σ)."""
        return torch.log(self.alpha(t)) - torch.log(self.sigma(t))

    def inverse_lambda(self, lam):
        """The time at which `lambda_` equals `lam`, by bisection on [0, T]."""
        return _bisect(self.lambda_, lam, float(self.T))

    def f(self, t):
        """Drift coefficient f = d log α/dt."""
        return _derivative(lambda u: torch.log(self.alpha(u)), t)

    def g2(self, t):
        """Squared diffusion g² = −2 σ² dλ/dt."""
        return -2 * self.sigma(t) ** 2 * _derivative(self.lambda_, t)

    def sde(self, x, t):
        u = double(t)
        return expand(self.f(u), x) * x, torch.sqrt(self.g2(u)).to(t.dtype)

    def marginal_prob(self, x, t):
        u = double(t)
        return expand(self.alpha(u), x) * x, self.sigma(u).to(t.dtype)

    def prior_sampling(self, shape):
        return torch.randn(*shape) * self.prior_std

    def prior_logp(self, z):
        var, dim = self.prior_std**2, z[0].numel()
        return -0.5 * (dim * math.log(2 * math.pi * var) + sum_except_batch(z**2) / var)


# --- what any process can be asked --------------------------------------------------------


def is_declared_affine(sde: SDE) -> bool:
    """Whether `alpha` and `sigma` of `sde` are the truth: an AffineSDE whose marginals are its own.

    A subclass that replaced `marginal_prob` is read off that method instead.
    """
    return isinstance(sde, AffineSDE) and type(sde).marginal_prob is AffineSDE.marginal_prob


def alpha_sigma(sde: SDE, t: torch.Tensor, x: torch.Tensor | None = None):
    """α_t and σ_t of any process, of t's shape, in float64.

    For a process that only has `marginal_prob`, α is mean(1) − mean(0), so a conditional mean
    that shifts the origin does no harm. `x` tells such a process the data's number of axes.
    """
    u = double(t)
    if is_declared_affine(sde):
        return sde.alpha(u), sde.sigma(u)  # type: ignore[attr-defined]
    (one, zero), std = _probe(sde.marginal_prob, u, x)
    return (one - zero).reshape(t.shape), std.reshape(t.shape)


def drift_diffusion(sde: SDE, t: torch.Tensor, x: torch.Tensor | None = None):
    """f(t) and g(t) of dx = f x dt + g dw for any affine process, of t's shape, in float64."""
    u = double(t)
    if is_declared_affine(sde) and type(sde).sde is AffineSDE.sde:
        return sde.f(u), torch.sqrt(sde.g2(u))  # type: ignore[attr-defined]
    (one, zero), g = _probe(sde.sde, u, x)
    return (one - zero).reshape(t.shape), g.reshape(t.shape)


def half_log_snr(sde: SDE, t: torch.Tensor) -> torch.Tensor:
    """λ(t) = log(α_t/σ_t) of any process, in float64."""
    if is_declared_affine(sde):
        return sde.lambda_(double(t))  # type: ignore[attr-defined]
    a, s = alpha_sigma(sde, t)
    return torch.log(a) - torch.log(s)


def time_of_half_log_snr(sde: SDE, lam: torch.Tensor) -> torch.Tensor:
    """The inverse of `half_log_snr`, by the closed form where the process has one."""
    if is_declared_affine(sde):
        return sde.inverse_lambda(double(lam))  # type: ignore[attr-defined]
    return _bisect(lambda t: half_log_snr(sde, t), lam, float(sde.T))


def is_affine(sde: SDE) -> bool:
    """Whether drift and conditional mean are affine in x, so that α, σ and λ exist."""
    if is_declared_affine(sde):
        return True
    t = torch.tensor([0.3, 0.7], dtype=torch.float64) * float(sde.T)

    def slope(fn, scale):
        return _probe(lambda x, t: fn(scale * x, t), t, None)[0].diff(dim=0) / scale

    return all(torch.allclose(slope(fn, 1.0), slope(fn, 3.0)) for fn in (sde.sde, sde.marginal_prob))


def _probe(fn: Callable, t: torch.Tensor, x: torch.Tensor | None):
    """Values of `fn(x, t)` at x = 1 and x = 0, one number per time, and its second output."""
    flat = t.reshape(-1)
    n = flat.numel()
    times = torch.cat([flat, flat])  # at least two rows, so that a wrong broadcast shows
    for ndim in (4, 2, 3, 5) if x is None else (x.ndim,):
        rows = torch.ones((2 * n,) + (1,) * (ndim - 1), dtype=times.dtype, device=times.device)
        rows[n:] = 0
        try:
            first, second = fn(rows, times)
        except (IndexError, RuntimeError):
            continue
        if first.shape[0] == 2 * n and first.ndim == ndim:
            values = first.reshape(2 * n, -1)[:, 0]
            second = torch.as_tensor(second, dtype=values.dtype, device=values.device)
            second = second if second.ndim else second.expand(2 * n)
            return values.reshape(2, n), second.reshape(2 * n, -1)[:n, 0]
    raise ValueError(
        f"{fn.__qualname__} accepts no batch (B, *) of {'2 to 5' if x is None else x.ndim} axes; "
        "expected two tensors, of x's shape and of t's"
    )


def _bisect(lam_fn: Callable, lam: torch.Tensor, T: float) -> torch.Tensor:
    lam = double(lam)
    low, high = torch.zeros_like(lam), torch.full_like(lam, T)
    for _ in range(60):
        mid = 0.5 * (low + high)
        above = lam_fn(mid) > lam  # λ falls in t, so the root lies to the right
        low, high = torch.where(above, mid, low), torch.where(above, high, mid)
    return 0.5 * (low + high)


# --- registry -----------------------------------------------------------------------------


def register_sde(cls=None, *, name: str | None = None):
    """Register a process class under `name`, to be chosen by `config.training.sde`."""

    def register(cls):
        key = (name or cls.__name__).lower()
        if key in _SDES:
            raise ValueError(f"an SDE named {key!r} is already registered: {_SDES[key]!r}")
        _SDES[key] = cls
        return cls

    return register if cls is None else register(cls)


def get_sde(config) -> SDE:
    """The process that `config.training.sde` names.

    A registered class is made by its `from_config(config)` where it has one, else by
    `cls(N=config.model.num_scales)`.
    """
    key = config.training.sde.lower()
    if key not in _SDES:
        raise ValueError(f"training.sde={config.training.sde!r} is unknown; known: {sorted(_SDES)}")
    cls = _SDES[key]
    return cls.from_config(config) if hasattr(cls, "from_config") else cls(N=config.model.num_scales)


# --- variance preserving and sub-VP -------------------------------------------------------


class _Table:
    """A table of N numbers that follows `N`; an attribute set on the instance replaces it."""

    def __init__(self, fn: Callable):
        self.fn = fn
        self.__doc__ = fn.__doc__

    def __get__(self, obj, owner=None):
        return self if obj is None else self.fn(obj)


@functools.lru_cache(maxsize=32)
def _beta_tables(beta_0: float, beta_1: float, N: int) -> dict[str, torch.Tensor]:
    if N <= beta_1:
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
    """`table[index]` on the index's device."""
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

    beta_0: float
    beta_1: float
    N: int

    def beta(self, t):
        """β(t)."""
        return self.beta_0 + t * (self.beta_1 - self.beta_0)

    def B(self, t):
        """∫_0^t β(s) ds = β_0 t + ½ (β_1 − β_0) t²."""
        return self.beta_0 * t + 0.5 * (self.beta_1 - self.beta_0) * t**2

    def _time_of_B(self, B):
        # The form of the quadratic's root that also holds for β_1 = β_0.
        return 2 * B / (self.beta_0 + torch.sqrt(self.beta_0**2 + 2 * (self.beta_1 - self.beta_0) * B))

    def alpha(self, t):
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


def _check_betas(beta_min: float, beta_max: float) -> None:
    if not 0 < beta_min <= beta_max:
        raise ValueError(f"expected 0 < beta_min <= beta_max, got {beta_min} and {beta_max}")


@register_sde(name="vpsde")
class VPSDE(_LinearBeta, AffineSDE):
    """The variance-preserving SDE (Song et al. 2021, eq. 11), the limit of DDPM.

        dx = −½ β(t) x dt + √β(t) dw,   α = e^{−B/2},   σ = √(1 − e^{−B})

    σ is computed by expm1: the original's 1 − exp(·) in float32 is off by 1.4 % at t = 1e-5.

    Args:
      beta_min, beta_max: β(0) and β(1).
      N: number of discretisation steps.
    """

    def __init__(self, beta_min=0.1, beta_max=20, N=1000):
        super().__init__(N)
        _check_betas(beta_min, beta_max)
        self.beta_0 = beta_min
        self.beta_1 = beta_max

    @classmethod
    def from_config(cls, config):
        return cls(config.model.beta_min, config.model.beta_max, config.model.num_scales)

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

    def __init__(self, beta_min=0.1, beta_max=20, N=1000):
        super().__init__(N)
        _check_betas(beta_min, beta_max)
        self.beta_0 = beta_min
        self.beta_1 = beta_max

    @classmethod
    def from_config(cls, config):
        return cls(config.model.beta_min, config.model.beta_max, config.model.num_scales)

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
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"expected 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    @classmethod
    def from_config(cls, config):
        return cls(config.model.sigma_min, config.model.sigma_max, config.model.num_scales)

    @property
    def prior_std(self):  # type: ignore[override]
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
