"""Processes that came after score_sde: cosine, EDM, linear VE, rectified flow, an OU process with
an exploding noise, and the stretch of one process that another's network knows.

All are given by α(t), σ(t) and the inverse of λ = log(α/σ). Each has its `T` and its `sampling_eps`
where everything is finite.
"""

from __future__ import annotations

import math

import torch

import arguments
from sde_lib_base import (
    SDE,
    AffineSDE,
    alpha_sigma,
    as_times,
    double,
    drift_diffusion,
    expand,
    half_log_snr,
    is_affine,
    register_sde,
    sde_named,
    time_of_half_log_snr,
    unbound,
)

#: λ at which the processes that end in pure noise (λ = −∞ at t = 1) are cut: α is 4.5e-5 there.
LAMBDA_END = -10.0


class _ExactSteps:
    """Discretisation by the exact transition over T/N, in place of Euler–Maruyama.

    It stays finite where f and g are large, and its last step goes to the data (α = 1, σ = 0), as
    VE's does.
    """

    T: float
    N: int

    def discretize(self, x, t):
        """f = (α_t/α_s − 1) x and G² = σ_t² − (α_t σ_s/α_s)², s = t − T/N."""
        u = double(t)
        s = u - self.T / self.N
        inside = s >= 0
        a_s, sigma_s = alpha_sigma(self, s.clamp(min=0), x)  # type: ignore[arg-type]
        a_t, sigma_t = alpha_sigma(self, u, x)  # type: ignore[arg-type]
        ratio = torch.where(inside, a_t / a_s, a_t)
        before = torch.where(inside, ratio * sigma_s, torch.zeros_like(sigma_s))
        G = torch.sqrt((sigma_t**2 - before**2).clamp(min=0))
        return expand(ratio - 1, x) * x, as_times(G, t)


@register_sde(name="cosine")
class CosineVP(_ExactSteps, AffineSDE):
    """The variance-preserving process of a cosine (Nichol & Dhariwal 2021, without their offset).

        α = cos(πt/2),   σ = sin(πt/2),   f = −(π/2) tan(πt/2),   g² = π tan(πt/2)

    λ = −log tan(πt/2) is −∞ at t = 1, so that T = λ⁻¹(−10), 3e-5 below it.

    Args:
      N: number of discretisation steps.
    """

    prior_std = 1.0

    def __init__(self, N=1000):
        super().__init__(N)

    @property
    def T(self) -> float:
        return 2 / math.pi * math.atan(math.exp(-LAMBDA_END))

    def alpha(self, t):
        return torch.cos(0.5 * math.pi * t)

    def sigma(self, t):
        return torch.sin(0.5 * math.pi * t)

    def f(self, t):
        return -0.5 * math.pi * torch.tan(0.5 * math.pi * t)

    def g2(self, t):
        return math.pi * torch.tan(0.5 * math.pi * t)

    def lambda_(self, t):
        return -torch.log(torch.tan(0.5 * math.pi * t))

    def inverse_lambda(self, lam):
        return 2 / math.pi * torch.atan(torch.exp(-lam))


@register_sde(name="rectified_flow")
class RectifiedFlow(_ExactSteps, AffineSDE):
    """The straight path from data at t = 0 to noise: rectified flow (Liu et al. 2023), the
    conditional optimal-transport path of flow matching (Lipman et al. 2023).

        α = 1 − t,   σ = σ_min + (1 − σ_min) t,   f = −1/(1 − t),   g² = 2σ/(1 − t)

    λ is −∞ at t = 1, so that T = λ⁻¹(−10), 5e-5 below it.

    Args:
      N: number of discretisation steps.
      sigma_min: σ(0), zero or a small number such as 1e-4.
    """

    prior_std = 1.0

    def __init__(self, N=1000, sigma_min: float = 0.0):
        super().__init__(N)
        arguments.real(sigma_min=sigma_min)
        if not 0 <= sigma_min < 1:
            raise ValueError(f"expected 0 <= sigma_min < 1, got {sigma_min}")
        self.sigma_min = sigma_min

    @property
    def T(self) -> float:
        e = math.exp(-LAMBDA_END)
        return (e - self.sigma_min) / (e + 1 - self.sigma_min)

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return self.sigma_min + (1 - self.sigma_min) * t

    def f(self, t):
        return -1 / (1 - t)

    def g2(self, t):
        return 2 * self.sigma(t) / (1 - t)

    def inverse_lambda(self, lam):
        e = torch.exp(-lam)
        return (e - self.sigma_min) / (e + 1 - self.sigma_min)


