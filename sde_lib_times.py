"""Distributions of the times that training draws.

Each maps one uniform number per image to a time by its quantile function, so that any of them can
be stratified, and so that a time belongs to its image's number alone. λ = log(α/σ) is that of the
process; with it every sampler here serves every process.
"""

from __future__ import annotations

import math

import torch

import arguments
from sde_lib_base import (
    SDE,
    alpha_sigma,
    check_direction,
    check_process,
    double,
    drift_diffusion,
    half_log_snr,
    is_affine,
    time_of_half_log_snr,
)

_TIME_SAMPLERS: dict[str, type] = {}


def register_time_sampler(cls=None, *, name: str | None = None):
    """Register a TimeSampler class, to be chosen by `config.training.time_sampler`."""

    def register(cls):
        key = (name or cls.__name__).lower()
        if key in _TIME_SAMPLERS:
            raise ValueError(f"a time sampler named {key!r} is already registered")
        _TIME_SAMPLERS[key] = cls
        return cls

    return register if cls is None else register(cls)


def get_time_sampler(config, sde: SDE) -> TimeSampler:
    """The distribution of training times that `config.training` describes, on (eps, T)."""
    name = config.training.time_sampler
    if name.lower() not in _TIME_SAMPLERS:
        raise ValueError(
            f"training.time_sampler={name!r} is unknown; known: {sorted(_TIME_SAMPLERS)}"
        )
    return _TIME_SAMPLERS[name.lower()].from_config(config, sde)  # type: ignore[attr-defined]


def _refuse_unread(config, *keys: str) -> None:
    """Refuse settings, 0 by default, that the chosen sampler does not have."""
    t = config.training
    for key in keys:
        if value := getattr(t, key, 0):
            raise ValueError(
                f"training.{key}={value} says nothing to training.time_sampler={t.time_sampler!r}; "
                "leave it 0.0 or choose another sampler"
            )


@register_time_sampler(name="uniform")
class TimeSampler:
    """t ~ U(eps, T), and what all time samplers share. A subclass defines `quantile` and `density`.

    `sampler(n, device)` gives times (n,) in float32.

    Args:
      sde: the process.
      eps: the smallest time.
      stratified: cut (0, 1) into as many equal parts as the global batch has images and draw one
        number in each, all moved by one shared number modulo 1: each time alone has the same
        distribution as before, and a batch covers it evenly.
    """

    #: Whether the loss divides by density(t) (T − eps), so that its mean is the uniform one's.
    importance = False

    def __init__(self, sde: SDE, eps: float = 1e-5, *, stratified: bool = False):
        check_process(sde)
        arguments.real(eps=eps)
        if not 0 <= eps < sde.T:
            raise ValueError(f"a time sampler needs 0 ≤ eps < {sde.T}, got {eps}; use 1e-5")
        check_direction(sde)
        self.sde, self.eps, self.T, self.stratified = sde, float(eps), float(sde.T), stratified

    @classmethod
    def from_config(cls, config, sde: SDE) -> TimeSampler:
        """The sampler with the settings of `config.training`."""
        _refuse_unread(config, "time_mean", "time_std", "truncate")
        return cls(sde, config.training.eps, stratified=config.training.stratified)

    def __call__(self, n: int, device, draws=None) -> torch.Tensor:
        """Times (n,), float32 on `device`; `draws`, a randomness.Draws of n images, or else torch's
        global state, is asked for one uniform number per image."""
        if draws is None:
            u, index, total = torch.rand(n, device=device), torch.arange(n, device=device), n
        else:
            u, index, total = draws.rand("time").to(device), draws.indices(), draws.total
            if len(u) != n:
                raise ValueError(f"expected draws for {n} images, got {len(u)}; use draws.rows")
        if self.stratified:
            shift = draws.shared("time shift") if draws else torch.rand((), device=device)
            u = ((index.to(device) + double(u)) / total + shift) % 1
        return self.quantile(u).float()

    def quantile(self, u: torch.Tensor) -> torch.Tensor:
        """The time t below which a share u of the times lies; rises in u."""
        return u * (self.sde.T - self.eps) + self.eps

    def density(self, t: torch.Tensor) -> torch.Tensor:
        """The density of t on (eps, T), normalised, in float64."""
        return torch.full_like(double(t), 1 / (self.T - self.eps))

    def _inside(self, t: torch.Tensor) -> torch.Tensor:
        return t.clamp(self.eps, self.T)  # the ends are not passed by rounding


class _LambdaSampler(TimeSampler):
    """A sampler that is a distribution of λ."""

    def __init__(self, sde: SDE, eps: float = 1e-5, *, stratified: bool = False):
        super().__init__(sde, eps, stratified=stratified)
        if not is_affine(sde):
            raise ValueError(
                f"training.time_sampler needs λ(t), and the drift or mean of {type(sde).__name__} "
                "is not affine in x; use 'uniform' or 'logitnormal'"
            )
        ends = half_log_snr(sde, torch.tensor([self.eps, self.T], dtype=torch.float64)).tolist()
        self.lam_eps, self.lam_T = ends
        if not math.isfinite(self.lam_eps):
            raise ValueError(
                f"{type(sde).__name__} has no noise at training.eps = {eps}: λ is infinite there; "
                "use 1e-5"
            )

    def _speed(self, t: torch.Tensor) -> torch.Tensor:
        """−dλ/dt = g²/(2σ²)."""
        t = double(t)
        return drift_diffusion(self.sde, t)[1] ** 2 / (2 * alpha_sigma(self.sde, t)[1] ** 2)

    def _time(self, lam: torch.Tensor) -> torch.Tensor:
        return self._inside(time_of_half_log_snr(self.sde, lam.clamp(min=self.lam_T)))


