"""Predictors and correctors: the abstract classes, their registries, and score_sde's own.

Few-step and higher-order predictors live in `solvers.py`, loaded when a name is not found here.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence

import torch

import arguments
import sde_lib
from parametrization import as_score_function
from sampling_noise import Stepper
from sde_lib import alpha_sigma, expand

_PREDICTORS: dict[str, type] = {}
_CORRECTORS: dict[str, type] = {}
_SAMPLERS: dict[str, Callable] = {}


# --- registries ---------------------------------------------------------------------------


def add_to(registry: dict, kind: str, obj, name: str | None):
    """Register `obj`, or what a decorator is given, by `name` or its own; no name twice."""

    def register(obj):
        key = name or obj.__name__
        if key in registry:
            raise ValueError(f"a {kind} named {key!r} is already registered: {registry[key]!r}")
        registry[key] = obj
        return obj

    return register if obj is None else register(obj)


def register_predictor(cls=None, *, name: str | None = None):
    """Register a Predictor class, to be chosen by `config.sampling.predictor`."""
    return add_to(_PREDICTORS, "predictor", cls, name)


def register_corrector(cls=None, *, name: str | None = None):
    """Register a Corrector class, to be chosen by `config.sampling.corrector`."""
    return add_to(_CORRECTORS, "corrector", cls, name)


def register_sampler(fn=None, *, name: str | None = None):
    """Register a whole sampling method, chosen by `config.sampling.method`: a function of
    (config, sde, shape, inverse_scaler, eps, **options) that returns sampler(model)."""
    return add_to(_SAMPLERS, "sampler", fn, name)


def look_up(registry: dict, kind: str, name: str, modules: Sequence[str] = ("solvers",)):
    """What is registered under `name`, or under it in another case.

    Args:
      kind: of the thing, for the error.
      modules: that register more, loaded when a name is not found.
    """
    if not isinstance(name, str) or name not in registry:
        load(modules)
    known = [key for key in registry if isinstance(name, str) and key.lower() == name.lower()]
    if not known:
        raise ValueError(f"{kind} {name!r} is unknown; registered: {sorted(registry)}")
    return registry[name if name in known else known[0]]


def load(modules: Sequence[str]) -> None:
    """Import those of these modules that are installed."""
    for module in modules:
        if importlib.util.find_spec(module):
            importlib.import_module(module)


def get_predictor(name: str) -> type:
    """The Predictor class registered under `name`."""
    return look_up(_PREDICTORS, "predictor", name)


def get_corrector(name: str) -> type:
    """The Corrector class registered under `name`."""
    return look_up(_CORRECTORS, "corrector", name)


def get_sampler(name: str) -> Callable:
    """The sampling method registered under `name`."""
    return look_up(_SAMPLERS, "sampling.method", name)


# --- predictors ---------------------------------------------------------------------------


class Predictor(Stepper):
    """One reverse-time update of the state. A subclass defines `update_fn`, `step` or both.

    `update_fn(x, t)` is score_sde's and belongs to the grid of `sde.N` times; `step(x, t, s)`
    goes from any t to any s < t. The loop calls the first on that grid, the second elsewhere.

    Args:
      sde: the forward process.
      score_fn: s(x, t).
      probability_flow: use the probability-flow ODE in place of the reverse SDE.
    """

    order = 1
    nfe_per_step = 1
    stochastic = True
    #: Whether a step reads the states of earlier ones, which a corrector would move.
    multistep = False

    def __init__(self, sde, score_fn, probability_flow: bool = False):
        super().__init__()
        self.sde = sde
        self.rsde = sde.reverse(score_fn, probability_flow)
        self.score_fn = score_fn
        self.probability_flow = probability_flow

    def update_fn(self, x, t):
        """One update at times t (B,), of step T/N: (x, x_mean), x_mean being x without noise."""
        raise NotImplementedError(
            f"{type(self).__name__} defines no update_fn(x, t); call step(x, t, s)"
        )

    def step(self, x, t, s):
        """From time t to s < t, 0-dim float64 tensors on the CPU: (x, x_mean)."""
        raise NotImplementedError(
            f"{type(self).__name__} defines no step(x, t, s), so it runs only on the grid of sde.N "
            "uniform times: leave out steps= and schedule=, or define step"
        )

    def start(self, times: torch.Tensor) -> None:
        """Called before sampling with the whole grid; solvers with history drop it here."""

    def forget(self) -> None:
        """Called when something else moves the state: solvers with history drop it here."""

    def finish(self, x, t):
        """The last call, at t = eps: (x, x_mean)."""
        vec_t = batch_time(x, t)
        if own_update(type(self)):
            return self.update_fn(x, vec_t)
        return x, as_score_function(self.score_fn, self.sde).denoise(x, vec_t)


def _depth(cls: type, method: str) -> float:
    """How far up `cls`'s ancestors `method` is defined; infinity where only Predictor has it."""
    owners = (i for i, c in enumerate(cls.__mro__) if method in vars(c) and c is not Predictor)
    return next(owners, math.inf)