class _FromSigmas(_ExactSteps):
    """What the processes with α = 1 and σ from σ_min to σ_max have in common."""

    sigma_max: float
    sampling_eps = 0.0  # σ(0) = σ_min > 0

    def _set_sigmas(self, sigma_min: float, sigma_max: float) -> None:
        arguments.real(sigma_min=sigma_min, sigma_max=sigma_max)
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"expected 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    @property
    def prior_std(self):
        return self.sigma_max

    def alpha(self, t) -> torch.Tensor:
        return torch.ones_like(t)

    def f(self, t):
        return torch.zeros_like(t)


@register_sde(name="edm")
class EDM(_FromSigmas, AffineSDE):
    """The variance-exploding process of Karras et al. 2022, in a time that runs from 0 to 1:

        σ(t) = (a + t (b − a))^ρ,   a = σ_min^{1/ρ},   b = σ_max^{1/ρ},   α = 1

    so that uniform times are the grid of their eq. 5. It is valid at t = 0, where sampling ends.
    Their own time is σ itself; data are taken to have a standard deviation of about 0.5.

    Args:
      sigma_min, sigma_max: σ(0) and σ(1).
      rho: ρ; larger puts more of the times at small σ.
      N: number of discretisation steps.
    """

    def __init__(self, sigma_min=0.002, sigma_max=80.0, rho=7.0, N=1000):
        super().__init__(N)
        self._set_sigmas(sigma_min, sigma_max)
        arguments.real(rho=rho)
        largest = max(abs(math.log(sigma_min)), abs(math.log(sigma_max)))
        if not (rho > 0 and largest / rho < 300):  # else σ^{1/ρ} leaves float64
            raise ValueError(
                f"EDM needs rho > 0, and no smaller than {largest / 300:.2g} for these "
                f"sigma_min and sigma_max, got {rho}; use 7"
            )
        self.rho = rho

    @classmethod
    def from_config(cls, config):
        """The process with `config.model`'s sigma_min, sigma_max, rho and num_scales."""
        m = config.model
        return cls(m.sigma_min, m.sigma_max, m.rho, m.num_scales)

    @property
    def _ends(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def _root(self, t):
        a, b = self._ends
        return a + t * (b - a)

    def sigma(self, t):
        return self._root(t) ** self.rho

    def g2(self, t):
        a, b = self._ends
        return 2 * self.rho * (b - a) * self._root(t) ** (2 * self.rho - 1)

    def lambda_(self, t):
        return -self.rho * torch.log(self._root(t))

    def inverse_lambda(self, lam):
        a, b = self._ends
        return (torch.exp(-lam / self.rho) - a) / (b - a)


@register_sde(name="linear_ve")
class LinearVE(_FromSigmas, AffineSDE):
    """The variance-exploding process whose σ grows linearly, σ = σ_min + t (σ_max − σ_min).

    In the time σ it is dx = √(2σ) dw (Karras et al. 2022, whose own time that is): EDM with ρ = 1,
    for those who want times uniform in σ. It is valid at t = 0.

    Args:
      sigma_min, sigma_max: σ(0) and σ(1).
      N: number of discretisation steps.
    """

    def __init__(self, sigma_min=0.01, sigma_max=50.0, N=1000):
        super().__init__(N)
        self._set_sigmas(sigma_min, sigma_max)

    @classmethod
    def from_config(cls, config):
        """The process with `config.model`'s sigma_min, sigma_max and num_scales."""
        return cls(config.model.sigma_min, config.model.sigma_max, config.model.num_scales)

    def sigma(self, t):
        return self.sigma_min + t * (self.sigma_max - self.sigma_min)

    def g2(self, t):
        return 2 * (self.sigma_max - self.sigma_min) * self.sigma(t)

    def inverse_lambda(self, lam):
        return (torch.exp(-lam) - self.sigma_min) / (self.sigma_max - self.sigma_min)


@register_sde(name="ouve")
class OUVE(_ExactSteps, AffineSDE):
    """The Ornstein–Uhlenbeck process with exploding noise of SGMSE (Richter et al. 2023).

        dx = θ (y − x) dt + √(2L) σ_min e^{Lt} dw,   L = ln(σ_max/σ_min)
        α = e^{−θt},   σ² = c (e^{2Lt} − e^{−2θt}),   c = σ_min² L/(L + θ)

    Towards an observation: `OUVE().bind(y)`; unbound, y = 0. The prior N(y, σ_T²) leaves out what
    is left of x_0 − y at T, a factor e^{−θ}, as published. σ_max is not σ(1).

    Args:
      theta: stiffness of the pull towards y.
      sigma_min, sigma_max: of the diffusion coefficient.
      N: number of discretisation steps.
    """

    sampling_eps = 3e-2

    def __init__(self, theta=1.5, sigma_min=0.05, sigma_max=0.5, N=1000):
        super().__init__(N)
        arguments.real(theta=theta, sigma_min=sigma_min, sigma_max=sigma_max)
        if not (theta > 0 and 0 < sigma_min < sigma_max):
            raise ValueError(
                "expected theta > 0 and 0 < sigma_min < sigma_max, "
                f"got {theta}, {sigma_min} and {sigma_max}"
            )
        self.theta, self.sigma_min, self.sigma_max = theta, sigma_min, sigma_max

    @classmethod
    def from_config(cls, config):
        """The process with `config.model`'s theta, sigma_min, sigma_max and num_scales."""
        m = config.model
        return cls(m.theta, m.sigma_min, m.sigma_max, m.num_scales)

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    @property
    def _scale(self) -> float:
        return self.sigma_min**2 * self._log_ratio / (self._log_ratio + self.theta)

    @property
    def _rate(self) -> float:
        return 2 * (self._log_ratio + self.theta)  # σ²/α² = c (e^{rate t} − 1)

    def alpha(self, t):
        return torch.exp(-self.theta * t)

    def sigma(self, t):
        return self.alpha(t) * torch.sqrt(self._scale * torch.expm1(self._rate * t))

    def f(self, t):
        return torch.full_like(t, -self.theta)

    def g2(self, t):
        return 2 * self._log_ratio * self.sigma_min**2 * torch.exp(2 * self._log_ratio * t)

    def lambda_(self, t):
        return -0.5 * torch.log(self._scale * torch.expm1(self._rate * t))

    def inverse_lambda(self, lam):
        return torch.log1p(torch.exp(-2 * lam) / self._scale) / self._rate


# --- the part of a process that another's network knows ------------------------------------


class Stretch(_ExactSteps, AffineSDE):
    """The part of a process between two of its times, in a time of its own that runs from 0 to 1:

        t = start + u (stop − start),   f and g² in u are (stop − start) times those in t.

    It is valid at u = 0, and u is uniform where t is.

    Args:
      whole: the process.
      start, stop: times of it, start < stop, with σ(start) > 0.
      prior_std: standard deviation of the prior at `stop`.
    """

    sampling_eps = 0.0

    def __init__(self, whole: SDE, start: float, stop: float, prior_std: float):
        super().__init__(whole.N)
        if not 0 <= start < stop <= whole.T:
            raise ValueError(f"expected 0 <= start < stop <= {whole.T}, got {start} and {stop}")
        self.whole, self.start, self.stop, self.prior_std = whole, start, stop, prior_std

    def _time(self, u):
        return self.start + u * (self.stop - self.start)

    def alpha(self, t):
        return alpha_sigma(self.whole, self._time(t))[0]

    def sigma(self, t):
        return alpha_sigma(self.whole, self._time(t))[1]

    def f(self, t):
        return (self.stop - self.start) * drift_diffusion(self.whole, self._time(t))[0]

    def g2(self, t):
        return (self.stop - self.start) * drift_diffusion(self.whole, self._time(t))[1] ** 2

    def lambda_(self, t):
        return half_log_snr(self.whole, self._time(t))

    def inverse_lambda(self, lam):
        return (time_of_half_log_snr(self.whole, lam) - self.start) / (self.stop - self.start)


def lambda_range(sde: SDE, eps: float) -> tuple[float, float]:
    """λ(T) and λ(eps), the smallest and the largest half log-SNR of a process; refused where the
    process is not affine and has none."""
    if not is_affine(sde):
        raise ValueError(
            f"a change of process needs λ(t), and the drift or mean of {type(sde).__name__} is not "
            "affine in x; sample it on its own"
        )
    ends = torch.tensor([float(sde.T), eps], dtype=torch.float64)
    low, high = half_log_snr(sde, ends).tolist()
    return low, high


def within(inner: tuple[float, float], outer: tuple[float, float]) -> bool:
    """Whether one range of λ lies in another, to rounding."""
    return outer[0] - 1e-6 <= inner[0] and inner[1] <= outer[1] + 1e-6


def common_stretch(sde: SDE, trained: SDE, eps: float = 1e-5) -> SDE:
    """The part of `sde` whose λ a network trained on `trained` has seen: λ from λ(T) to λ(eps).

    It is `sde` itself where all of it has been seen, from its T to its `sampling_eps`, else a
    `Stretch` of it in unit time. Where it begins at the end of `trained`, its prior is that of
    `trained` carried over, std_A α_B/α_A, so that equal noise gives equal samples.

    Args:
      sde: the process to sample on.
      trained: the process of the training.
      eps: the smallest time of the training.

    Raises: ValueError where the two have no λ in common.
    """
    (low, high), (floor, ceiling) = lambda_range(sde, sde.sampling_eps), lambda_range(trained, eps)
    if within((low, high), (floor, ceiling)):
        return sde
    cut = max(low, floor), min(high, ceiling)
    if not cut[0] < cut[1]:
        raise ValueError(
            f"{type(sde).__name__} has λ in [{low:.3g}, {high:.3g}], and the network was trained "
            f"for [{floor:.3g}, {ceiling:.3g}]; nothing is in common, choose other σ or β"
        )
    free = unbound(sde)
    lam = torch.tensor(cut, dtype=torch.float64)
    stop, start = time_of_half_log_snr(free, lam).clamp(0, float(free.T)).tolist()
    std = _prior_std(free)
    if floor > low:
        a_sde = alpha_sigma(free, torch.tensor([stop], dtype=torch.float64))[0].item()
        a_end = alpha_sigma(trained, torch.tensor([float(trained.T)]))[0].item()
        std = _prior_std(trained) * a_sde / a_end
    part = Stretch(free, start, stop, std)
    return part if free is sde else part.bind(sde._origin)  # type: ignore[attr-defined]


def _prior_std(sde: SDE) -> float:
    # A user's process with five methods has no number to give: σ_T then.
    end = torch.tensor([float(sde.T)], dtype=torch.float64)
    return float(getattr(sde, "prior_std", None) or alpha_sigma(sde, end)[1].item())


def sampling_process(config, sde: SDE) -> SDE:
    """The process that `config.sampling.sde` names, as far as training on `sde` covers it; `sde`
    itself where it is '' or the process of the training.

    Give it to the samplers with `parametrization.on_process(score_fn, process)` as the model.
    """
    name = config.sampling.sde
    if name.lower() in ("", config.training.sde.lower()):
        return sde
    return common_stretch(sde_named(name, config, "sampling.sde"), sde, config.training.eps)