@register_time_sampler(name="likelihood")
class LikelihoodTimes(_LambdaSampler):
    """Importance-sampled times for the likelihood weighting: λ uniform, t = λ⁻¹(λ),

        p(t) = g²/(2σ²)/(λ_eps − λ_T)   (Song, Durkan, Murray & Ermon 2021)

    Divided by p, the loss keeps its mean and loses the variance that g²/σ² brings.

    Args:
      sde, eps, stratified: as `TimeSampler`.
      truncate: a time below which p is constant (Huang et al. 2021); p grows like 1/t else, so
        that most draws fall at tiny noise. 0 leaves p as it is.
    """

    importance = True

    def __init__(self, sde, eps=1e-5, *, stratified=False, truncate: float = 0.0):
        super().__init__(sde, eps, stratified=stratified)
        arguments.real(truncate=truncate)
        if not 0 <= truncate < self.T:
            raise ValueError(f"training.truncate: expected 0 to {self.T}, got {truncate}")
        self.cut = max(float(truncate), self.eps)
        at = torch.tensor([self.cut], dtype=torch.float64)
        self.lam_cut, self.top = half_log_snr(sde, at).item(), self._speed(at).item()
        self.below = self.top * (self.cut - self.eps)
        self.mass = self.below + self.lam_cut - self.lam_T

    @classmethod
    def from_config(cls, config, sde):
        t = config.training
        _refuse_unread(config, "time_mean", "time_std")
        return cls(sde, t.eps, stratified=t.stratified, truncate=t.truncate)

    def quantile(self, u):
        mass = double(u) * self.mass
        above = self._time(self.lam_cut - (mass - self.below).clamp(min=0))
        return torch.where(mass < self.below, self.eps + mass / self.top, above)

    def density(self, t):
        return self._speed(double(t).clamp(min=self.cut)) / self.mass


class _NormalTimes:
    """Quantiles and density of a normal distribution cut to [low, high]."""

    def __init__(self, mean: float, std: float, low: float, high: float):
        arguments.real(mean=mean, std=std)
        if not std > 0:
            raise ValueError(f"training.time_std: expected a number > 0, got {std}")
        self.mean, self.std = mean, std
        ends = torch.tensor([low, high], dtype=torch.float64)
        self.low, self.high = torch.special.ndtr((ends - mean) / std).tolist()
        if not self.low < self.high:
            raise ValueError(
                f"training.time_mean={mean} and time_std={std} put all times outside of (eps, T); "
                "they are of ln(σ/α) for 'lognormal' and of logit(t/T) for 'logitnormal'"
            )

    def quantile(self, u):
        share = self.low + u * (self.high - self.low)
        return self.mean + self.std * torch.special.ndtri(share)

    def density(self, y):
        z = (y - self.mean) / self.std
        norm = math.sqrt(2 * math.pi) * self.std * (self.high - self.low)
        return torch.exp(-0.5 * z**2) / norm


def _normal_options(config, mean: float, std: float) -> dict:
    t = config.training
    _refuse_unread(config, "truncate")
    if t.time_std > 0:
        return {"mean": t.time_mean, "std": t.time_std}
    if t.time_mean != 0:
        raise ValueError(f"training.time_mean={t.time_mean} needs training.time_std; set both")
    return {"mean": mean, "std": std}


@register_time_sampler(name="lognormal")
class LogNormalTimes(_LambdaSampler):
    """ln(σ/α) ~ N(P_mean, P_std²), cut to (eps, T) (Karras et al. 2022, Table 1, for EDM).

    Args:
      sde, eps, stratified: as `TimeSampler`.
      mean, std: P_mean and P_std; Karras et al. 2024 take −0.4 and 1.
    """

    def __init__(self, sde, eps=1e-5, *, stratified=False, mean=-1.2, std=1.2):
        super().__init__(sde, eps, stratified=stratified)
        self.normal = _NormalTimes(mean, std, -self.lam_eps, -self.lam_T)

    @classmethod
    def from_config(cls, config, sde):
        t = config.training
        return cls(sde, t.eps, stratified=t.stratified, **_normal_options(config, -1.2, 1.2))

    def quantile(self, u):
        return self._time(-self.normal.quantile(double(u)))

    def density(self, t):
        return self.normal.density(-half_log_snr(self.sde, t)) * self._speed(t)


@register_time_sampler(name="logitnormal")
class LogitNormalTimes(TimeSampler):
    """t/T ~ sigmoid(N(mean, std²)), cut to (eps, T) (Esser et al. 2024).

    Args:
      sde, eps, stratified: as `TimeSampler`.
      mean, std: of the logit.
    """

    def __init__(self, sde, eps=1e-5, *, stratified=False, mean=0.0, std=1.0):
        super().__init__(sde, eps, stratified=stratified)
        share = self.eps / self.T
        low = math.log(share) - math.log1p(-share) if share else -math.inf
        self.normal = _NormalTimes(mean, std, low, math.inf)

    @classmethod
    def from_config(cls, config, sde):
        t = config.training
        return cls(sde, t.eps, stratified=t.stratified, **_normal_options(config, 0.0, 1.0))

    def quantile(self, u):
        return self._inside(self.T * torch.sigmoid(self.normal.quantile(double(u))))

    def density(self, t):
        share = double(t) / self.T
        return self.normal.density(torch.logit(share)) / (self.T * share * (1 - share))