def own_update(cls: type) -> bool:
    """Whether `cls` goes by `update_fn` on the grid of sde.N times: not if its `step` is newer."""
    return math.inf > _depth(cls, "update_fn") <= _depth(cls, "step")


def own_step(cls: type) -> bool:
    """Whether `cls` goes by `step` on any grid: not if it is inherited and `update_fn` newer."""
    return math.inf > _depth(cls, "step") <= _depth(cls, "update_fn")


def batch_time(x: torch.Tensor, t) -> torch.Tensor:
    """The time t, a number or a 0-dim tensor, as a vector (B,) on x's device, in x's dtype."""
    # A product, not torch.full, which would ask a tensor for its value and break the graph.
    return torch.ones(x.shape[0], dtype=x.dtype, device=x.device) * t


@register_predictor(name="euler_maruyama")
class EulerMaruyamaPredictor(Predictor):
    """Euler–Maruyama on the reverse SDE: x ← x − [f x − g² s] Δt + g √Δt z. Weak order 1."""

    def update_fn(self, x, t):
        return self._update(x, t, self.sde.T / self.sde.N)

    def step(self, x, t, s):
        return self._update(x, batch_time(x, t), t - s)

    def _update(self, x, t, dt):
        z = self.randn_like(x)
        drift, diffusion = self.rsde.sde(x, t)
        x_mean = x - drift * dt
        return x_mean + expand(diffusion, x) * dt**0.5 * z, x_mean


@register_predictor(name="reverse_diffusion")
class ReverseDiffusionPredictor(Predictor):
    """Discretise the reverse SDE as the forward one is: x ← x − f + G² s + G z
    (Song et al. 2021, eq. 46). Weak order 1.

    Off the training grid f and G are those of the exact transition from s to t:
    f = (α_t/α_s − 1) x, G² = σ_t² − (α_t σ_s/α_s)²; Euler's for a process without α and σ.
    """

    def __init__(self, sde, score_fn, probability_flow=False):
        super().__init__(sde, score_fn, probability_flow)
        refuse_bad_tables(sde, sde_lib.VPSDE)
        self.affine = sde_lib.is_affine(sde)

    def update_fn(self, x, t):
        f, G = self.rsde.discretize(x, t)
        z = self.randn_like(x)
        x_mean = x - f
        return x_mean + expand(G, x) * z, x_mean

    def step(self, x, t, s):
        vec_t, z = batch_time(x, t), self.randn_like(x)
        f, G2 = self._transition(x, vec_t, t, s)
        x_mean = x - f + (0.5 if self.probability_flow else 1.0) * G2 * self.score_fn(x, vec_t)
        return x_mean + (0.0 if self.probability_flow else 1.0) * G2**0.5 * z, x_mean

    def _transition(self, x, vec_t, t, s):
        if not self.affine:
            drift, diffusion = self.sde.sde(x, vec_t)
            return drift * (t - s), expand(diffusion, x) ** 2 * (t - s)
        (a_t, sigma_t), (a_s, sigma_s) = alpha_sigma(self.sde, t, x), alpha_sigma(self.sde, s, x)
        ratio = a_t / a_s
        y = sde_lib.origin(self.sde, x)
        return (ratio - 1) * (x if y is None else x - y), sigma_t**2 - (ratio * sigma_s) ** 2


