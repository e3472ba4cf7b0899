"""The abstract SDE classes, their registry, reverse and bound processes, and what any process can
be asked."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from typing import Any

import torch

import arguments

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
    return x.reshape(len(x), x.shape[1:].numel()).sum(dim=1)


def double(t: torch.Tensor) -> torch.Tensor:
    """`t` in float64, or in float32 on a device that has no float64."""
    return t.to(torch.float32 if t.device.type == "mps" else torch.float64)


def as_times(v: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """`v` in the dtype of the times t; in torch's default one where these are whole numbers."""
    return v.to(t.dtype if t.is_floating_point() else torch.get_default_dtype())


def _derivative(fn: Callable, t: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        u = t.detach().clone().requires_grad_(True)
        y = fn(u)
        if not y.requires_grad:
            return torch.zeros_like(u)
        return torch.autograd.grad(y.sum(), u, materialize_grads=True)[0]


# --- registry -----------------------------------------------------------------------------

_SDES: dict[str, type] = {}


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
    return sde_named(config.training.sde, config, "training.sde")


def sde_named(name: str, config, key: str) -> SDE:
    """The process `name`, the value of the config's `key`, with `config.model`'s parameters."""
    if str(name).lower() not in _SDES:
        raise ValueError(f"{key}={name!r} is unknown; known: {sorted(_SDES)}")
    cls: Any = _SDES[name.lower()]
    if hasattr(cls, "from_config"):
        return cls.from_config(config)
    return cls(N=config.model.num_scales)


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
        arguments.whole(N=N)
        if N < 1:
            raise ValueError(f"a process needs N ≥ 1 discretisation steps, got {N}; use 1000")
        self.N = N

    @property
    @abc.abstractmethod
    def T(self) -> float:
        """End time of the process."""

    @abc.abstractmethod
    def sde(self, x, t) -> tuple[Any, Any]:
        """Drift f(x, t), of x's shape, and diffusion g(t), (B,), at times t, (B,)."""

    @abc.abstractmethod
    def marginal_prob(self, x, t) -> tuple[Any, Any]:
        """Mean, of x's shape, and standard deviation, (B,), of p_t(x_t | x_0 = x)."""

    @abc.abstractmethod
    def prior_sampling(self, shape) -> torch.Tensor:
        """A sample of the given shape (B, *) from the prior π ≈ p_T, on the CPU."""

    @abc.abstractmethod
    def prior_logp(self, z) -> torch.Tensor:
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
        if isinstance(self, _Reverse):
            raise TypeError(f"{type(self).__name__} is reversed already; reverse the forward one")
        check_direction(self)
        arguments.optional(arguments.real, tau=tau)
        tau = (0.0 if probability_flow else 1.0) if tau is None else float(tau)
        if tau < 0:
            raise ValueError(f"reverse() needs tau ≥ 0, got {tau}")
        rsde = object.__new__(_reverse_class(type(self)))
        # Sharing the dictionary makes `N` and user attributes one and the same in both.
        object.__setattr__(rsde, "__dict__", self.__dict__)
        for name, value in zip(_Reverse.__slots__, (self, score_fn, tau), strict=True):
            object.__setattr__(rsde, name, value)
        return rsde

    def bind(self, y: torch.Tensor) -> SDE:
        """This process towards the observation y: an instance of this class in which x − y follows
        the free process, so that x_t = y + α_t (x_0 − y) + σ_t z, with the prior centred at y.

        It trains, samples and scores as any process does. `self` is left as it is.

        Args:
          y: a tensor of one sample's shape with a batch axis, (B, *) or (1, *).

        Source: Richter et al. 2023 (SGMSE+), whose Ornstein–Uhlenbeck process is `ouve`.
        """
        if isinstance(self, _Reverse):
            raise TypeError(f"{type(self).__name__} is reversed; bind first, then reverse")
        try:
            y = torch.as_tensor(y)
        except (RuntimeError, TypeError, ValueError):
            raise arguments.WrongTypeError(
                f"bind needs an observation y as a tensor (B, *) or (1, *), got {type(y).__name__}"
            ) from None
        free = unbound(self)
        bound = object.__new__(_bound_class(type(free)))
        bound.__dict__.update(free.__dict__, _origin=y)
        return bound


class _Reverse:
    """The reverse-time half of a class made by `SDE.reverse`."""

    # Named so that they hide no attribute of a user's process, whose dictionary is shared.
    __slots__ = ("_forward_sde", "_reverse_score_fn", "_reverse_tau")
    _forward_sde: SDE
    _reverse_score_fn: Callable
    _reverse_tau: float

    @property
    def probability_flow(self) -> bool:
        return self._reverse_tau == 0

    def sde(self, x, t):
        """Reverse drift and diffusion; one evaluation of the score."""
        drift, diffusion = self._forward_sde.sde(x, t)
        score, tau = self._reverse_score_fn(x, t), self._reverse_tau
        g = expand(torch.as_tensor(diffusion), x)
        return drift - (0.5 * (1 + tau**2)) * g**2 * score, diffusion * tau

    def discretize(self, x, t):
        """f and G of the reverse iteration x_i = x_{i+1} − f + G z (Song et al. 2021, eq. 46)."""
        f, G = self._forward_sde.discretize(x, t)
        score, tau = self._reverse_score_fn(x, t), self._reverse_tau
        g = expand(torch.as_tensor(G), x)
        return f - (0.5 * (1 + tau**2)) * g**2 * score, G * tau


@functools.cache
def _reverse_class(cls: type) -> type:
    doc = f"Reverse of {cls.__name__}."
    return type(f"Reverse{cls.__name__}", (_Reverse, cls), {"__doc__": doc})


class _Bound:
    """The half of a class made by `SDE.bind`: the free process of x − y, asked as a whole."""

    _free_class: type
    _origin: torch.Tensor

    def _y(self, x):
        y = self._origin
        if y.ndim != x.ndim or y.shape[1:] != x.shape[1:] or len(y) not in (1, len(x)):
            raise ValueError(
                f"the process is bound to y of shape {tuple(y.shape)}, which does not fit data of "
                f"shape {tuple(x.shape)}; bind it to the y of these samples, (B, *) or (1, *)"
            )
        if y.device != x.device:  # moved once, so that a loop sends nothing to its device
            self._origin = y = y.to(x.device)
        return y.to(x.dtype)

    @property
    def _free(self) -> SDE:
        free = object.__new__(self._free_class)
        free.__dict__ = self.__dict__  # shared, so that `N` assigned later is the same in both
        return free

    def sde(self, x, t):
        return self._free.sde(x - self._y(x), t)

    def discretize(self, x, t):
        return self._free.discretize(x - self._y(x), t)

    def marginal_prob(self, x, t):
        mean, std = self._free.marginal_prob(x - self._y(x), t)
        return mean + self._y(x), std

    def prior_sampling(self, shape):
        z = self._free.prior_sampling(shape)
        return z + self._y(z)

    def prior_logp(self, z):
        return self._free.prior_logp(z - self._y(z))


@functools.cache
def _bound_class(cls: type) -> type:
    doc = f"{cls.__name__} towards an observation."
    return type(f"Bound{cls.__name__}", (_Bound, cls), {"__doc__": doc, "_free_class": cls})


def origin(sde: SDE, x: torch.Tensor) -> torch.Tensor | None:
    """The y that `sde` is bound to, on x's device and of its dtype; None for a free process."""
    return sde._y(x) if isinstance(sde, _Bound) else None


def unbound(sde: SDE) -> SDE:
    """The free process that x − y follows where `sde` is bound to y; else `sde` itself."""
    return sde._free if isinstance(sde, _Bound) else sde


class _SigmaAtEnd:
    """σ at T; an attribute of this name on a subclass or on the instance replaces it."""

    def __get__(self, obj, owner=None) -> Any:
        if obj is None:
            return self
        return obj.sigma(torch.tensor(float(obj.T), dtype=torch.float64)).item()


class AffineSDE(SDE):
    """A process given by α(t) and σ(t) alone, with λ = log(α/σ) falling in t:

        dx = f(t) x dt + g(t) dw,   f = d log α/dt,   g² = −2 σ² dλ/dt.

    Subclasses define `alpha` and `sigma` of a float64 tensor of times; closed forms of `f`,
    `g2`, `lambda_` and `inverse_lambda` may replace the derived ones. The prior is
    N(0, prior_std²), by default with σ at T.
    """

    prior_std: Any = _SigmaAtEnd()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # A process that replaces α or σ of another must not keep closed forms of the old ones.
        given = {"alpha", "sigma"} & vars(cls).keys()
        bases = [base for base in cls.__bases__ if issubclass(base, AffineSDE)]
        if any(getattr(b, name) is not vars(AffineSDE)[name] for b in bases for name in given):
            for name in ("f", "g2", "lambda_", "inverse_lambda"):
                if name not in vars(cls):
                    setattr(cls, name, vars(AffineSDE)[name])

    @property
    def T(self) -> float:
        return 1

    @abc.abstractmethod
    def alpha(self, t) -> torch.Tensor:
        """Scale of the data at time t."""

    @abc.abstractmethod
    def sigma(self, t) -> torch.Tensor:
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
        return expand(self.f(u), x) * x, as_times(torch.sqrt(self.g2(u)), t)

    def marginal_prob(self, x, t):
        u = double(t)
        return expand(self.alpha(u), x) * x, as_times(self.sigma(u), t)

    def prior_sampling(self, shape):
        return torch.randn(*shape) * self.prior_std

    def prior_logp(self, z):
        z = z.to(torch.promote_types(z.dtype, torch.float32))  # squares overflow 16 bits
        var, dim = self.prior_std**2, z.shape[1:].numel()
        return -0.5 * (dim * math.log(2 * math.pi * var) + sum_except_batch(z**2) / var)


# --- what any process can be asked --------------------------------------------------------


def check_process(sde) -> None:
    """Refuse what is no process: TypeError."""
    if isinstance(sde, type) or not hasattr(sde, "marginal_prob"):
        raise arguments.WrongTypeError(
            f"sde: expected a process such as sde_lib.VPSDE(), got {sde!r} of type "
            f"{type(sde).__name__}; sde_lib.get_sde(config) makes one by its name"
        )


def is_declared_affine(sde: SDE) -> bool:
    """Whether `alpha` and `sigma` of `sde` are the truth: an AffineSDE whose marginals are its own.

    A subclass that replaced `marginal_prob` is read off that method instead.
    """
    sde = unbound(sde)
    return isinstance(sde, AffineSDE) and type(sde).marginal_prob is AffineSDE.marginal_prob


def alpha_sigma(sde: SDE, t: torch.Tensor, x: torch.Tensor | None = None):
    """α_t and σ_t of any process, of t's shape, in float64.

    For a process that only has `marginal_prob`, α is mean(1) − mean(0), so a conditional mean
    that shifts the origin does no harm. `x` tells such a process the data's number of axes.
    """
    sde, u = unbound(sde), double(t)
    if is_declared_affine(sde):
        return sde.alpha(u), sde.sigma(u)  # type: ignore[attr-defined]
    (one, zero), std = _probe(sde.marginal_prob, u, x)
    return (one - zero).reshape(t.shape), std.reshape(t.shape)


def drift_diffusion(sde: SDE, t: torch.Tensor, x: torch.Tensor | None = None):
    """f(t) and g(t) of dx = f x dt + g dw for any affine process, of t's shape, in float64."""
    sde, u = unbound(sde), double(t)
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


def check_direction(sde: SDE) -> None:
    """Refuse a process given by α and σ whose λ rises in t.

    Raises: ValueError where time runs from noise to data, as in some works on flow matching;
      TypeError where α or σ are no tensors.
    """
    if not is_declared_affine(sde):
        return
    T = float(sde.T)
    for name, value in zip(("alpha", "sigma"), alpha_sigma(sde, torch.tensor(T)), strict=True):
        if not torch.is_tensor(value):
            raise arguments.WrongTypeError(
                f"{type(sde).__name__}.{name}(t) returned {value!r} of type "
                f"{type(value).__name__}; expected a tensor of t's shape, such as "
                f"{value!r} * torch.ones_like(t)"
            )
    early, late = (
        half_log_snr(sde, torch.tensor(share * T, dtype=torch.float64)).item()
        for share in (0.25, 0.75)
    )
    if late > early:
        raise ValueError(
            f"{type(sde).__name__} has λ = log(α/σ) = {early:.3g} at t = {0.25 * T:g} and "
            f"{late:.3g} at {0.75 * T:g}, so its noise falls in t; here data are at t = 0, noise "
            "at t = T: write T − t for t in alpha and sigma"
        )


def is_affine(sde: SDE) -> bool:
    """Whether drift and conditional mean are affine in x, so that α, σ and λ exist."""
    sde = unbound(sde)
    if is_declared_affine(sde):
        return True
    t = torch.tensor([0.3, 0.7], dtype=torch.float64) * float(sde.T)

    def slope(fn, scale):
        return _probe(lambda x, t: fn(scale * x, t), t, None)[0].diff(dim=0) / scale

    return all(
        torch.allclose(slope(fn, 1.0), slope(fn, 3.0)) for fn in (sde.sde, sde.marginal_prob)
    )


def _probe(fn: Callable, t: torch.Tensor, x: torch.Tensor | None):
    """Values of `fn(x, t)` at x = 1 and x = 0, one number per time, and its second output."""
    flat = t.reshape(-1)
    n = flat.numel()
    times = torch.cat([flat, flat])  # at least two rows, so that a wrong broadcast shows
    cause = None
    for ndim in (4, 2, 3, 5) if x is None else (x.ndim,):
        rows = torch.ones((2 * n,) + (1,) * (ndim - 1), dtype=times.dtype, device=times.device)
        rows[n:] = 0
        try:
            first, second = fn(rows, times)
        except (IndexError, RuntimeError) as error:
            cause = error
            continue
        if first.shape[0] == 2 * n and first.ndim == ndim:
            values = first.flatten(1)[:, 0]
            second = torch.as_tensor(second, dtype=values.dtype, device=values.device)
            second = second if second.ndim else second.expand(2 * n)
            return values.reshape(2, n), second.unsqueeze(-1).flatten(1)[:n, 0]
    raise ValueError(
        f"{fn.__qualname__} accepts no batch of {'2 to 5' if x is None else x.ndim} axes; "
        "expected two tensors, of x's shape and of t's"
    ) from cause


def _bisect(lam_fn: Callable, lam: torch.Tensor, T: float) -> torch.Tensor:
    lam = double(lam)
    low, high = torch.zeros_like(lam), torch.full_like(lam, T)
    for _ in range(60):
        mid = 0.5 * (low + high)
        above = lam_fn(mid) > lam  # λ falls in t, so the root lies to the right
        low, high = torch.where(above, mid, low), torch.where(above, high, mid)
    return 0.5 * (low + high)