@register_predictor(name="ancestral_sampling")
class AncestralSamplingPredictor(Predictor):
    """Sample p(x_s | x_t, x_0 = D(x_t)): DDPM's ancestral sampling and, for VE, eq. 47 of
    Song et al. 2021; for any other affine process

        x_s = (σ_s/σ_t) e^{−h} x + α_s (1 − e^{−2h}) D + σ_s √(1 − e^{−2h}) z,   h = λ_s − λ_t.

    Weak order 1; the variance is exact for a point mass.
    """

    def __init__(self, sde, score_fn, probability_flow=False):
        super().__init__(sde, score_fn, probability_flow)
        if probability_flow:
            raise ValueError(
                "ancestral sampling is stochastic and has no probability flow; "
                "use reverse_diffusion or euler_maruyama with it"
            )
        if not sde_lib.is_affine(sde):
            raise ValueError(
                f"ancestral sampling needs α(t) and σ(t), and the drift or mean of "
                f"{type(sde).__name__} is not affine in x; use euler_maruyama or reverse_diffusion"
            )
        refuse_bad_tables(sde, sde_lib.VPSDE)

    def update_fn(self, x, t):
        if isinstance(self.sde, sde_lib.VESDE):
            return self._ve_update(x, t)
        if isinstance(self.sde, sde_lib.VPSDE):
            return self._vp_update(x, t)
        return self._posterior(x, t, t, (t - self.sde.T / self.sde.N).clamp(min=0))

    def step(self, x, t, s):
        return self._posterior(x, batch_time(x, t), t, s)

    def _posterior(self, x, vec_t, t, s):
        D = as_score_function(self.score_fn, self.sde).denoise(x, vec_t)
        (a_t, sigma_t), (a_s, sigma_s) = alpha_sigma(self.sde, t, x), alpha_sigma(self.sde, s, x)
        e_h = a_t * sigma_s / (a_s * sigma_t)
        y = sde_lib.origin(self.sde, x)  # x − y follows the free process
        x, D = (x, D) if y is None else (x - y, D - y)
        x_mean = expand(sigma_s / sigma_t * e_h, x) * x + expand(a_s * (1 - e_h**2), x) * D
        x_mean = x_mean if y is None else x_mean + y
        return x_mean + expand(sigma_s * torch.sqrt(1 - e_h**2), x) * self.randn_like(x), x_mean

    def _ve_update(self, x, t):
        sigma, adjacent = sde_lib.adjacent_sigmas(self.sde, t)
        variance = sigma**2 - adjacent**2
        x_mean = x + expand(variance, x) * self.score_fn(x, t)
        std = adjacent * torch.sqrt(variance) / sigma
        return x_mean + expand(std, x) * self.randn_like(x), x_mean

    def _vp_update(self, x, t):
        beta = sde_lib.lookup(self.sde.discrete_betas, sde_lib.row(self.sde, t))
        score, y = self.score_fn(x, t), sde_lib.origin(self.sde, x)
        x_mean = (x if y is None else x - y) + expand(beta, x) * score
        x_mean = x_mean / expand(torch.sqrt(1 - beta), x)
        x_mean = x_mean if y is None else x_mean + y
        return x_mean + expand(torch.sqrt(beta), x) * self.randn_like(x), x_mean


@register_predictor(name="none")
class NonePredictor(Predictor):
    """No predictor: corrector-only sampling. The loop takes x_mean from the corrector."""

    nfe_per_step = 0

    def __init__(self, sde, score_fn, probability_flow=False):
        self.sde, self.score_fn, self.probability_flow = sde, score_fn, probability_flow

    def update_fn(self, x, t):
        return x, x

    def step(self, x, t, s):
        return x, x


def refuse_bad_tables(sde, kinds) -> None:
    """Raise where the process is of these kinds and N is too small for its table of β."""
    if isinstance(sde, kinds):
        sde.discrete_betas  # noqa: B018  raises here, not at the first step, where N ≤ beta_max


# --- correctors ---------------------------------------------------------------------------


class Corrector(Stepper):
    """Steps of a Markov chain that leaves p_t invariant. A subclass defines `update_fn`.

    Args:
      sde: the forward process.
      score_fn: s(x, t).
      snr: the signal-to-noise ratio r that sets the step size.
      n_steps: steps per predictor update.
    """

    def __init__(self, sde, score_fn, snr: float, n_steps: int):
        super().__init__()
        self.sde = sde
        self.score_fn = score_fn
        self.snr = snr
        self.n_steps = n_steps

    def update_fn(self, x, t):
        """n_steps steps at times t (B,): (x, x_mean), x_mean being x without the last noise."""
        raise NotImplementedError(f"{type(self).__name__} defines no update_fn(x, t)")


class _Langevin(Corrector):
    """Langevin steps x ← x + ε s + √(2ε) z at a step size that subclasses choose."""

    def __init__(self, sde, score_fn, snr, n_steps):
        super().__init__(sde, score_fn, snr, n_steps)
        arguments.real(snr=snr)
        arguments.whole(n_steps=n_steps)
        if snr < 0:
            raise ValueError(
                f"a corrector needs snr ≥ 0, got {snr}; the published values are 0.01 to 0.2"
            )
        refuse_bad_tables(sde, (sde_lib.VPSDE, sde_lib.subVPSDE))
        if not isinstance(sde, sde_lib.AffineSDE) and not sde_lib.is_affine(sde):
            raise ValueError(
                f"{type(self).__name__} needs α(t), and the drift or mean of {type(sde).__name__} "
                "is not affine in x; use corrector 'none' or your own"
            )

    def step_size(self, x, t, score, noise) -> torch.Tensor:
        """ε (B,) from state, time, score and noise."""
        raise NotImplementedError

    def update_fn(self, x, t):
        x_mean = x
        for _ in range(self.n_steps):
            score = self.score_fn(x, t)
            noise = self.randn_like(x)
            eps = self.step_size(x, t, score, noise)
            x_mean = x + expand(eps, x) * score
            x = x_mean + expand(torch.sqrt(2 * eps), x) * noise
        return x, x_mean

    def _alpha(self, x, t):
        """The α_i of App. G: 1 − β_i for VP and sub-VP, 1 for VE, (α_t/α_{t−T/N})² elsewhere."""
        if isinstance(self.sde, (sde_lib.VPSDE, sde_lib.subVPSDE)):
            return sde_lib.lookup(self.sde.alphas, sde_lib.row(self.sde, t))
        if isinstance(self.sde, sde_lib.VESDE):
            return torch.ones_like(t)
        before = (t - self.sde.T / self.sde.N).clamp(min=0)
        ratio = alpha_sigma(self.sde, t, x)[0] / alpha_sigma(self.sde, before, x)[0]
        return (ratio**2).to(t.dtype)


@register_corrector(name="langevin")
class LangevinCorrector(_Langevin):
    """Langevin dynamics with ε = 2 α_i (r ‖z‖/‖s‖)² (Song et al. 2021, App. G, alg. 4 and 5).

    The norms are means over the batch, as published; under `seeds=` they are each sample's own.
    """

    #: Below so many numbers per sample, ‖z‖/‖s‖ of one sample fluctuates without bound.
    MIN_NUMBERS = 768

    def step_size(self, x, t, score, noise):
        score_norm = torch.linalg.vector_norm(score.reshape(len(x), -1), dim=1)
        noise_norm = torch.linalg.vector_norm(noise.reshape(len(x), -1), dim=1)
        if self.noise is None or self.noise.seeds is None:
            score_norm, noise_norm = score_norm.mean(), noise_norm.mean()
        return 2 * self._alpha(x, t) * (self.snr * noise_norm / score_norm) ** 2


@register_corrector(name="ald")
class AnnealedLangevinDynamics(_Langevin):
    """Annealed Langevin dynamics with ε = 2 α_i (r σ_t)² (NCSN and NCSNv2)."""

    def step_size(self, x, t, score, noise):
        sigma = alpha_sigma(self.sde, t, x)[1].to(t.dtype)
        return 2 * self._alpha(x, t) * (self.snr * sigma) ** 2


@register_corrector(name="none")
class NoneCorrector(Corrector):
    """No corrector: predictor-only sampling."""

    def __init__(self, sde, score_fn, snr, n_steps):
        self.sde, self.score_fn, self.snr, self.n_steps = sde, score_fn, snr, n_steps

    def update_fn(self, x, t):
        return x, x
